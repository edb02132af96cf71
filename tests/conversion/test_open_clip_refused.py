"""gcl convert open-clip: the files that it refuses. It names the reason, runs no code and leaves nothing behind."""

import os

import pytest
import torch
from safetensors.torch import save_file
from transformers import CLIPProcessor

from tests.support.open_clip_states import END, clip_like_tokenizer, convert, random_state, tinyclip_names, with_config
from universal_gcl.conversion.open_clip import convert_open_clip


def changed(**tensors):
    """`random_state` with some tensors replaced, or removed if None; `__` in a name stands for a dot."""
    state = random_state()
    for key, tensor in tensors.items():
        state[key.replace("__", ".")] = tensor
    return {key: tensor for key, tensor in state.items() if tensor is not None}


BLOCK = "visual.transformer.resblocks.1."
REFUSED = {
    "missing": (changed(visual__ln_pre__weight=None), "lacks visual.ln_pre.weight"),
    "half a layer": ({k: v for k, v in random_state().items() if ".0.ln_2" not in k}, "resblocks.0.ln_2.weight"),
    "half of an attention": (
        {k: v for k, v in tinyclip_names(random_state()).items() if not k.endswith("in_proj_bias")}, "in_proj_bias",
    ),
    "no scale": (changed(logit_scale=None), "lacks logit_scale"),
    "unknown": (changed(visual__transformer__resblocks__0__ls_1__gamma=torch.ones(64)), "no place for .*ls_1.gamma"),
    "nan": (changed(token_embedding__weight=torch.full((END + 1, 64), torch.nan)), "NaN or infinite.*token_embedding"),
    "quantised": (changed(visual__proj=torch.ones(64, 12, dtype=torch.int8)), "hold integers: visual.proj"),
    "other width": (random_state() | {BLOCK + "ln_1.weight": torch.ones(60)}, f"{BLOCK}ln_1.weight has shape .60,."),
    "head width": (random_state(heads=(2, 2), head_dim=40), "not a multiple of the head width 64"),
    "values": (random_state() | {BLOCK + "attn.in_proj_weight": torch.ones(192, 64),
                                 BLOCK + "attn.in_proj_bias": torch.ones(192),
                                 BLOCK + "attn.out_proj.weight": torch.ones(64, 32)}, "192 rows together, not 3 x 32"),
    "grid": (changed(visual__positional_embedding=torch.ones(6, 64)), "visual.positional_embedding has 6 rows"),
    "dims": (changed(text_projection=torch.ones(64, 13)), "visual.proj has 12 output dimensions, text_projection 13"),
    "twice": (tinyclip_names(random_state()) | {"logit_scale": torch.tensor(1.0)}, "logit_scale twice"),
    "resnet": (random_state() | {"visual.layer1.0.conv1.weight": torch.ones(1)}, "ModifiedResNet"),
    "timm": (random_state() | {"visual.trunk.cls_token": torch.ones(1)}, "timm"),
    "coca": (random_state() | {"text_decoder.ln_final.weight": torch.ones(1)}, "CoCa"),
    "transformers text": (random_state() | {"text.transformer.encoder.layer.0.x": torch.ones(1)}, "from transformers"),
    "masks": (tinyclip_names(random_state()) | {"_text_encoder.l0_module.hidden_loga": torch.ones(64)}, "prune_model"),
    "wide": (random_state(width=1088), "doesn't say how wide the image tower's heads are"),
    "no tensors": ({"state_dict": {"epoch": 3}}, "'epoch' is int"),
    "empty": ({}, "holds no state dict"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_by_name_and_leaves_nothing(name, tmp_path, tokenizer):
    state, message = REFUSED[name]
    with pytest.raises(ValueError, match=message) as error:
        convert(state, tmp_path, tokenizer, quick_gelu=True)
    assert str(tmp_path / "weights.pt") in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]


class Code:
    def __reduce__(self):
        return os.mkdir, ("executed",)


class Scripted(torch.nn.Module):
    def forward(self, x):
        return x


def write_code(path):
    torch.save({"state_dict": random_state(), "args": Code()}, path)


def write_half(path):
    torch.save(random_state(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def write_half_safetensors(path):
    save_file(random_state(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def write_torchscript(path):
    torch.jit.trace(Scripted(), torch.ones(1)).save(path)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "filename, write, message",
    [
        ("w.pt", write_code, "could run code"),
        ("w.pth", write_half, "truncated"),
        ("w.safetensors", write_half_safetensors, "truncated"),
        ("w.pt", write_torchscript, "TorchScript.*torch.jit.load"),
        ("w.bin", lambda path: path.write_text("version https://git-lfs.github.com/spec/v1"), "truncated or was not"),
        ("w.ckpt", lambda path: path.write_text(""), "must end in"),
        ("w.pt", lambda path: None, "is not a file"),
    ],
)
def test_reads_files_safely(filename, write, message, tmp_path, tokenizer, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / filename)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        convert_open_clip(tmp_path / filename, tmp_path / "clip", tokenizer=tokenizer, quick_gelu=True)
    assert not (tmp_path / "executed").exists() and not (tmp_path / "clip").exists()


@pytest.mark.parametrize(
    "part, settings, message",
    [
        ("vision_cfg", {"timm_model_name": "vit"}, "vision_cfg.timm_model_name = 'vit'"),
        ("vision_cfg", {"pool_type": "avg"}, "vision_cfg.pool_type = 'avg'"),
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask"),
        ("text_cfg", {"pool_type": "eos", "eos_id": 2}, "text_cfg.pool_type"),
        ("text_cfg", {"layers": 3}, "layers is 2 in the file, but 3 in the config"),
        ("vision_cfg", {"image_size": 64}, "grid of 2 x 2"),
        ("vision_cfg", {"image_size": [16, 32]}, "not square"),
        (None, {"multimodal_cfg": {}}, "CoCa"),
        (None, {"preprocess_cfg": {"resize_mode": "longest"}}, "resize_mode = 'longest'"),
        (None, {"text_cfg": None}, "no vision_cfg and text_cfg"),
    ],
)
def test_refuses_configs_by_setting(part, settings, message, tmp_path, tokenizer):
    with pytest.raises(ValueError, match=message):
        convert(random_state(), tmp_path, tokenizer, **with_config(tmp_path, part, **settings))


def test_tokenizers_that_do_not_fit(tmp_path, tokenizer):
    clip_like_tokenizer(end_first=True).save_pretrained(tmp_path / "first")
    with pytest.raises(ValueError, match=f"ends texts with id 0, but its highest id is {END}"):
        convert(random_state(), tmp_path, tmp_path / "first", quick_gelu=True)
    with pytest.raises(ValueError, match=f"ids up to {END}, but the text tower has {END} embeddings"):
        convert(random_state(vocabulary=END), tmp_path, tokenizer, quick_gelu=True)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(ValueError, match="can't be loaded.*--tokenizer"):
        convert(random_state(), tmp_path, tmp_path / "nothing", quick_gelu=True)


def test_a_folder_appears_whole_or_not_at_all(tmp_path, tokenizer, monkeypatch):
    def fail(*_, **__):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(CLIPProcessor, "save_pretrained", fail)
        with pytest.raises(OSError, match="disk full"):
            convert(random_state(), tmp_path, tokenizer, quick_gelu=True)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.pt"]
    (tmp_path / "clip").mkdir()
    convert(random_state(), tmp_path, tokenizer, quick_gelu=True)  # an empty folder is taken
    with pytest.raises(FileExistsError, match="not an empty folder"):
        convert(random_state(), tmp_path, tokenizer, quick_gelu=True)
