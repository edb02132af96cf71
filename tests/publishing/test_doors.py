"""One saved folder gives the same vectors through every door, where our package can't be imported.

The code that runs is that of docs/use-a-model.md.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from modeling_gcl import GCLModel
from tests.support.backbones import FAMILIES, TEXT, VISION, random_image, tiny_model, tiny_processor
from tests.support.doors import run_outside
from universal_gcl import cli
from universal_gcl.publishing.adapter import save_with_adapter
from universal_gcl.publishing.model_folder import save_model_folder
from universal_gcl.retrieval.adapters import weight_checksums
from universal_gcl.training.arguments import LoraArguments
from universal_gcl.training.lora import add_lora

PAGE = (Path(__file__).parents[2] / "docs/use-a-model.md").read_text()
# NaFlex's additional inputs and full-length texts, native fusion, mean pooling; "model" below has gates and centring
OTHERS = ("siglip2", "vista-base", "efficientnet + bert")
ROWS = [
    "a red dog",
    "two birds in the sky and one cat on the green grass in a house flies runs",  # longer than the text towers accept
    {"image": "dog.jpg"},
    {"image": "wide.png"},
    {"image": "dog.jpg", "text": "in grass"},
    {"image": "wide.png", "text": "a blue bird"},
]
KINDS = {"text": [0, 1], "image": [2, 3], "fused": [4, 5]}
EVERY_FOLDER = """
results = {name: value for name, value in globals().items() if isinstance(value, (torch.Tensor, numpy.ndarray))}
for name in names:
    model = AutoModel.from_pretrained(name, trust_remote_code=True)
    assert type(model).__module__.startswith("transformers_modules."), type(model)
    processor = AutoProcessor.from_pretrained(name, trust_remote_code=True)
    results[f"{name}: AutoModel"] = model.encode(rows, processor)
    sentence_model = SentenceTransformer(name, trust_remote_code=True, device="cpu")
    opened = [row if isinstance(row, str) else {**row, "image": Image.open(row["image"])} for row in rows]
    vectors = [sentence_model.encode([opened[i] for i in kind], convert_to_tensor=True) for kind in kinds.values()]
    results[f"{name}: SentenceTransformer"] = torch.cat(vectors)
torch.save({name: torch.as_tensor(value).detach() for name, value in results.items()}, "results.pt")
"""


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.S)


def small_clip(fusion, centre_on=()):
    """A CLIP with one layer per tower, which is traced fast; its gates are not 1, its modality means not 0."""
    torch.manual_seed(0)
    one_layer = {"num_hidden_layers": 1, "initializer_factor": 3.0}
    family = replace(FAMILIES["clip"], text=TEXT | one_layer, vision=VISION | one_layer)
    model = GCLModel.from_encoder(family.build(), fusion=fusion, logit_scale_init_value=30.0).eval()
    if centre_on:
        torch.nn.init.normal_(model.fusion.gate_out.weight)
        embeds = model.encode(centre_on, tiny_processor("clip"))
        model.set_modality_means(*(embeds[KINDS[name]] for name in ("image", "text", "fused")))
        model.config.centring = True
    return model


def small_lora():
    """The model `tuned-by-lora`, whose adapter was trained on `base`."""
    save_model_folder("base", small_clip("gated_sum"), tiny_processor("clip"))
    adapted = add_lora(GCLModel.from_pretrained("base"), LoraArguments(r=4), str(Path("base").absolute()))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return save_with_adapter("tuned-by-lora", adapted, tiny_processor("clip"), weight_checksums("base")).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the photos that the page mentions."""
    folder = tmp_path_factory.mktemp("user")
    phone = Image.new("RGB", (40, 48)).getexif()
    phone[0x0112] = 6  # the photo lies on its side
    random_image(0).save(folder / "dog.jpg", exif=phone)
    random_image(1, (20, 70)).convert("P").save(folder / "wide.png")
    return folder


@pytest.fixture(scope="module")
def found_and_expected(folder):
    """The results of the page's code blocks and of the loop above, and what `encode` returns here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        models = {name: tiny_model(name) for name in OTHERS} | {"tuned-clip": small_clip("sum")}
        models["model"] = small_clip("gated_normalized_sum", centre_on=ROWS)
        expected = {"tuned-by-lora": small_lora().encode(ROWS, tiny_processor("clip"))}
        for name, model in models.items():
            processor = tiny_processor(name if name in OTHERS else "clip")
            save_model_folder(name, model, processor)
            expected[name] = model.encode(ROWS, processor)
        for command in "".join(blocks("bash")).splitlines():
            patch.setattr(sys, "argv", command.split())
            with pytest.raises(SystemExit) as stop:
                cli.main()
            assert stop.value.code == 0
    given = f"import numpy\nrows, kinds, names = {ROWS!r}, {KINDS!r}, {[*expected, 'merged']!r}\n"
    page = "\n".join(blocks("python"))
    run_outside(page + given + EVERY_FOLDER, folder)
    return torch.load(folder / "results.pt"), expected


@pytest.mark.parametrize("name", [*OTHERS, "model", "tuned-clip", "tuned-by-lora", "merged"])
def test_folders(name, found_and_expected):
    found, expected = found_and_expected
    expected = expected | {"merged": expected["tuned-by-lora"]}
    assert torch.pdist(expected[name]).min() > 1e-3  # otherwise a mixed-up row would not be noticed
    for door in ("AutoModel", "SentenceTransformer"):
        torch.testing.assert_close(found[f"{name}: {door}"], expected[name], atol=1e-5, rtol=0)


def test_the_page(found_and_expected):
    found, expected = found_and_expected
    whole = expected["model"]
    for name, rows in {
        "embeds": [0, 2, 4], "texts": [0], "images": [2], "fused": [4], "onnx_fused": [4],
    }.items():  # fmt: skip
        torch.testing.assert_close(found[name], whole[rows], atol=1e-5, rtol=0)
    for name in ("adapted_embeds", "auto_embeds"):
        torch.testing.assert_close(found[name], expected["tuned-by-lora"][[0, 2, 4]], atol=1e-5, rtol=0)
    torch.testing.assert_close(F.normalize(found["clip_text"]), expected["tuned-clip"][:1], atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "use",
    [
        "import warnings; warnings.warn('`old` is deprecated', FutureWarning)",
        "from transformers import logging; logging.get_logger('transformers.any').warning_once('`old` is deprecated')",
    ],
)
def test_what_is_deprecated_is_an_error_there_too(use, tmp_path):
    with pytest.raises(AssertionError, match="FutureWarning: `old` is deprecated"):
        run_outside(use, tmp_path)
