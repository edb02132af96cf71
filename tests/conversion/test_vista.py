"""gcl convert vista: the model gives the original's embeddings, and damaged or foreign files are refused."""

import json
import pickle
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import AutoModel, AutoProcessor

from tests.support.backbones import random_image
from tests.support.vista_originals import FIXTURE, SlowVista, tiny_state, tiny_tokenizer
from universal_gcl import cli
from universal_gcl.conversion import vista
from universal_gcl.conversion.vista import convert_vista
from universal_gcl.publishing.hub_folder import files_for
from universal_gcl.publishing.push import check_folder

FRESH_PROCESS = """
import sys
sys.modules["modeling_gcl"] = None  # as if our package were not installed
import json, numpy, torch
from transformers import AutoModel, AutoProcessor
folder, inputs, image = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3]
model = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
pixels = numpy.random.RandomState(7).standard_normal((2, 3, 224, 224)).astype(numpy.float32)
with torch.no_grad():
    output = model(torch.from_numpy(pixels), **{name: torch.tensor(value) for name, value in inputs.items()})
embeds = {name: output[f"{name}_embeds"].tolist() for name in ("image", "text", "fused")}
rows = model.encode([{"image": image, "text": "a red dog"}, "a red dog"], processor)
print("RESULT", json.dumps({"embeds": embeds, "rows": rows.shape, "class": type(model).__module__}))
"""


@pytest.fixture
def original(tmp_path):
    """A function that writes a checkpoint and its tokenizer, and returns both paths."""

    def write(variant="base", state=None):
        torch.save(tiny_state(variant) if state is None else state, tmp_path / "original.pth")
        tiny_tokenizer(variant).save_pretrained(tmp_path / f"{variant}_tokenizer")
        return tmp_path / "original.pth", tmp_path / f"{variant}_tokenizer"

    return write


def refused(message, file, tokenizer, tmp_path):
    """Checks that the converter raises `message` and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises((ValueError, OSError), match=message) as error:
        convert_vista(file, tmp_path / "out", tokenizer=tokenizer)
    assert sorted(tmp_path.iterdir()) == before
    return str(error.value)


def test_embeds_as_the_original_in_a_process_without_our_package(vista_folder, tmp_path):
    random_image(0).save(tmp_path / "x.png")
    inputs = {name: FIXTURE[name] for name in ("input_ids", "attention_mask")}
    command = [sys.executable, "-c", FRESH_PROCESS, str(vista_folder), json.dumps(inputs), str(tmp_path / "x.png")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    line = next(line for line in run.stdout.splitlines() if line.startswith("RESULT "))
    result = json.loads(line.removeprefix("RESULT "))
    assert result["rows"] == [2, 768] and result["class"].startswith("transformers_modules.")
    for name, expected in FIXTURE["expected"].items():
        np.testing.assert_allclose(result["embeds"][name], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("variant", ["base", "m3"])
def test_encode_equals_the_slow_version(variant, dtype, original, tmp_path, monkeypatch, capsys):
    state = {key: value.to(dtype) for key, value in tiny_state(variant).items()}
    file, tokenizer = original(variant, state)
    command = ["gcl", "convert", "vista", file, tmp_path / "out", "--tokenizer", tokenizer]
    monkeypatch.setattr(sys, "argv", [str(word) for word in command])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0
    report = capsys.readouterr().out
    assert f"VISTA {variant}, 85 tensors converted to float32" in report
    for key in ("bge_pooler.dense.weight", "model_visual.logit_scale", "model_visual.visual.head.bias"):
        assert key in report

    model = AutoModel.from_pretrained(tmp_path / "out").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert model.config.fusion == "native" and model.logit_scale().item() == pytest.approx(50)
    image, text, slow = random_image(1), "a red dog runs", SlowVista(state)
    pixels = processor(images=[image], return_tensors="pt")["pixel_values"][0]
    ids = processor.tokenizer(text)["input_ids"]
    assert len(ids) == 6
    # the processor cuts the long text to the text encoder's length, the model to what fits behind an image
    long = " ".join([text] * 12)
    cut = processor(text=[long], return_tensors="pt")["input_ids"][0].tolist()
    assert len(cut) == {"base": 40, "m3": 38}[variant]
    rows = [{"image": image, "text": text}, {"image": image}, text, {"image": image, "text": long}, long]
    found = model.encode(rows, processor)
    states = [slow.fused(ids, pixels), slow.image(pixels), slow.text(ids)]
    states += [slow.fused([*cut[:23], cut[-1]], pixels), slow.text(cut)]
    expected = torch.stack([state[0] for state in states])
    torch.testing.assert_close(found.double(), F.normalize(expected, dim=-1), atol=1e-5, rtol=0)


def test_images_are_prepared_as_by_the_original(original, tmp_path):
    """torchvision's Resize (shortest side, bicubic), CenterCrop, ToTensor and Normalize, in plain PIL and numpy."""
    convert_vista(*original()[:1], tmp_path / "out", tokenizer=original()[1])
    image = random_image(2, size=(50, 84))
    found = AutoProcessor.from_pretrained(tmp_path / "out")(images=[image], return_tensors="pt")["pixel_values"][0]
    resized = np.asarray(image.resize((53, 32), Image.Resampling.BICUBIC)) / 255  # 84 · 32 / 50 = 53.8
    cropped = resized[:, 10:42]
    mean, std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]
    expected = ((cropped - mean) / std).transpose(2, 0, 1)
    np.testing.assert_allclose(found, expected, atol=0.02)


