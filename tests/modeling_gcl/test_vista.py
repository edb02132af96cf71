"""VISTA against the original code's outputs, and against a slow float64 version of it."""

import copy

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from transformers import (
    AutoModel,
    BertConfig,
    CLIPVisionConfig,
    EfficientNetConfig,
    SiglipVisionConfig,
    ViTConfig,
    XLMRobertaConfig,
)
from transformers.modeling_outputs import BaseModelOutput

from modeling_gcl import GCLConfig, GCLModel
from modeling_gcl.eva02 import rotary_tables
from modeling_gcl.vista import VistaModel
from modeling_gcl.vista_config import EVA02VisionConfig, VistaConfig
from tests.support.vista_originals import FIXTURE, SlowVista, fixture_inputs, real_tokens, tiny_state
from universal_gcl.conversion.vista import infer_config, key_names

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TEXT = TOWER | {"vocab_size": 30, "max_position_embeddings": 48}
PAD = {"base": 0, "m3": 1}


def tiny_vista(variant="base", patch_dropout=0.0, pooling="cls", **dropout):
    """The model of `tiny_state` in float32 and eval mode."""
    state = tiny_state(variant)
    config = infer_config(state)
    config.cls_token_id, config.sep_token_id = SlowVista(state).empty
    config.vision_config.patch_dropout, config.pooling = patch_dropout, pooling
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob"):
        setattr(config.text_config, name, dropout.get(name, 0.0))
    model = VistaModel(config)
    model.load_state_dict({name: state[key] for key, name in key_names(config).items()})
    return model.eval(), SlowVista(state)


def texts(variant, lengths, seed=0):
    """Ids and mask of random texts of these lengths, [CLS] and [SEP] included."""
    generator = torch.Generator().manual_seed(seed)
    opening, closing = (2, 3) if variant == "base" else (0, 2)
    rows = []
    for length in lengths:
        words = torch.randint(5, 25, (length - 2,), generator=generator).tolist()
        rows.append([opening, *words, closing] + [PAD[variant]] * (max(lengths) - length))
    mask = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
    return torch.tensor(rows), mask


def pixels(count, side=32, seed=0):
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(seed))


def features(model, input_ids, attention_mask, pixel_values):
    """All three features from one call of the image tower: `dict` to (N, D)."""
    tokens = model.get_visual_tokens(pixel_values)
    return {
        "text": model.get_text_features(input_ids, attention_mask).pooler_output,
        "image": model.get_image_features(visual_tokens=tokens).pooler_output,
        "fused": model.get_fused_features(input_ids, attention_mask, visual_tokens=tokens).pooler_output,
    }


@torch.no_grad()
def test_equals_the_original_on_its_fixture(vista_folder):
    model = GCLModel.from_pretrained(vista_folder).eval()
    pixel_values, input_ids, attention_mask = fixture_inputs()
    expected = FIXTURE["expected_visual_tokens"]
    tokens = model.encoder.vision_model(pixel_values).last_hidden_state
    assert list(tokens.shape) == expected["shape"]
    for index, values in expected["first8"].items():
        torch.testing.assert_close(tokens[0, int(index), :8], torch.tensor(values), atol=1e-4, rtol=0)
    assert abs(tokens.mean().item() - expected["mean"]) < 1e-4 and abs(tokens.std().item() - expected["std"]) < 1e-4
    output = model(pixel_values, input_ids, attention_mask)
    for name, values in FIXTURE["expected"].items():
        torch.testing.assert_close(output[f"{name}_embeds"], torch.tensor(values), atol=1e-5, rtol=0)


