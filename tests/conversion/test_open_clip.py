"""gcl convert open-clip: the CLIPModel gives the features of open_clip and TinyCLIP."""

import json
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import CLIPModel, CLIPProcessor
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from modeling_gcl import GCLModel, GCLProcessor
from tests.fixtures.make_open_clip import INPUT_IDS, recipe_pixels, recipe_tensor
from tests.support.backbones import random_image
from tests.support.open_clip_states import (
    END,
    WORDS,
    clip_like_tokenizer,
    convert,
    model_config,
    random_state,
    reference_features,
    tinyclip_names,
    with_config,
)
from universal_gcl import cli
from universal_gcl.conversion.open_clip import convert_open_clip

FIXTURE = json.loads((Path(__file__).parents[1] / "fixtures" / "open_clip_fixture.json").read_text())
IDS = torch.tensor([[1, 5, 7, END, END, END, END], [1, 3, 4, 2, 6, END, 0], [1, 2, 3, 4, 5, 6, END]])


@torch.no_grad()
def features(folder, pixels, input_ids):
    model = CLIPModel.from_pretrained(folder).eval()
    image = model.get_image_features(pixels).pooler_output
    mask = torch.arange(input_ids.shape[1]) <= input_ids.argmax(1, keepdim=True)  # as a tokenizer's mask
    return image, model.get_text_features(input_ids, attention_mask=mask.long()).pooler_output


def assert_equals_reference(state, folder, tokenizer, quick, names=lambda state: state, head_dim=64, **options):
    converted = convert(names(state), folder, tokenizer, **options)
    side = state["visual.conv1.weight"].shape[-1] * round((len(state["visual.positional_embedding"]) - 1) ** 0.5)
    pixels = torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(1))
    expected = reference_features(state, pixels, IDS, quick, head_dim)
    for found, reference in zip(features(converted.folder, pixels, IDS), expected):
        torch.testing.assert_close(found.double(), reference, atol=2e-5 * reference.abs().max().item(), rtol=0)
    return converted


@pytest.mark.parametrize("name", FIXTURE)
def test_equals_the_original_code(name, tmp_path):
    made = FIXTURE[name]
    state = {key: recipe_tensor(made["seed"], key, shape) for key, shape in made["shapes"].items()}
    clip_like_tokenizer(words=WORDS[:21]).save_pretrained(tmp_path / "tokenizer")
    converted = convert(state, tmp_path, tmp_path / "tokenizer", quick_gelu=name.endswith("quickgelu"))
    image, text = features(converted.folder, recipe_pixels(), torch.tensor(INPUT_IDS))
    torch.testing.assert_close(image, torch.tensor(made["image"]), atol=1e-5, rtol=0)
    torch.testing.assert_close(text, torch.tensor(made["text"]), atol=1e-5, rtol=0)
    assert (
        CLIPModel.from_pretrained(converted.folder).logit_scale.item() == state[[k for k in state if "scale" in k][0]]
    )


