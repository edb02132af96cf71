"""GCLModel's own behaviour; `test_families.py` takes every family of backbones through what users do."""

import pytest
import torch
import torch.nn.functional as F
from transformers import BertConfig, BertModel, CLIPModel

from modeling_gcl import GCLConfig, GCLModel, GCLProcessor
from tests.support.backbones import random_image, tiny_encoder, tiny_processor

TEXTS = ["a red dog runs", "the cat sits on the green grass", "one bird"]


def inputs_for(name, n=3):
    return tiny_processor(name)(images=[random_image(i) for i in range(n)], text=TEXTS[:n], return_tensors="pt")


IMAGE_INPUTS = ("pixel_values", "pixel_attention_mask", "spatial_shapes")
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def test_normalized_sum_weighs_both_modalities_alike():
    model = GCLModel.from_encoder(tiny_encoder("clip"), fusion="normalized_sum").eval()
    with torch.no_grad():
        output = model(**inputs_for("clip"))
    torch.testing.assert_close(output.fused_embeds, F.normalize(output.image_embeds + output.text_embeds, dim=-1))


def test_each_tower_runs_once_and_a_missing_modality_costs_nothing(backbone):
    model = GCLModel.from_encoder(tiny_encoder(backbone)).eval()
    calls = {"image": 0, "text": 0}
    for name, tower in model.towers.items():
        tower.register_forward_hook(lambda *_, name=name: calls.__setitem__(name, calls[name] + 1))
    inputs = inputs_for(backbone)
    model(**inputs)
    assert calls == {"image": 1, "text": 1}
    only_text = model(**{k: v for k, v in inputs.items() if k in TEXT_INPUTS})
    assert calls == {"image": 1, "text": 2}
    assert only_text.loss is None and only_text.image_embeds is None and only_text.fused_embeds is None
    model(**{k: v for k, v in inputs.items() if k in IMAGE_INPUTS})
    assert calls == {"image": 2, "text": 2}


def test_from_encoder_takes_folders_and_keeps_their_weights_and_temperature(tmp_path):
    clip = tiny_encoder("clip")
    clip.logit_scale.data.fill_(3.0)
    clip.save_pretrained(tmp_path / "clip")
    model = GCLModel.from_encoder(tmp_path / "clip")
    for name, parameter in clip.named_parameters():
        assert torch.equal(parameter, model.encoder.get_parameter(name)), name
    assert model.logit_scale().item() == pytest.approx(20.0855, abs=1e-3)
    assert model.encoder.config._attn_implementation == clip.config._attn_implementation
    # a GCL checkpoint continues, with its configuration overridden
    with torch.no_grad():
        model.logit_scale.log_scale.fill_(1.0)
    model.save_pretrained(tmp_path / "gcl")
    again = GCLModel.from_encoder(tmp_path / "gcl", fusion="normalized_sum")
    assert again.config.fusion == "normalized_sum" and again.logit_scale.log_scale.item() == 1.0
    reset = GCLModel.from_encoder(tmp_path / "gcl", logit_scale_init_value=50.0)
    assert reset.logit_scale().item() == pytest.approx(50.0)


def test_temperature_is_bounded_kept_in_float32_and_trained():
    model = GCLModel.from_encoder(tiny_encoder("clip"), logit_scale_init_value=99.0)
    with torch.no_grad():
        model.logit_scale.log_scale.add_(1.0)
    assert model.logit_scale().item() == pytest.approx(100.0)
    model.logit_scale.clamp_()
    model.logit_scale().backward()
    assert model.logit_scale.log_scale.grad.item() == pytest.approx(100.0)  # alive at the bound


def test_a_model_saved_in_bfloat16_loads_as_saved_or_as_asked(tmp_path):
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path)
    half = GCLModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    again = GCLModel.from_pretrained(tmp_path / "half")
    assert again.dtype == torch.bfloat16 and again.modality_means.dtype == torch.float32
    assert GCLModel.from_encoder(tmp_path / "half", dtype=torch.float32).dtype == torch.float32
    for (name, parameter), (_, loaded) in zip(half.named_parameters(), again.named_parameters(), strict=True):
        assert parameter.dtype == loaded.dtype and torch.equal(parameter, loaded), name