def test_a_converted_folder_may_be_pushed_with_a_card_that_says_what_it_is(vista_folder):
    check_folder(vista_folder)
    card = (vista_folder / "README.md").read_text()
    assert (
        "made from\n**original.pth** without training. It is VISTA (Visualized BGE, arXiv 2406.04292), variant" in card
    )
    assert "The licence of original.pth holds for the weights." in card and "was not evaluated" in card
    assert "| seed |" not in card and "## Conversion\n" in card
    pushed = files_for(vista_folder, "org/vista")["README.md"]
    assert 'AutoModel.from_pretrained("org/vista"' in pushed and str(vista_folder) not in pushed.split("## Conv")[0]


def test_rotary_tables_in_the_file_are_compared(original, tmp_path):
    places = torch.arange(4) / 4 * 16
    angles = (places[:, None] / 10000 ** (torch.arange(0, 32, 2) / 32)).repeat_interleave(2, dim=1)  # (4, 32)
    angles = torch.stack([torch.cat([angles[row], angles[column]]) for row in range(4) for column in range(4)])
    tables = {}
    for name in ("rope", "blocks.0.attn.rope", "blocks.1.attn.rope"):
        tables[f"model_visual.visual.{name}.freqs_cos"] = angles.cos().half()
        tables[f"model_visual.visual.{name}.freqs_sin"] = angles.sin().half()
    file, tokenizer = original(state=tiny_state("base") | tables)
    assert "model_visual.visual.blocks.1.attn.rope.freqs_sin" in str(convert_vista(file, tmp_path / "good", tokenizer))
    tables["model_visual.visual.rope.freqs_sin"] = angles.cos().half()
    file, tokenizer = original(state=tiny_state("base") | tables)
    refused("visual.rope.freqs_sin is not the table of rotary positions", file, tokenizer, tmp_path)


class Code:
    def __reduce__(self):
        return exec, ("raise SystemExit('code was run')",)


def test_code_in_the_pickle_is_refused(original, tmp_path):
    message = "original.pth holds Python objects other than tensors. Loading them could run code"
    file, tokenizer = original(state=tiny_state("base") | {"extra": Code()})
    refused(message, file, tokenizer, tmp_path)
    file.write_bytes(pickle.dumps(Code()))
    refused(message, file, tokenizer, tmp_path)


def test_damaged_and_foreign_files_are_refused(original, tmp_path):
    file, tokenizer = original()
    whole = file.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 0):
        file.write_bytes(whole[:size])
        refused(r"original\.pth (is truncated|holds Python objects)", file, tokenizer, tmp_path)
    refused("absent.pth is not a file", tmp_path / "absent.pth", tokenizer, tmp_path)
    for value in ({}, [torch.zeros(2)], {"weights": tiny_state("base")}):
        file, tokenizer = original(state=value)
        refused("holds no state dict", file, tokenizer, tmp_path)
    file, tokenizer = original(state={"text_model.weight": torch.zeros(2)})
    refused(
        "original.pth: this is not a VISTA checkpoint: it lacks bge_embeddings.word_",
        file,
        tokenizer,
        tmp_path,
    )
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("notes.txt", "no tensors")
    refused("is truncated|holds Python objects", file, tokenizer, tmp_path)