@settings(max_examples=15, deadline=None)
@given(
    layers=st.integers(1, 3),
    text_layers=st.integers(1, 3),
    width=st.integers(1, 150),
    text_width=st.integers(1, 150),
    quick_gelu=st.booleans(),
    context=st.integers(7, 12),
    draws=st.data(),
)
def test_pruned_towers_of_any_widths(
    layers, text_layers, width, text_width, quick_gelu, context, draws, tmp_path_factory, tokenizer
):
    def halves(most, count, some):
        values = draws.draw(st.lists(st.integers(0, most), min_size=count, max_size=count))
        return tuple(value or 1 for value in values[:1]) + tuple(values[1:]) if some else tuple(values)

    state = random_state(
        width=width, text_width=text_width, context=context, seed=draws.draw(st.integers(0, 1000)),
        heads=halves(3, layers, True), mlps=halves(90, layers, False),
        text_heads=halves(3, text_layers, True), text_mlps=halves(90, text_layers, False),
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("pruned")
    assert_equals_reference(state, folder, tokenizer, quick_gelu, tinyclip_names, quick_gelu=quick_gelu)


@settings(max_examples=6, deadline=None)
@given(
    heads=st.integers(1, 3), head_width=st.integers(2, 24), patch=st.integers(2, 9), grid=st.integers(1, 4),
    quick_gelu=st.booleans(), dim=st.integers(1, 20), seed=st.integers(0, 1000),
)  # fmt: skip
def test_a_config_tells_heads_and_activation(
    heads, head_width, patch, grid, quick_gelu, dim, seed, tmp_path_factory, tokenizer
):
    width, folder = heads * head_width, tmp_path_factory.mktemp("config")
    sizes = {"width": width, "text_width": width, "heads": (heads, heads), "text_heads": (heads, heads)}
    state = random_state(**sizes, head_dim=head_width, patch=patch, grid=grid, dim=dim, seed=seed)
    config = model_config(state, quick_gelu, head_width=head_width)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    options = {"config": folder / "open_clip_config.json", "head_dim": head_width}
    assert_equals_reference(state, folder, tokenizer, quick_gelu, **options)


def test_every_wrapper_and_format(tmp_path, tokenizer):
    state = random_state()
    pruned = tinyclip_names(state, "module.")
    twice = pruned | {key.replace("_image_encoder.module", "image_encoder_without_ddp"): v for key, v in pruned.items()}
    extras = {
        "input_resolution": torch.tensor(16),
        "context_length": torch.tensor(9),
        "logit_bias": torch.tensor(-10.0),
    }
    text = ("positional_embedding", "text_projection", "token_embedding.weight", "ln_final.", "transformer.")
    forms = {
        "plain": state,
        "training": {"epoch": 3, "name": "run", "state_dict": {f"module.{key}": v for key, v in state.items()}},
        "compiled": {f"_orig_mod.{key}": v for key, v in state.items()},
        "custom text": {("text." if key.startswith(text) else "") + key: v for key, v in state.items()},
        "half": {key: v.half().float() for key, v in state.items()},
        "tinyclip": {"state_dict": twice},
        "openai": state | extras | {"logit_scale": torch.tensor([2.5])},
    }
    weights = {}
    for name, form in forms.items():
        (folder := tmp_path / name).mkdir()
        notes = convert(form, folder, tokenizer, quick_gelu=True).notes
        assert any("input_resolution, context_length, logit_bias" in note for note in notes) == (name == "openai")
        weights[name] = CLIPModel.from_pretrained(folder / "clip").state_dict()
    (tmp_path / "safetensors").mkdir()
    save_file({key: v.contiguous() for key, v in state.items()}, tmp_path / "safetensors" / "w.safetensors")
    convert_open_clip(
        tmp_path / "safetensors" / "w.safetensors",
        tmp_path / "safetensors" / "clip",
        tokenizer=tokenizer,
        quick_gelu=True,
    )
    weights["safetensors"] = CLIPModel.from_pretrained(tmp_path / "safetensors" / "clip").state_dict()
    for name, found in weights.items():
        assert all(tensor.dtype == torch.float32 for tensor in found.values())
        atol = 1e-3 if name == "half" else 0
        torch.testing.assert_close(found, weights["plain"], atol=atol, rtol=0)


def test_pads_of_either_kind_pool_alike(tmp_path):
    """open_clip pads with 0, transformers' tokenizer with the end-of-text token; the first one is pooled."""
    for pad in ("<pad>", "<end>"):
        clip_like_tokenizer(pad).save_pretrained(tmp_path / pad)
        (tmp_path / f"out{pad}").mkdir()
        converted = convert(random_state(), tmp_path / f"out{pad}", tmp_path / pad, quick_gelu=False)
        config = CLIPModel.from_pretrained(converted.folder).config.text_config
        assert config.eos_token_id == END and config.pad_token_id == (0 if pad == "<pad>" else END)
        processor = CLIPProcessor.from_pretrained(converted.folder)
        inputs = processor.tokenizer(["a red dog", "cat"], padding="max_length", truncation=True, return_tensors="pt")
        assert inputs.input_ids.shape == (2, 9)
        with torch.no_grad():
            found = CLIPModel.from_pretrained(converted.folder).get_text_features(**inputs).pooler_output
        _, expected = reference_features(random_state(), torch.zeros(1, 3, 16, 16), inputs.input_ids, False)
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=0)


def test_is_a_backbone_of_gcl(tmp_path, tokenizer):
    state = tinyclip_names(random_state(width=70, heads=(2, 0)))
    folder = convert(state, tmp_path, tokenizer, quick_gelu=False).folder
    rows = [{"image": random_image(0)}, {"text": "a dog"}, {"image": random_image(1), "text": "red sky"}]
    embeddings = GCLModel.from_encoder(folder).eval().encode(rows, GCLProcessor.from_encoder(folder), batch_size=2)
    assert embeddings.shape == (3, 12)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["clip", "weights.pt"]