def test_the_slow_version_equals_the_original_too(vista_folder):
    names = key_names(GCLConfig.from_pretrained(vista_folder).encoder_config)
    weights = load_file(vista_folder / "model.safetensors")
    slow = SlowVista({key: weights[f"encoder.{name}"] for key, name in names.items()})
    pixel_values, input_ids, attention_mask = fixture_inputs()
    rows = real_tokens(input_ids, attention_mask)
    for name, found in (("fused", slow.fused(rows[1], pixel_values[1])), ("text", slow.text(rows[1]))):
        expected = torch.tensor(FIXTURE["expected"][name][1], dtype=torch.float64)
        torch.testing.assert_close(F.normalize(found[0], dim=-1), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("variant", ["base", "m3"])
@torch.no_grad()
def test_equals_the_slow_version(variant, pooling):
    model, slow = tiny_vista(variant, pooling=pooling)
    model.double()
    input_ids, attention_mask = texts(variant, [7, 2, 12])
    pixel_values = pixels(3).double()
    found = features(model, input_ids, attention_mask, pixel_values)
    for index, row in enumerate(real_tokens(input_ids, attention_mask)):
        states = {"text": slow.text(row), "image": slow.image(pixel_values[index])}
        states["fused"] = slow.fused(row, pixel_values[index])
        for name, expected in states.items():
            pooled = expected[0] if pooling == "cls" else expected.mean(0)
            torch.testing.assert_close(found[name][index], pooled, atol=1e-6, rtol=0, msg=f"{name} {index}")


@given(lengths=st.lists(st.integers(2, 40), min_size=1, max_size=4), seed=st.integers(0, 99))
@settings(max_examples=15, deadline=None)
def test_padding_and_order_do_not_matter_and_long_texts_are_cut(lengths, seed):
    """40 positions, 16 visual tokens: 24 text tokens fit, the last of them the closing one."""
    for variant in ("base", "m3"):
        model, _ = SHARED[variant]
        input_ids, attention_mask = texts(variant, lengths, seed)
        limits = {"text": 40 if variant == "base" else 38, "fused": 24}
        pixel_values = pixels(len(lengths), seed=seed)
        with torch.no_grad():
            found = features(model, input_ids, attention_mask, pixel_values)
            for index, row in enumerate(real_tokens(input_ids, attention_mask)):
                for name, limit in limits.items():
                    cut = row if len(row) <= limit else [*row[: limit - 1], row[-1]]
                    alone = features(model, torch.tensor([cut]), None, pixel_values[index : index + 1])
                    torch.testing.assert_close(found[name][index], alone[name][0], atol=1e-5, rtol=0)
                    torch.testing.assert_close(found["image"][index], alone["image"][0], atol=1e-5, rtol=0)


SHARED = {variant: tiny_vista(variant) for variant in ("base", "m3")}


@torch.no_grad()
def test_an_image_is_fused_with_the_empty_text():
    model, _ = SHARED["base"]
    pixel_values = pixels(2)
    empty = torch.tensor([[2, 3, 0], [2, 3, 0]])
    fused = model.get_fused_features(empty, torch.tensor([[1, 1, 0]] * 2), pixel_values=pixel_values)
    image = model.get_image_features(pixel_values)
    torch.testing.assert_close(image.pooler_output, fused.pooler_output, atol=1e-6, rtol=0)


def test_visual_tokens_are_computed_once_for_both_passes():
    gcl = GCLModel.from_encoder(copy.deepcopy(SHARED["base"][0]))
    assert gcl.config.fusion == "native" and gcl.logit_scale().item() == pytest.approx(50)
    calls = []
    gcl.encoder.vision_model.register_forward_hook(lambda *_: calls.append(1))
    gcl(pixels(2), *texts("base", [4, 3]))
    assert len(calls) == 1


def test_only_words_are_dropped_in_train_mode():
    """As in the original: no dropout between the visual tokens' LayerNorm and the text encoder's layers."""
    model, _ = tiny_vista(hidden_dropout_prob=0.5)
    sequences = []
    model.text_model.encoder.register_forward_pre_hook(lambda _, inputs: sequences.append(inputs[0]))
    input_ids, attention_mask = texts("base", [8, 8])
    for module in (model.eval(), model.train()):
        module.get_fused_features(input_ids, attention_mask, pixel_values=pixels(2))
    visual, train_visual = (sequence[:, 1:17] for sequence in sequences)
    assert torch.equal(visual, train_visual)
    dropped = sequences[1][:, [0, *range(17, 24)]] == 0
    assert 0.3 < dropped.float().mean() < 0.7


def test_patch_dropout_keeps_the_places_of_what_it_keeps():
    model, slow = tiny_vista(patch_dropout=0.5)
    pixel_values = pixels(2)
    whole = model.get_visual_tokens(pixel_values)
    assert whole.shape[1] == 16  # none in eval mode
    places = []
    model.vision_model.embeddings.register_forward_hook(lambda _, inputs, output: places.append(output[1]))
    tokens = model.vision_model.train()(pixel_values).last_hidden_state
    assert tokens.shape == (2, 9, 128) and (places[0][:, 0] == 0).all()
    assert places[0][0].tolist() != places[0][1].tolist()
    for index in range(2):
        kept = (places[0][index, 1:] - 1).tolist()
        assert len(set(kept)) == 8
        expected = slow.vision(pixel_values[index], kept)
        torch.testing.assert_close(tokens[index].double(), expected, atol=1e-5, rtol=0)
    # the text tower counts the tokens that it gets
    assert (
        model.train().get_fused_features(*texts("base", [5, 4]), pixel_values=pixel_values).last_hidden_state.shape[1]
        == 8 + 5
    )


@torch.no_grad()
def test_attention_implementations_agree():
    inputs = (*texts("base", [9, 3]), pixels(2))
    expected = features(SHARED["base"][0], *inputs)
    eager = copy.deepcopy(SHARED["base"][0])
    eager.set_attn_implementation("eager")
    assert eager.vision_model.config._attn_implementation == eager.text_model.config._attn_implementation == "eager"
    assert SHARED["base"][0].vision_model.config._attn_implementation == "sdpa"
    for name, found in features(eager, *inputs).items():
        torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=0)


