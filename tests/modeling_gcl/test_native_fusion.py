"""GCLModel on a backbone that fuses by itself."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel

from modeling_gcl import GCLModel
from modeling_gcl.vista import VistaModel
from modeling_gcl.vista_config import VistaConfig
from tests.support.backbones import random_image, tiny_processor
from tests.support.training_runs import make_trainer

TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
TOWER |= {"initializer_range": 0.3}  # lively enough to learn within seconds
TEXT = TOWER | {"model_type": "bert", "vocab_size": 30, "max_position_embeddings": 24}
VISION = TOWER | {"model_type": "eva02_clip_vision", "image_size": 32, "patch_size": 16}
ROWS = [{"image": random_image(0)}, "a red dog", {"image": random_image(1), "text": "a cat"}]


def tiny_vista(**config):
    torch.manual_seed(0)
    backbone = VistaModel(VistaConfig(text_config=TEXT, vision_config=VISION, cls_token_id=2, sep_token_id=3))
    return GCLModel.from_encoder(backbone, **config).eval()


@pytest.fixture(scope="module")
def inputs():
    images, texts = [random_image(i) for i in range(4)], ["a red dog", "a cat", "the green house", "one bird"]
    return dict(tiny_processor("clip")(images=images, text=texts, return_tensors="pt"))


def counted(model):
    calls = {"vision": 0, "text layers": 0}
    layer = model.encoder.text_model.encoder.layer[0]
    model.encoder.vision_model.register_forward_hook(lambda *_: calls.update(vision=calls["vision"] + 1))
    layer.register_forward_hook(lambda *_: calls.update({"text layers": calls["text layers"] + 1}))
    return calls


@pytest.mark.parametrize(
    "modalities, vision, text",
    [(None, 1, 3), (("image", "text"), 1, 2), (("fused",), 1, 1), (("image", "fused"), 1, 2), (("text",), 0, 1)],
)
def test_image_tokens_are_computed_once_and_no_pass_too_many(inputs, modalities, vision, text):
    model = tiny_vista()
    calls = counted(model)
    model(**inputs, modalities=modalities)
    assert calls == {"vision": vision, "text layers": text}


def test_encode_makes_one_pass_a_row():
    model = tiny_vista()
    calls = counted(model)
    model.encode(ROWS, tiny_processor("clip"))
    assert calls == {"vision": 2, "text layers": 3}


def test_embeddings_are_those_of_the_backbone(inputs):
    model = tiny_vista()
    assert model.config.fusion == "native" and model.config.tower_norms is None
    with torch.no_grad():
        output, encoder = model(**inputs), model.encoder
        expected = {
            "image": encoder.get_image_features(pixel_values=inputs["pixel_values"]),
            "text": encoder.get_text_features(inputs["input_ids"], inputs["attention_mask"]),
            "fused": encoder.get_fused_features(**inputs),
        }
        alone = model.get_fused_features(**inputs).pooler_output
    for name, features in expected.items():
        torch.testing.assert_close(output[f"{name}_embeds"], F.normalize(features.pooler_output, dim=-1))
    torch.testing.assert_close(F.normalize(alone, dim=-1), output.fused_embeds)
    summed = F.normalize(output.image_embeds + output.text_embeds, dim=-1)
    assert not torch.allclose(output.fused_embeds, summed, atol=1e-4)


def test_the_sum_is_possible_too(inputs):
    with torch.no_grad():
        output = tiny_vista(fusion="normalized_sum")(**inputs)
    torch.testing.assert_close(output.fused_embeds, F.normalize(output.image_embeds + output.text_embeds, dim=-1))


def test_centring_has_a_mean_of_its_own_for_fused_rows(inputs):
    model = tiny_vista()
    with torch.no_grad():
        plain = model(**inputs)
        model.set_modality_means(plain.image_embeds, plain.text_embeds, plain.fused_embeds)
        model.config.centring = True
        centred = model(**inputs)
    for name in ("image_embeds", "text_embeds", "fused_embeds"):
        torch.testing.assert_close(centred[name], F.normalize(plain[name] - plain[name].mean(0), dim=-1))


def test_it_trains_saves_and_loads(tmp_path, inputs):
    model = tiny_vista(logit_scale_init_value=10.0)
    trainer = make_trainer(tmp_path, model=model, num_train_epochs=10, optim="adamw_torch", learning_rate=2e-3)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    still = {name for name, p in model.named_parameters() if p.requires_grad and torch.equal(p, before[name])}
    assert not still
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])  # the last epoch and the first
    model.eval().save_pretrained(tmp_path / "model")
    loaded = AutoModel.from_pretrained(tmp_path / "model").eval()
    with torch.no_grad():
        for a, b in zip(model(**inputs).to_tuple(), loaded(**inputs).to_tuple(), strict=True):
            assert torch.equal(a, b)
