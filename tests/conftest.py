"""Fixtures for every room."""

import pytest
import yaml
from backbones import BACKBONES, tiny_encoder, tiny_processor, word_tokenizer
from training_runs import write_parquet
from transformers import CLIPProcessor


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