def test_checkpointed_gradients_are_equal():
    model, _ = tiny_vista()
    inputs = (*texts("base", [9, 3]), pixels(2))
    gradients = []
    for checkpointed in (False, True):
        model.train().zero_grad()
        if checkpointed:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
            layers = [*model.vision_model.layers, *model.text_model.encoder.layer]
            assert all(layer.gradient_checkpointing for layer in layers)
        sum(value.square().sum() for value in features(model, *inputs).values()).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_compiles_without_a_break_in_the_graph():
    model, _ = SHARED["base"]
    inputs = (*texts("base", [9, 3]), pixels(2))
    compiled = torch.compile(lambda *given: features(model, *given), fullgraph=True, backend="eager")
    for name, found in compiled(*inputs).items():
        torch.testing.assert_close(found, features(model, *inputs)[name], atol=1e-6, rtol=0)


def image_towers():
    efficientnet = EfficientNetConfig(
        width_coefficient=1.0, image_size=64, hidden_dim=1280, num_block_repeats=[1] * 7, drop_connect_rate=0.0
    )
    small = TOWER | {"image_size": 32, "patch_size": 16}
    return {
        "eva02": (EVA02VisionConfig(**TOWER, image_size=32, patch_size=8), None, 32, 16),
        "efficientnet": (efficientnet, None, 64, 4),
        "vit": (ViTConfig(**small), 1, 32, 4),
        "clip": (CLIPVisionConfig(**small), 1, 32, 4),
        "siglip": (SiglipVisionConfig(**small), 0, 32, 4),
    }


@pytest.mark.parametrize("variant", ["base", "m3"])
@pytest.mark.parametrize("tower", image_towers())
def test_any_image_tower_saves_and_loads(tower, variant, tmp_path, monkeypatch):
    vision, prefix, side, patches = image_towers()[tower]
    text = BertConfig(**TEXT) if variant == "base" else XLMRobertaConfig(**TEXT, pad_token_id=1)
    config = VistaConfig(text, vision, cls_token_id=2, sep_token_id=3, num_prefix_tokens=prefix)
    model = GCLModel(GCLConfig(encoder_config=config, fusion="native")).eval()
    inputs = {"pixel_values": pixels(2, side)}
    inputs["input_ids"], inputs["attention_mask"] = texts(variant, [6, 3])
    model.save_pretrained(tmp_path)
    empty_like = torch.empty_like
    monkeypatch.setattr(  # whatever from_pretrained forgets to fill shows as NaN
        torch,
        "empty_like",
        lambda *a, **k: x.fill_(torch.nan) if (x := empty_like(*a, **k)).is_floating_point() else x,
    )
    loaded, half = (AutoModel.from_pretrained(tmp_path, dtype=dtype).eval() for dtype in ("float32", "bfloat16"))
    for name in ("pooling", "cls_token_id", "sep_token_id", "num_prefix_tokens", "logit_scale_init_value"):
        assert getattr(loaded.config.encoder_config, name) == getattr(config, name)
    assert {parameter.dtype for parameter in half.encoder.parameters()} == {torch.bfloat16}
    with torch.no_grad():
        tokens = model.encoder.get_visual_tokens(inputs["pixel_values"])
        assert tokens.shape == (2, patches, 32)
        expected = model(**inputs)
        assert 0 < (expected.fused_embeds - expected.image_embeds).abs().max() < 2
        for a, b in zip(expected.to_tuple(), loaded(**inputs).to_tuple(), strict=True):
            assert torch.equal(a, b)
        found, cast = half(**inputs), model.bfloat16()(**inputs)
    for name in ("image_embeds", "text_embeds", "fused_embeds"):
        assert (found[name] * expected[name]).sum(-1).min() > 0.99
        assert torch.equal(found[name], cast[name])