def test_mean_pooling_ignores_padding():
    encoder = tiny_encoder("vision-text-dual-encoder")
    model = GCLModel.from_encoder(encoder, text_pooling="mean").eval()
    processor = tiny_processor("vision-text-dual-encoder")
    with torch.no_grad():
        batch = model.get_text_features(**processor(text=TEXTS, return_tensors="pt")).pooler_output
        for text, expected in zip(TEXTS, batch):
            alone = processor(text=[text], return_tensors="pt")
            hidden = encoder.text_model(**alone).last_hidden_state  # no padding: the plain mean
            torch.testing.assert_close(encoder.text_projection(hidden.mean(1))[0], expected, atol=1e-5, rtol=1e-5)


def test_a_frozen_tower_stays_in_eval_mode():
    model = GCLModel.from_encoder(tiny_encoder("clip"))
    model.towers["text"].requires_grad_(False)
    model.train()
    assert model.training and model.towers["image"].training and not model.towers["text"].training


def test_centring_is_gr_clip():
    model = GCLModel.from_encoder(tiny_encoder("clip")).eval()
    inputs = inputs_for("clip")
    with torch.no_grad():
        plain = model(**inputs)
        model.set_modality_means(plain.image_embeds, plain.text_embeds, plain.fused_embeds)
        model.config.centring = True
        centred = model(**inputs)
    image = plain.image_embeds - plain.image_embeds.mean(0)
    text = plain.text_embeds - plain.text_embeds.mean(0)
    torch.testing.assert_close(centred.image_embeds, F.normalize(image, dim=-1))
    torch.testing.assert_close(centred.text_embeds, F.normalize(text, dim=-1))
    torch.testing.assert_close(centred.fused_embeds, F.normalize(0.5 * image + 0.5 * text, dim=-1))
    with pytest.raises(ValueError, match="centring=False before"):
        model.set_modality_means(centred.image_embeds, centred.text_embeds, centred.fused_embeds)


@pytest.mark.parametrize("fusion", ["sum", "normalized_sum", "gated_sum"])
@pytest.mark.parametrize("centring", [False, True])
def test_features_normalised_are_the_embeddings(fusion, centring):
    """Other doors (sentence-transformers) normalise what the feature methods give."""
    model = GCLModel.from_encoder(tiny_encoder("clip"), fusion=fusion, centring=centring).eval()
    model.modality_means.normal_(std=0.1)
    inputs = inputs_for("clip")
    image = {name: inputs[name] for name in IMAGE_INPUTS if name in inputs}
    text = {name: inputs[name] for name in TEXT_INPUTS if name in inputs}
    with torch.no_grad():
        output = model(**inputs)
        features = {
            "image": model.get_image_features(**image),
            "text": model.get_text_features(**text),
            "fused": model.get_fused_features(**inputs),
        }
    for name, feature in features.items():
        torch.testing.assert_close(F.normalize(feature.pooler_output, dim=-1), output[f"{name}_embeds"])


def test_gated_fusion_has_a_mean_of_its_own():
    model = GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_sum").eval()
    with torch.no_grad():
        plain = model(**inputs_for("clip"))
        model.set_modality_means(plain.image_embeds, plain.text_embeds, plain.fused_embeds)
        model.config.centring = True
        centred = model(**inputs_for("clip"))
    expected = F.normalize(plain.fused_embeds - plain.fused_embeds.mean(0), dim=-1)
    torch.testing.assert_close(centred.fused_embeds, expected)


@pytest.mark.parametrize("modalities", [("image",), ("text",), ("fused",), ("image", "text"), ("text", "fused")])
def test_only_the_modalities_asked_for(modalities):
    model = GCLModel.from_encoder(tiny_encoder("clip")).eval()
    inputs = inputs_for("clip")
    with torch.no_grad():
        everything, some = model(**inputs), model(**inputs, modalities=modalities)
    for name in ("image", "text", "fused"):
        embeds = getattr(some, f"{name}_embeds")
        assert (embeds is None) == (name not in modalities)
        assert embeds is None or torch.equal(embeds, everything[f"{name}_embeds"])
    assert some.loss is None
    with pytest.raises(ValueError, match=r"modalities=\('fused',\): the inputs given allow text only"):
        model(**{name: inputs[name] for name in TEXT_INPUTS if name in inputs}, modalities=("fused",))