@pytest.mark.parametrize(
    "preprocess, expected",
    [
        (None, {"size": {"shortest_edge": 16}, "do_center_crop": True, "resample": 3}),
        (
            {"resize_mode": "squash", "interpolation": "bilinear", "mean": [0.5, 0.4, 0.3], "std": [0.1, 0.2, 0.3]},
            {
                "size": {"height": 16, "width": 16},
                "do_center_crop": False,
                "resample": 2,
                "image_mean": (0.5, 0.4, 0.3),
            },
        ),
    ],
)
def test_images_as_the_config_has_them(preprocess, expected, tmp_path, tokenizer):
    config = {"model_cfg": model_config(random_state(), True), "preprocess_cfg": preprocess}
    (tmp_path / "config.json").write_text(json.dumps(config))
    converted = convert(random_state(), tmp_path, tokenizer, config=tmp_path / "config.json")
    processor = CLIPImageProcessorPil.from_pretrained(converted.folder)
    for name, value in expected.items():
        found = dict(processor.size) if name == "size" else getattr(processor, name)
        assert (tuple(found) if isinstance(value, tuple) else found) == value
    assert ("default mean" in " ".join(converted.notes)) == (preprocess is None)
    assert processor(random_image(0), return_tensors="pt").pixel_values.shape == (1, 3, 16, 16)


def test_padding_is_told(tmp_path, tokenizer):
    state = random_state(width=100, heads=(3, 1, 0), mlps=(20, 30, 0), text_heads=(1, 1), text_mlps=(40, 40))
    notes = convert(tinyclip_names(state), tmp_path, tokenizer, quick_gelu=True).notes
    assert any(
        "layers [2]" not in note and "100 → 192, heads 1 to 3 → 3, MLP channels 20 to 30" in note for note in notes
    )
    assert not any(note.startswith("text tower") for note in notes)
    middle = random_state(heads=(1, 0, 1), mlps=(9, 0, 9))
    (tmp_path / "middle").mkdir()
    converted = assert_equals_reference(middle, tmp_path / "middle", tokenizer, True, tinyclip_names, quick_gelu=True)
    assert any("layers [1] are pruned completely" in note for note in converted.notes)
    assert CLIPModel.from_pretrained(converted.folder).config.vision_config.num_hidden_layers == 2


def test_padding_stays_empty_in_training(tmp_path, tokenizer):
    state = tinyclip_names(random_state(width=128, heads=(2, 1), mlps=(40, 30)))
    model = CLIPModel.from_pretrained(convert(state, tmp_path, tokenizer, quick_gelu=True).folder)
    model(IDS, torch.randn(3, 3, 16, 16), return_loss=True).loss.backward()
    layer = model.vision_model.encoder.layers[1]
    for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
        assert projection.weight.grad[:64].any() and not projection.weight.grad[64:].any()
    assert layer.mlp.fc1.weight.grad[:30].any() and not layer.mlp.fc1.weight.grad[30:].any()
    assert not layer.self_attn.out_proj.weight.grad[:, 64:].any() and not layer.mlp.fc2.weight.grad[:, 30:].any()


def test_an_image_size_beside_the_grid_is_the_configs(tmp_path, tokenizer):
    options = with_config(
        tmp_path, "vision_cfg", image_size=17
    )  # open_clip leaves the last pixel out, and so does CLIP
    folder = convert(random_state(), tmp_path, tokenizer, **options).folder
    model, pixels = CLIPModel.from_pretrained(folder), torch.randn(1, 3, 17, 17)
    expected, _ = reference_features(random_state(), pixels, IDS, True)
    with torch.no_grad():
        torch.testing.assert_close(model.get_image_features(pixels).pooler_output.double(), expected, atol=1e-5, rtol=0)


def test_command(tmp_path, tokenizer, monkeypatch, capsys):
    torch.save(tinyclip_names(random_state(heads=(0, 1))), tmp_path / "w.pt")
    arguments = [str(tmp_path / "w.pt"), str(tmp_path / "clip"), "--tokenizer", str(tokenizer)]
    monkeypatch.setattr(sys, "argv", ["gcl", "convert", "open-clip", *arguments])
    with pytest.raises(SystemExit, match="error: .*--gelu"):
        cli.main()
    monkeypatch.setattr(sys, "argv", ["gcl", "convert", "open-clip", *arguments, "--gelu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 0 and "heads 0 to 1 → 1" in capsys.readouterr().out
    assert CLIPModel.from_pretrained(tmp_path / "clip").config.vision_config.hidden_act == "gelu"


def test_the_activation_is_not_guessed(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="pass --quick-gelu .* or --config open_clip_config.json"):
        convert(random_state(), tmp_path, tokenizer)
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_config(random_state(), True)}))
    with pytest.raises(ValueError, match="which is in the same folder"):
        convert(random_state(), tmp_path, tokenizer)
    options = {"config": tmp_path / "open_clip_config.json"}
    assert_equals_reference(random_state(), tmp_path, tokenizer, True, **options)
    (tmp_path / "flag").mkdir()
    assert_equals_reference(random_state(), tmp_path / "flag", tokenizer, False, quick_gelu=False, **options)
