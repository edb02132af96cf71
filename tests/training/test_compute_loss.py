"""`compute_loss`, the only door to the loss: overrides and losses with parameters, against plain autograd."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import DistributedType
from torch import nn

from modeling_gcl import gcl_loss
from tests.support.own_losses import SigmoidLoss, UniformTrainer, assert_same, exact_model, trained, weights
from tests.support.training_runs import make_pairs, make_trainer
from universal_gcl.training.distributed import BatchProcesses
from universal_gcl.training.loss_parameters import LossParameters
from universal_gcl.training.trainer import GCLTrainer

RATE = 0.1  # of SGD


def embed(model, batches):
    """What the model makes of the pairs of these batches, and their labels."""
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name != "broken"}
    labels = {name: rows.pop(name) for name in ("ids", "caption_ids")}
    return model(**rows, return_loss=False), labels


def uniform_loss(output, labels):
    loss = gcl_loss(output.image_embeds, output.text_embeds, output.fused_embeds, output.logit_scale, **labels)
    return loss + 0.1 * torch.pdist(output.image_embeds).square().mul(-2).exp().mean().log()


def one_step(loss_of, batches, own=None, clip=None):
    """The weights after one step of SGD, and the gradient's norm, by plain autograd on the whole batch."""
    model = exact_model().train()
    loss_of(*embed(model, batches)).backward()
    named = dict(model.named_parameters()) | {f"loss.{n}": p for n, p in (own.named_parameters() if own else ())}
    norm = torch.sqrt(sum(p.grad.square().sum() for p in named.values() if p.grad is not None))
    rate = RATE if clip is None else RATE * clip / norm
    moved = {n: (p if p.grad is None else p - rate * p.grad).detach() for n, p in named.items()}
    return moved, norm.item()


