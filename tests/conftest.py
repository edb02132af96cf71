"""Fixtures for every room."""

from tests.support import caches  # noqa: F401  first of all: it sets what the libraries read when they are imported

# isort: split
import shutil

import huggingface_hub
import pytest
import torch
import transformers
import yaml
from transformers import CLIPProcessor

from tests.support import deprecations, vista_originals  # noqa: F401
from tests.support.backbones import BACKBONES, tiny_encoder, tiny_processor, word_tokenizer
from tests.support.hub_on_loopback import hub_on_loopback
from tests.support.training_runs import write_parquet
from universal_gcl.conversion.vista import convert_vista


@pytest.fixture(params=BACKBONES)
def backbone(request):
    """Name of each kind of backbone in turn."""
    return request.param


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory):
    """A random CLIP as it would come from the Hub."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_encoder("clip").save_pretrained(folder)
    CLIPProcessor(tiny_processor("clip").image_processor, word_tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vista_folder(tmp_path_factory):
    """The checkpoint of the VISTA fixture, two of BERT's layers under the whole EVA02 tower, converted; 420 MB."""
    folder = tmp_path_factory.mktemp("vista")
    torch.save(vista_originals.fixture_state(), folder / "original.pth")
    vista_originals.tiny_tokenizer("base", 81).save_pretrained(folder / "tokenizer")
    convert_vista(folder / "original.pth", folder / "converted", tokenizer=folder / "tokenizer")
    (folder / "original.pth").unlink()
    yield folder / "converted"
    shutil.rmtree(folder)


@pytest.fixture
def recipe(clip_folder, tmp_path):
    """A YAML of a short run on `clip_folder` that writes to tmp_path / "out"."""
    settings = {
        "model": {"encoder": str(clip_folder), "fusion": "normalized_sum", "licence": "apache-2.0"},
        "data": {
            "train": [{"path": str(write_parquet(tmp_path / "train.parquet", 40))}],
            "eval": {"path": str(write_parquet(tmp_path / "eval.parquet", 12, seed=1))},
        },
        "training": {
            "output_dir": str(tmp_path / "out"), "num_train_epochs": 1, "per_device_train_batch_size": 8,
            "learning_rate": 1e-3, "dataloader_num_workers": 0, "use_cpu": True, "disable_tqdm": True, "seed": 5,
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on this machine that this process speaks to, with no token of the user's."""
    with hub_on_loopback() as hub:
        settings = {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_HUB_OFFLINE": False,
            "HF_HUB_DISABLE_XET": True,
        }
        monkeypatch.setattr(transformers.utils.hub, "_hf_api", None)  # made once, with the endpoint of that time
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
            monkeypatch.setattr(huggingface_hub.constants, name, str(tmp_path / "no-token"))
        huggingface_hub.close_session()
        yield hub
    huggingface_hub.close_session()
