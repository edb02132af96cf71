import pytest
import torch
from transformers import AutoModel, CLIPProcessor
from transformers.utils import logging

from modeling_gcl import GCLModel
from modeling_gcl.fusion import Fusion, measure_tower_norms
from tests.support.backbones import random_image, tiny_encoder, tiny_processor


@pytest.mark.parametrize("rule", ["sum", "normalized_sum"])
def test_a_gated_fusion_begins_as_its_sum_and_learns(rule):
    torch.manual_seed(0)
    image, text = 5 * torch.randn(6, 16, dtype=torch.float64), torch.randn(6, 16, dtype=torch.float64)
    fusion, gated_rule = Fusion(16, gated=True).double(), f"gated_{rule}"

    def gated(image, text):
        return fusion(image, text, gated_rule)

    plain = Fusion(16, gated=False)(image, text, rule)
    torch.testing.assert_close(gated(image, text), plain, rtol=0, atol=0)
    assert torch.equal(fusion(image, text, rule), plain)
    optimizer = torch.optim.SGD(fusion.parameters(), lr=0.1)
    for _ in range(2):  # the first layer learns once the last one has left zero
        before = {name: p.clone() for name, p in fusion.named_parameters()}
        gated(image, text).pow(3).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(not torch.equal(p, before[name]) for name, p in fusion.named_parameters())
    with torch.no_grad():
        fusion.gate_out.bias.fill_(1e6)  # all gates fully open: 2
    torch.testing.assert_close(gated(image, text), 2 * plain)


def test_the_gates_weigh_each_dimension_of_each_tower():
    fusion = Fusion(4, gated=True).double()
    with torch.no_grad():
        fusion.gate_out.bias[:4] = 100.0
        fusion.gate_out.bias[4:] = -100.0
        fusion.gate_out.bias[7] = 0.0
    image, text = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    expected = 2 * image
    expected[:, 3] += text[:, 3]
    torch.testing.assert_close(fusion(image, text, "gated_sum"), expected)


def test_gates_are_saved_and_start_fresh_on_a_checkpoint_without_them(tmp_path):
    gated = GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_sum")
    with torch.no_grad():
        gated.fusion.gate_out.weight.normal_()
    gated.save_pretrained(tmp_path / "gated")
    again = AutoModel.from_pretrained(tmp_path / "gated")
    assert torch.equal(again.fusion.gate_out.weight, gated.fusion.gate_out.weight)
    GCLModel.from_encoder(tiny_encoder("clip"), fusion="sum").save_pretrained(tmp_path / "sum")
    fresh = GCLModel.from_encoder(tmp_path / "sum", fusion="gated_sum")
    assert not fresh.fusion.gate_out.weight.any() and not fresh.fusion.gate_out.bias.any()
    assert fresh.fusion.gate_in.weight.std() > 0.01


def test_the_rule_may_change_while_the_model_lives_and_is_what_is_saved(tmp_path):
    encoder, processor = tiny_encoder("clip"), tiny_processor("clip")
    with torch.no_grad():
        encoder.text_projection.weight.mul_(20)
    inputs = processor(images=[random_image(0), random_image(1)], text=["a red dog", "a cat"], return_tensors="pt")

    def fused(model):
        with torch.no_grad():
            return model.eval()(**inputs).fused_embeds

    model = GCLModel.from_encoder(encoder, fusion="sum")
    summed = fused(model)
    model.config.fusion = "normalized_sum"
    normalized = fused(model)
    assert not torch.allclose(normalized, summed, atol=0.01)
    assert torch.equal(normalized, fused(GCLModel.from_encoder(encoder, fusion="normalized_sum")))
    model.save_pretrained(tmp_path)
    assert torch.equal(fused(AutoModel.from_pretrained(tmp_path)), normalized)
    messages = {"gated_sum": "needs gates", "mean": "'mean' is unknown", "native": "needs a backbone that fuses"}
    for rule, message in messages.items():
        model.config.fusion = rule
        with pytest.raises(ValueError, match=message):
            fused(model)


def tiny_clip_folder(folder, text_scale):
    encoder, processor = tiny_encoder("clip"), tiny_processor("clip")
    with torch.no_grad():
        encoder.text_projection.weight.mul_(text_scale)
    encoder.save_pretrained(folder)
    CLIPProcessor(processor.image_processor, processor.tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("text_scale, fusion", [(1.0, "sum"), (30.0, "normalized_sum"), (0.03, "normalized_sum")])
def test_the_towers_lengths_choose_the_rule(tmp_path, text_scale, fusion):
    folder = tiny_clip_folder(tmp_path / "clip", text_scale)
    model = GCLModel.from_encoder(folder)
    assert model.config.fusion == fusion
    norms = model.config.tower_norms
    # the reference: the lengths of other pictures and words are of the same size
    processor = tiny_processor("clip")
    inputs = processor(images=[random_image(s) for s in range(8)], text=["a red dog"] * 8, return_tensors="pt")
    with torch.no_grad():
        features = model.eval().tower_features(**inputs)
    for name, feature in features.items():
        assert norms[name] == pytest.approx(feature.norm(dim=-1).mean().item(), rel=0.5)
    assert GCLModel.from_encoder(folder).config.tower_norms == norms
    model.save_pretrained(tmp_path / "gcl")
    again = GCLModel.from_encoder(tmp_path / "gcl")
    assert (again.config.fusion, again.config.tower_norms) == (fusion, norms)
    assert GCLModel.from_encoder(folder, fusion="sum").config.tower_norms is None


def test_measuring_leaves_the_mode_as_it_was():
    model = GCLModel.from_encoder(tiny_encoder("clip")).train()
    model.towers["text"].requires_grad_(False)
    measure_tower_norms(model, tiny_processor("clip"))
    assert model.training and model.towers["image"].training


def test_without_a_processor_the_rule_is_the_papers_and_says_so(tmp_path, caplog):
    tiny_encoder("clip").save_pretrained(tmp_path)
    logging.enable_propagation()
    with caplog.at_level("WARNING"):
        assert GCLModel.from_encoder(tmp_path).config.fusion == "sum"
    assert "can't be measured without a processor" in caplog.text
    measured = GCLModel.from_encoder(tmp_path, processor=tiny_processor("clip"))
    assert measured.config.tower_norms is not None
