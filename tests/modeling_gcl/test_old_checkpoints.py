"""Checkpoints saved by version 0.1, whose code had other module names, still load and give the same embeddings."""

import json
import tarfile
from pathlib import Path

import pytest
import torch

from modeling_gcl import GCLModel, GCLProcessor
from tests.support.backbones import random_image
from tests.support.doors import run_outside

FOLDERS = ("clip", "vista-base")
TARBALL = Path(__file__).parents[1] / "fixtures/checkpoint_0.1.tar.gz"
# run where our package can't be imported: the checkpoint runs the code stored with it
ENCODE = """
import json
import torch
from PIL import Image
from transformers import AutoModel, AutoProcessor

model = AutoModel.from_pretrained({folder!r}, trust_remote_code=True)
processor = AutoProcessor.from_pretrained({folder!r}, trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules."), type(model)
rows = ["a red dog", {{"image": Image.open("0.png")}}, {{"image": Image.open("1.png"), "text": "a blue cat"}}]
print(json.dumps(model.encode(rows, processor=processor).tolist()))
"""


@pytest.fixture(params=FOLDERS)
def old_checkpoint(request, tmp_path):
    """A folder that version 0.1 has saved, and the embeddings that it gave for three rows."""
    with tarfile.open(TARBALL) as archive:
        archive.extractall(tmp_path, filter="data")
    folder = tmp_path / "checkpoint_0.1" / request.param
    return folder, torch.tensor(json.loads((folder / "expected.json").read_text()))


def test_with_the_code_stored_in_them(old_checkpoint, tmp_path):
    folder, expected = old_checkpoint
    for seed in range(2):
        random_image(seed).save(tmp_path / f"{seed}.png")
    printed = run_outside(ENCODE.format(folder=str(folder)), tmp_path)
    assert torch.allclose(torch.tensor(json.loads(printed)), expected, atol=1e-5)


def test_with_the_present_code(old_checkpoint):
    folder, expected = old_checkpoint
    model, processor = GCLModel.from_pretrained(folder), GCLProcessor.from_pretrained(folder)
    rows = ["a red dog", {"image": random_image(0)}, {"image": random_image(1), "text": "a blue cat"}]
    assert torch.allclose(model.encode(rows, processor=processor), expected, atol=1e-5)