def test_missing_keys_are_named_and_refused(original, tmp_path):
    whole = tiny_state("base")
    for key in whole:
        if any(re.match(pattern, key) for pattern in vista.UNUSED):
            continue
        state = {name: value for name, value in whole.items() if name != key}
        with pytest.raises(ValueError, match=key.replace(".", r"\.")):
            vista.classify_keys(state, vista.key_names(vista.infer_config(state)))
    state = tiny_state("base")
    del state["bge_encoder.layer.1.output.dense.bias"]
    file, tokenizer = original(state=state)
    refused("original.pth: the file lacks bge_encoder.layer.1.output.dense.bias", file, tokenizer, tmp_path)


def test_unknown_keys_are_reported_or_refused(original, tmp_path):
    file, tokenizer = original(state=tiny_state("base") | {"ema_step": torch.tensor(3)})
    assert convert_vista(file, tmp_path / "good", tokenizer).notes[-1] == "unused (unknown to this converter): ema_step"
    file, tokenizer = original(state=tiny_state("base") | {"model_visual.visual.blocks.0.gamma_1": torch.ones(128)})
    refused("layers have parts that VISTA's layers don't have.*blocks.0.gamma_1", file, tokenizer, tmp_path)


def test_values_and_shapes_are_checked(original, tmp_path):
    state = tiny_state("base")
    state["model_visual.visual.blocks.1.attn.v_bias"][5] = torch.nan
    state["visual_proj.weight"][0, 0] = torch.inf
    file, tokenizer = original(state=state)
    message = refused("the file is damaged: these tensors hold NaN or infinite values", file, tokenizer, tmp_path)
    assert "blocks.1.attn.v_bias" in message and "visual_proj.weight" in message
    file, tokenizer = original(state=tiny_state("base") | {"visual_proj.bias": torch.zeros(64)})
    refused("these tensors' shapes don't fit the others': visual_proj.bias", file, tokenizer, tmp_path)
    file, tokenizer = original(state=tiny_state("base") | {"model_visual.visual.pos_embed": torch.zeros(1, 18, 128)})
    refused("pos_embed has 17 patches, which is not a square number", file, tokenizer, tmp_path)


def test_the_tokenizer_must_be_the_variants(original, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (m3, _), (_, base_tokenizer) = original("m3"), original("base", tiny_state("m3"))
    refused("does not belong to .*xlm-roberta text encoder: its padding token id is 0", m3, base_tokenizer, tmp_path)
    (base, _), m3_tokenizer = original("base"), tmp_path / "m3_tokenizer"
    refused("does not belong to .*a bert text encoder: its padding token id is 1", base, m3_tokenizer, tmp_path)
    tiny_tokenizer("base", 81).save_pretrained(tmp_path / "larger")
    refused("its vocabulary size is 81, but the weights need 25", base, tmp_path / "larger", tmp_path)
    (tmp_path / "empty").mkdir()
    for absent in (tmp_path / "empty", tmp_path / "nowhere"):
        refused("can't be loaded.*--tokenizer", base, absent, tmp_path)
    monkeypatch.setitem(vista.TOKENIZERS, "base", str(tmp_path / "nowhere"))
    refused("can't be loaded.*--tokenizer", base, None, tmp_path)


def test_integers_and_sparse_tensors_are_refused(original, tmp_path):
    state = tiny_state("base")
    key = "bge_embeddings.word_embeddings.weight"
    refused(f"hold integers: {key}", *original(state=state | {key: state[key].char()}), tmp_path)
    refused(f"{key} is a sparse", *original(state=state | {key: state[key].to_sparse()}), tmp_path)


def test_nothing_half_written_stays(original, tmp_path, monkeypatch):
    file, tokenizer = original()

    def fail(*_, **__):
        raise OSError("no space left on device")

    monkeypatch.setattr(vista.GCLModel, "save_pretrained", fail)
    refused("no space left", file, tokenizer, tmp_path)
    monkeypatch.undo()
    (tmp_path / "out.partial").mkdir()  # somebody else's
    (tmp_path / "out.partial" / "x").touch()
    (tmp_path / "out").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    convert_vista(file, ".", tokenizer)  # into an empty folder
    assert (tmp_path / "out.partial" / "x").exists() and not list((tmp_path / "out").glob("*.partial"))
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "out" / "model.safetensors").read_bytes()
    with pytest.raises(FileExistsError, match="out exists and is not an empty folder"):
        convert_vista(file, tmp_path / "out", tokenizer)
    with pytest.raises(FileExistsError, match="link exists and is not an empty folder"):
        convert_vista(file, tmp_path / "link", tokenizer)
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == before