def test_unknown_backbones_and_foreign_checkpoints_are_refused(tmp_path):
    bert = BertModel(BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32))
    with pytest.raises(ValueError, match="unknown backbone: BertModel is no dual encoder"):
        GCLModel.from_encoder(bert)
    with pytest.raises(ValueError, match="model_type='no-such-model'"):
        GCLConfig(encoder_config={"model_type": "no-such-model"})
    tiny_encoder("clip").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"'clip' checkpoint, not a GCL one.*from_encoder"):
        GCLModel.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="text_pooling='mean' needs a backbone with a text_projection"):
        GCLModel.from_encoder(tiny_encoder("siglip"), text_pooling="mean")
    with pytest.raises(ValueError, match="fusion='product' is unknown"):
        GCLModel.from_encoder(tiny_encoder("clip"), fusion="product")
    with pytest.raises(ValueError, match="fusion='native' needs a backbone that fuses.*CLIPModel does not"):
        GCLModel.from_encoder(tiny_encoder("clip"), fusion="native")
    with pytest.raises(TypeError, match="GCLConfig has no field fuson"):
        GCLModel.from_encoder(tiny_encoder("clip"), fuson="sum")
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "gcl")
    for bad in ({"fusion": "product"}, {"max_logit_scale": 0.0}, {"logit_scale_init_value": -1.0}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))}=.*(is unknown|must be positive)"):
            GCLModel.from_encoder(tmp_path / "gcl", **bad)
    with pytest.raises(ValueError, match="logit_scale_init_value=200.0 is over max_logit_scale=100.0"):
        GCLModel.from_encoder(tiny_encoder("clip"), logit_scale_init_value=200.0)
    with pytest.raises(ValueError, match="GCLModel already"):
        GCLModel.from_encoder(GCLModel.from_encoder(tiny_encoder("clip")))
    with pytest.raises(ValueError, match="there are no means: call set_modality_means"):
        GCLModel.from_encoder(tiny_encoder("clip"), centring=True)(**inputs_for("clip"))
    with pytest.raises(ValueError, match="there are no means: call set_modality_means"):
        GCLModel.from_encoder(tiny_encoder("clip"), centring=True).get_text_features(torch.tensor([[2, 5, 3]]))
    with pytest.raises(ValueError, match="nothing to embed"):
        GCLModel.from_encoder(tiny_encoder("clip"))()
    with pytest.raises(TypeError, match="takes no input named pixels"):
        GCLModel.from_encoder(tiny_encoder("clip"))(**inputs_for("clip"), pixels=1)


def test_a_clip_inside_is_still_a_clip(tmp_path):
    """The wrapped backbone can be saved and used by every tool that takes its architecture."""
    model = GCLModel.from_encoder(tiny_encoder("clip"))
    model.encoder.save_pretrained(tmp_path)
    clip = CLIPModel.from_pretrained(tmp_path)
    assert torch.equal(clip.text_projection.weight, model.encoder.text_projection.weight)


def test_processor_round_trip_and_padding_rule(backbone, tmp_path):
    processor = tiny_processor(backbone)
    processor.save_pretrained(tmp_path)
    loaded = GCLProcessor.from_pretrained(tmp_path)
    a, b = (p(images=[random_image(1)], text=TEXTS[:2], return_tensors="pt") for p in (processor, loaded))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    length = a["input_ids"].shape[1]
    assert length == (16 if backbone.startswith("siglip") else 9)  # full length, or the longest of the batch
    long_text = loaded(text=["a " * 50], return_tensors="pt")
    assert long_text["input_ids"].shape[1] == loaded.max_tokens == 16
    loaded.max_text_length = 5
    assert loaded(text=["a " * 50], return_tensors="pt")["input_ids"].shape[1] == loaded.max_tokens == 5


def test_a_tokenizer_without_a_limit_cuts_nothing():
    processor = tiny_processor("clip")
    processor.tokenizer.model_max_length = int(1e30)  # transformers' value if the checkpoint states none
    assert processor.max_tokens is None
    assert processor(text=["a " * 50], return_tensors="pt")["input_ids"].shape[1] == 52


@pytest.mark.parametrize("dims", [[24], [24, 12, 1], None])
def test_the_configuration_keeps_the_cuts(dims, tmp_path):
    GCLConfig(tiny_encoder("clip").config, matryoshka_dims=dims).save_pretrained(tmp_path)
    assert GCLConfig.from_pretrained(tmp_path).matryoshka_dims == dims


@pytest.mark.parametrize("dims", [[], [12, 24], [12], [48, 24], [24, 12, 12], [24, 0]])
def test_cuts_that_do_not_fall_from_the_whole_are_refused(dims):
    with pytest.raises(ValueError, match="must fall from the embeddings' 24 to 1 or more"):
        GCLConfig(tiny_encoder("clip").config, matryoshka_dims=dims)