BATCHES = {
    "plain": {},
    "cached": {"grad_cache_chunk": 5},
    "accumulated": {"grad_cache_chunk": 5, "per_device_train_batch_size": 6, "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("batch", BATCHES)
def test_an_override_changes_the_gradient(tmp_path, batch):
    trainer = trained(tmp_path, UniformTrainer, **BATCHES[batch])
    expected, norm = one_step(uniform_loss, trainer.batches)
    assert_same(weights(trainer), expected)
    logged = trainer.state.log_history[0]
    assert logged["grad_norm"] == pytest.approx(norm, rel=1e-6)
    assert "loss_i→t" in logged and logged["loss"] != pytest.approx(
        sum(value for name, value in logged.items() if name.startswith("loss_")) / 6, rel=1e-3
    )


@pytest.mark.parametrize("batch", BATCHES)
def test_parameters_of_a_loss_are_trained_and_clipped_with_the_models(tmp_path, batch):
    loss, own = SigmoidLoss().double(), SigmoidLoss().double()
    trainer = trained(tmp_path, loss=loss, max_grad_norm=0.5, **BATCHES[batch])

    def by_hand(output, labels):
        return own(output.image_embeds, output.text_embeds, output.logit_scale, BatchProcesses())

    expected, norm = one_step(by_hand, trainer.batches, own, clip=0.5)
    assert norm > 0.5 and trainer.state.log_history[0]["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert expected["loss.bias"] != -10
    assert_same(weights(trainer), expected, 1e-8)  # clipping adds 1e-6 to the norm
    assert "negatives" not in trainer.batch_plan.line()


def test_plain_accumulation_averages_the_gradient_of_a_losss_parameters(tmp_path):
    loss, own = SigmoidLoss().double(), SigmoidLoss().double()
    trainer = trained(tmp_path, loss=loss, per_device_train_batch_size=6, gradient_accumulation_steps=2, max_steps=2)
    assert len(trainer.batches) == 4
    model = exact_model()
    for step in (trainer.batches[:2], trainer.batches[2:]):  # the second has only its own gradient
        model.zero_grad()
        own.zero_grad()
        for batch in step:
            output, _ = embed(model, [batch])
            value = own(output.image_embeds, output.text_embeds, output.logit_scale, BatchProcesses())
            (value / 2).backward()
        with torch.no_grad():
            for parameter in [*model.parameters(), *own.parameters()]:
                if parameter.grad is not None:
                    parameter -= RATE * parameter.grad
    torch.testing.assert_close(loss.bias, own.bias, atol=1e-6, rtol=0)


def test_a_resumed_run_has_the_losss_parameters_and_their_optimizer_state(tmp_path):
    settings = {"optim": "adamw_torch", "learning_rate": 1e-2, "weight_decay": 0.1, "num_train_epochs": 1}
    settings |= {"max_steps": 3}
    whole = trained(tmp_path / "whole", loss=SigmoidLoss(), **settings)
    trained(tmp_path / "part", loss=SigmoidLoss(), save_strategy="steps", save_steps=2, **settings)
    checkpoint = str(tmp_path / "part" / "checkpoint-2")
    resumed = trained(tmp_path / "part", loss=SigmoidLoss(), resume=checkpoint, **settings)
    assert resumed.state.global_step == 3
    assert_same(weights(resumed), weights(whole), 1e-6)
    with pytest.raises(ValueError, match="with a loss with parameters of its own: resume it with the same loss"):
        trained(tmp_path / "part", resume=checkpoint, **settings)
    other = SigmoidLoss()
    other.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="loss.pt does not fit SigmoidLoss"):
        trained(tmp_path / "part", loss=other, resume=checkpoint, **settings)


def test_weight_decay_follows_trainers_rules(tmp_path):
    loss = SigmoidLoss()
    loss.projection = nn.Linear(3, 3)
    trainer = make_trainer(tmp_path, own_loss=loss, weight_decay=0.1)
    groups = trainer.create_optimizer().param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    assert decay[id(loss.projection.weight)] == 0.1
    assert decay[id(loss.bias)] == decay[id(loss.projection.bias)] == 0
    assert decay[id(trainer.model.logit_scale.log_scale)] == 0


class Probe(nn.Module):
    """A trained linear map between the two modalities."""

    modalities = ("image", "text")

    def __init__(self):
        super().__init__()
        self.map = nn.Linear(24, 24, bias=False)

    def forward(self, image_embeds, text_embeds, **unused):
        logits = 10 * self.map(image_embeds) @ text_embeds.T
        return nn.functional.cross_entropy(logits, torch.arange(len(logits)))


def test_a_losss_parameters_can_be_all_that_is_trained(tmp_path):
    plain, cached = Probe().double(), Probe().double()
    cached.load_state_dict(plain.state_dict())
    before = plain.map.weight.detach().clone()
    trained(tmp_path, loss=plain, model=exact_model().requires_grad_(False))
    trained(tmp_path, loss=cached, model=exact_model().requires_grad_(False), grad_cache_chunk=5)
    assert (plain.map.weight - before).abs().max() > 1e-4
    torch.testing.assert_close(cached.map.weight, plain.map.weight, atol=1e-9, rtol=0)


def test_the_best_model_comes_with_the_losss_parameters_of_its_checkpoint(tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "max_steps": 3}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "headline_mean", "save_total_limit": 3}
    loss = SigmoidLoss()

    class SecondIsBest(GCLTrainer):
        def evaluate(self, *args, **kwargs):
            metrics = super().evaluate(*args, **kwargs)
            return metrics | {"eval_headline_mean": float(self.state.global_step == 2)}

    trainer = trained(tmp_path, SecondIsBest, loss, model=exact_model().float(), eval_pairs=make_pairs(8), **settings)
    assert trainer.state.best_global_step == 2
    saved = [torch.load(tmp_path / f"checkpoint-{step}" / "loss.pt")["bias"] for step in (2, 3)]
    assert torch.equal(loss.bias, saved[0]) and not torch.equal(*saved)


def test_a_losss_terms_may_be_numbers(tmp_path):
    def loss(image_embeds, text_embeds, **unused):
        value = -(image_embeds * text_embeds).sum(1).mean()
        return value, {"value": value.item(), "with_graph": value, "count": 3}

    trainer = trained(tmp_path, loss=loss, max_steps=2)
    for logged in trainer.state.log_history[:2]:
        for name in ("loss_value", "loss_with_graph"):
            assert logged[name] == pytest.approx(logged["loss"], rel=1e-6)
        assert logged["loss_count"] == 3


def test_a_loss_that_is_nan_stops_the_run(tmp_path):
    def loss(image_embeds, **unused):
        return image_embeds.sum() * torch.nan

    with pytest.raises(FloatingPointError, match=r"^step 1: the loss since the last log entry is nan. Lower"):
        trained(tmp_path, loss=loss, max_steps=3)


def test_buffers_that_are_not_saved_move_to_the_device_too():
    loss = nn.Module()
    loss.register_buffer("mask", torch.ones(2), persistent=False)
    accelerator = SimpleNamespace(device=torch.device("meta"), distributed_type=DistributedType.NO)
    assert LossParameters(loss, accelerator).module is None and loss.mask.is_meta


class Regularised(GCLTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs)
        return loss + model.encoder.text_projection.weight.square().sum() + model.logit_scale()


@pytest.mark.parametrize("batch", BATCHES)
def test_weights_that_the_loss_depends_on_get_that_gradient_too(tmp_path, batch):
    trainer = trained(tmp_path, Regularised, **BATCHES[batch])
    model = exact_model()
    output, labels = embed(model, trainer.batches)
    loss = gcl_loss(output.image_embeds, output.text_embeds, output.fused_embeds, output.logit_scale, **labels)
    (loss + model.encoder.text_projection.weight.square().sum() + model.logit_scale()).backward()
    expected = {n: (p if p.grad is None else p - RATE * p.grad).detach() for n, p in model.named_parameters()}
    assert_same(weights(trainer), expected)


class Forgotten(GCLTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        self.bias = nn.Parameter(torch.zeros(2))
        return super().compute_loss(model, inputs) + self.bias.sum()


def test_what_would_stay_untrained_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"depends on a tensor of shape \(2,\).*GCLTrainer\(loss=...\)"):
        trained(tmp_path, Forgotten)
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="takes embeddings and logit_scale, but was given pixel_values.*embed_batch"):
        trainer.compute_loss(trainer.model, {"pixel_values": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"doesn't call compute_loss_func: give the loss as GCLTrainer\(loss=...\)"):
        GCLTrainer(trainer.model, trainer.args, compute_loss_func=lambda *_: None)
    given = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="SigmoidLoss has parameters of its own, which the given optimizer"):
        make_trainer(tmp_path, model=trainer.model, own_loss=SigmoidLoss(), optimizers=(given, None)).train()
    for kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        accelerator = SimpleNamespace(device=torch.device("cpu"), distributed_type=kind)
        with pytest.raises(ValueError, match=f"SigmoidLoss has parameters .* {kind.value}: use .*eight_gpus.yaml"):
            LossParameters(SigmoidLoss(), accelerator)
        assert LossParameters(SigmoidLoss().requires_grad_(False), accelerator).trained == []


def test_a_loss_draws_other_random_numbers_in_each_step(tmp_path):
    draws = []

    class Noisy(GCLTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            draws.append(torch.rand(1).item())
            return super().compute_loss(model, inputs)

    trained(tmp_path, Noisy, max_steps=3, grad_cache_chunk=5)
    assert len(set(draws)) == 3


def test_predict_goes_through_compute_loss(tmp_path):
    trainer = make_trainer(
        tmp_path, make_pairs(8), cls=UniformTrainer, model=exact_model(), per_device_eval_batch_size=8
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(8)])
    expected = uniform_loss(*embed(exact_model().eval(), [batch])).item()
    assert trainer.predict(trainer.train_dataset).metrics["test_loss"] == pytest.approx(expected, rel=1e-6)
