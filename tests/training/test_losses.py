"""The losses that recipes name: negatives (counted in the loss itself), settings, help, and a new loss."""

import dataclasses

import pytest
import torch

from tests.support.training_runs import make_trainer
from universal_gcl.training.losses import LOSSES, LossSettings
from universal_gcl.training.losses.alignclip import AlignCLIP
from universal_gcl.training.losses.cl import CL
from universal_gcl.training.losses.gcl import GCL
from universal_gcl.training.recipe_help import field_docs, format_help
from universal_gcl.training.training_arguments import GCLTrainingArguments


@pytest.mark.parametrize(
    "loss, own",
    [
        (CL(), 1),
        (AlignCLIP(separation_weight=0.0), 1),
        (GCL(), 2),
        (GCL(intra_modality=False), 2),
        (GCL(denominator="without_other_positive"), 1),
        (GCL(denominator="without_other_positive", intra_modality=False), 1),
        (GCL(denominator="target"), 1),
    ],
)
def test_negatives_are_those_that_the_loss_has(loss, own):
    """With all similarities equal, e^loss is the number of candidates: the positive, the negatives and, with the
    denominator "all", the pair's third embedding."""
    n = 6
    embeds = torch.nn.functional.normalize(torch.ones(n, 4, dtype=torch.float64), dim=-1)
    value, terms = loss(**{f"{name}_embeds": embeds for name in loss.modalities}, logit_scale=10.0)
    assert value.exp().item() == pytest.approx(own + loss.negatives_per_query(n))
    assert {"i→t", "t→i"} <= terms.keys()


def test_settings_are_fields_of_the_training_arguments_with_help_and_defaults(tmp_path):
    described = {name: text for group in field_docs(LossSettings).values() for name, _, text in group}
    arguments = GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert arguments.loss == "gcl" and all(f'`"{name}"`: ' in described["loss"] for name in LOSSES)
    del described["loss"]
    for loss in LOSSES.values():
        for entry in dataclasses.fields(loss):
            assert described.pop(entry.name) and getattr(arguments, entry.name) == entry.default
    assert not described
    text = format_help({"training": GCLTrainingArguments})
    assert "training: Loss gcl" in text and text.count("--training.denominator ") == 1


def test_what_the_model_card_says_of_a_loss():
    for name, loss in LOSSES.items():
        assert loss.name == name and loss.citation.startswith("@") and "\n" not in loss.description
        assert loss.modalities in (("image", "text"), ("image", "text", "fused"))


def test_a_loss_is_made_from_the_training_arguments(tmp_path):
    arguments = GCLTrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, denominator="target", direction_weights={"i->t": 2.0}
    )
    assert arguments.make_loss() == GCL(denominator="target", direction_weights={"i→t": 2.0})
    trainer = make_trainer(tmp_path, loss="alignclip", separation_weight=0.25)
    assert trainer.loss == AlignCLIP(separation_weight=0.25)


def test_a_loss_of_the_table_that_is_not_ours_works_from_a_recipe(tmp_path, monkeypatch):
    """Adding a loss takes nothing but its class in LOSSES."""

    @dataclasses.dataclass(frozen=True)
    class Doubled(CL):
        name = "doubled"

        def __call__(self, **batch):
            loss, terms = super().__call__(**batch)
            return 2 * loss, terms

    monkeypatch.setitem(LOSSES, "doubled", Doubled)
    entry = make_trainer(tmp_path, loss="doubled", max_steps=1)
    entry.train()
    logged = entry.state.log_history[0]
    assert logged["loss"] == pytest.approx(logged["loss_i→t"] + logged["loss_t→i"], rel=1e-5)
    with pytest.raises(ValueError, match="training.loss: 'triple' is not one of gcl, cl, alignclip, doubled"):
        make_trainer(tmp_path, loss="triple")
