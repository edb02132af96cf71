import pytest

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder
from universal_gcl.training.freezing import freeze_parts, parameter_counts, parameter_table


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    "parts, frozen",
    [
        (["text"], ("encoder.text_model.", "encoder.text_projection.")),
        (["image"], ("encoder.vision_model.", "encoder.visual_projection.")),
        (["text_tower"], ("encoder.text_model.",)),
        (
            ["image_tower", "text_tower", "logit_scale"],
            ("encoder.vision_model.", "encoder.text_model.", "logit_scale."),
        ),
    ],
)
def test_exactly_the_named_parts_are_frozen(parts, frozen):
    model = GCLModel.from_encoder(tiny_encoder("clip"))
    before = trained(model)
    freeze_parts(model, parts)
    assert trained(model) == {name for name in before if not name.startswith(frozen)}


def test_gates_alone_can_be_trained_and_are_counted():
    model = GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_sum")
    freeze_parts(model, ["image", "text", "logit_scale"])
    assert trained(model) and all(name.startswith("fusion.") for name in trained(model))
    gates = sum(p.numel() for p in model.fusion.parameters())
    counts = parameter_counts(model)
    assert counts["fusion"] == {"parameters": gates, "trained": gates} and counts["total"]["trained"] == gates
    freeze_parts(model := GCLModel.from_encoder(tiny_encoder("clip"), fusion="gated_sum"), ["fusion"])
    assert not any(name.startswith("fusion.") for name in trained(model))


def test_a_backbone_whose_projection_is_inside_its_tower_freezes_too():
    model = GCLModel.from_encoder(tiny_encoder("siglip"))
    freeze_parts(model, ["text"])
    assert not any(name.startswith("encoder.text_model") for name in trained(model))
    assert any(name.startswith("encoder.vision_model") for name in trained(model))


def test_nothing_left_to_train_is_an_error():
    with pytest.raises(ValueError, match="leaves only the temperature to train"):
        freeze_parts(GCLModel.from_encoder(tiny_encoder("clip")), ["image", "text"])


def test_the_table_adds_up():
    model = GCLModel.from_encoder(tiny_encoder("clip"))
    freeze_parts(model, ["text"])
    counts = parameter_counts(model)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert counts["total"]["parameters"] == total == sum(c["parameters"] for n, c in counts.items() if n != "total")
    assert counts["text tower"]["trained"] == 0 and counts["image tower"]["trained"] > 0
    assert counts["logit_scale"] == {"parameters": 2, "trained": 1}  # the backbone's own is never used
    lines = parameter_table(model).splitlines()
    assert lines[-1].split()[0] == "total" and f"{total:,}" in lines[-1]
    assert any("text tower" in line and "frozen" in line for line in lines)