@torch.no_grad()
def test_rotary_positions_stay_exact_in_half_precision():
    model = copy.deepcopy(SHARED["base"][0]).bfloat16()
    tables = []
    model.vision_model.layers[1].register_forward_pre_hook(lambda _, inputs: tables.extend(inputs[1:]))
    assert model.get_visual_tokens(pixels(1)).dtype == torch.bfloat16
    for found, expected in zip(tables, rotary_tables(4, 16, 64), strict=True):
        assert found.dtype == torch.float32 and torch.equal(found, expected)


@torch.no_grad()
def test_a_feature_map_is_read_row_by_row():
    vision, _, side, _ = image_towers()["efficientnet"]
    model = VistaModel(VistaConfig(BertConfig(**TEXT), vision, cls_token_id=2, sep_token_id=3)).eval()
    maps = torch.randn(1, 1280, 2, 3)  # a random tower's own is nearly the same everywhere
    model.vision_model.register_forward_hook(lambda *_: BaseModelOutput(last_hidden_state=maps))
    tokens, embeddings = model.get_visual_tokens(pixels(1, side)), model.text_model.embeddings
    for index, (row, column) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        projected = model.visual_projection(maps[:, :, row, column])
        expected = embeddings.LayerNorm(projected + embeddings.position_embeddings.weight[index + 1])
        torch.testing.assert_close(tokens[:, index], expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("tower", ["eva02", "efficientnet", "vit"])
def test_every_parameter_gets_a_gradient(tower):
    """DistributedDataParallel fails otherwise."""
    vision, prefix, side, _ = image_towers()[tower]
    config = VistaConfig(BertConfig(**TEXT), vision, cls_token_id=2, sep_token_id=3, num_prefix_tokens=prefix)
    model = GCLModel(GCLConfig(encoder_config=config, fusion="native")).train()
    model(pixels(2, side), *texts("base", [6, 3])).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_random_weights_add_less_in_deeper_layers():
    layers = VistaModel(VistaConfig(BertConfig(**TEXT), cls_token_id=2, sep_token_id=3)).vision_model.layers
    for layer, share in ((layers[0], 2), (layers[11], 24)):
        for projection in (layer.attention.out_proj, layer.mlp.down_proj):
            assert projection.weight.std().item() == pytest.approx(0.02 / share**0.5, rel=0.02)


def test_clear_errors():
    model, _ = SHARED["base"]
    with pytest.raises(ValueError, match="images of 64 x 64 pixels do not fit this tower, which takes 32 x 32"):
        model.get_visual_tokens(pixels(1, 64))
    for given_too_much in ({}, {"pixel_values": pixels(1), "visual_tokens": torch.zeros(1, 16, 128)}):
        with pytest.raises(ValueError, match="either pixel_values or visual_tokens"):
            model.get_image_features(**given_too_much)
    with pytest.raises(ValueError, match="39 visual tokens leave no room for a text in a text tower of 40 positions"):
        model.get_image_features(visual_tokens=torch.zeros(1, 39, 128))
    with pytest.raises(ValueError, match="text_config is a 'gpt2'.*one of bert, xlm-roberta"):
        VistaConfig(text_config={"model_type": "gpt2"})
    with pytest.raises(ValueError, match="pooling='max' is unknown"):
        VistaConfig(pooling="max")
    with pytest.raises(ValueError, match="cls_token_id=101 is outside the vocabulary of 30"):
        VistaConfig(BertConfig(**TEXT))
    with pytest.raises(ValueError, match="unknown tower: model_type='eva17'"):
        VistaConfig(vision_config={"model_type": "eva17"})
    with pytest.raises(ValueError, match="config of 'mobilenet_v2' states no hidden_size"):
        VistaModel(VistaConfig(vision_config={"model_type": "mobilenet_v2"}))
    for wrong in ({"hidden_size": 100}, {"image_size": 100}, {"patch_dropout": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            EVA02VisionConfig(**wrong)
