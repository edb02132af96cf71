"""GradCache through the trainer against one backward pass over the whole batch."""

import copy
from itertools import count

import pytest
import torch
from torch import nn

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder
from tests.support.toy_towers import Failing, gradients, toy, toy_batch
from tests.support.training_runs import CHECKPOINTING, make_pairs, make_trainer
from universal_gcl.training.arguments import LoraArguments
from universal_gcl.training.freezing import freeze_parts
from universal_gcl.training.lora import add_lora

LOSSES = {
    "gcl": {"loss": "gcl"},
    "gcl_weighted": {"denominator": "without_other_positive", "direction_weights": {"i→t": 2.0, "t→it": 0.5}},
    "matryoshka": {"matryoshka_dims": [8, 3], "matryoshka_weights": [0.5, 2.0]},
    "cl": {"loss": "cl"},
    "alignclip": {"loss": "alignclip"},
}


def uneven_pairs(n):
    """`make_pairs` with captions of 4 to 11 tokens, so that chunks differ in length."""
    pairs = make_pairs(n)
    for j, pair in enumerate(pairs):
        pair["captions"] = [caption + " grass" * (5 * j % 8) for caption in pair["captions"]]
    return pairs


def tiny_model(dtype=torch.float32, freeze=(), dropout=0.0):
    encoder = tiny_encoder("clip")
    for module in encoder.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = dropout
    model = GCLModel.from_encoder(encoder, logit_scale_init_value=10.0)
    freeze_parts(model, freeze)
    return model.to(dtype)


def train(tmp_path, model=None, **arguments):
    arguments = {"max_steps": 1, "num_train_epochs": 1, "per_device_train_batch_size": 12} | arguments
    trainer = make_trainer(tmp_path, uneven_pairs(48), model=model or tiny_model(), **arguments)
    trainer.train()
    return trainer


def assert_same_weights(trainer, expected, atol=1e-6):
    expected = dict(expected.model.named_parameters())
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(parameter, expected[name], atol=atol, rtol=0, msg=lambda m, at=name: f"{at}: {m}")


@pytest.mark.parametrize("loss", LOSSES)
def test_one_step_is_that_of_the_whole_batch_for_any_chunk(tmp_path, loss):
    plain = train(tmp_path, tiny_model(torch.float64), **LOSSES[loss])
    for chunk in (1, 5, 12):
        cached = train(tmp_path, tiny_model(torch.float64), grad_cache_chunk=chunk, **LOSSES[loss])
        assert_same_weights(cached, plain, atol=1e-12)
        logged, expected = cached.state.log_history[0], plain.state.log_history[0]
        assert logged.keys() == expected.keys() and {"loss", "grad_norm", "logit_scale"} <= logged.keys()
        for name in expected:
            if name.startswith(("loss", "grad_norm", "logit_scale")):
                assert logged[name] == pytest.approx(expected[name], rel=1e-6), name


@pytest.mark.parametrize(
    "freeze", [["image"], ["text"], ["image_tower"], ["logit_scale"], ["text", "logit_scale"]], ids=",".join
)
def test_frozen_parts_stay_and_the_rest_learns_the_same(tmp_path, freeze):
    plain = train(tmp_path, tiny_model(torch.float64, freeze))
    cached = train(tmp_path, tiny_model(torch.float64, freeze), grad_cache_chunk=5)
    assert_same_weights(cached, plain, atol=1e-12)
    start = dict(tiny_model(torch.float64, freeze).named_parameters())
    moved = {name for name, p in cached.model.named_parameters() if not torch.equal(p, start[name])}
    assert moved and moved <= {name for name, p in start.items() if p.requires_grad}


@pytest.mark.parametrize(
    "dtype, atol, settings",
    [
        (torch.float32, 5e-6, {}),
        (torch.float32, 5e-6, {CHECKPOINTING: True}),
        # Adam makes as much of the rounding in gradients that are truly 0 (keys' biases) as of any other
        (torch.float64, 1e-8, {"optim": "adamw_torch", "learning_rate": 1e-3}),
    ],
    ids=["sgd", "checkpointing", "adamw"],
)
def test_a_run_ends_where_the_plain_one_does(tmp_path, dtype, atol, settings):
    settings = {"max_steps": -1, "num_train_epochs": 2} | settings
    plain = train(tmp_path, tiny_model(dtype), **settings)
    cached = train(tmp_path, tiny_model(dtype), grad_cache_chunk=5, **settings)
    assert plain.state.global_step == 8
    assert_same_weights(cached, plain, atol=atol)


def test_accumulated_micro_batches_are_one_contrastive_batch(tmp_path):
    """Also in the last group of an epoch, which is smaller: 48 pairs are 8 micro-batches of 6, in groups of 3, 3, 2."""
    torch.manual_seed(0)
    cached = make_trainer(
        tmp_path, uneven_pairs(48), model=tiny_model(torch.float64), per_device_train_batch_size=6,
        gradient_accumulation_steps=3, grad_cache_chunk=4, num_train_epochs=1,
    )  # fmt: skip
    batches = []
    collate = cached.data_collator
    cached.data_collator = lambda items: batches.append(items) or collate(items)
    cached.train()
    assert [len(items) for items in batches] == [6] * 8 and cached.state.global_step == 3

    plain = make_trainer(tmp_path, uneven_pairs(48), model=tiny_model(torch.float64))
    losses = []
    for group in (batches[:3], batches[3:6], batches[6:]):
        batch = plain.embed_batch(plain.model.train(), collate([item for items in group for item in items]))
        loss = plain.compute_loss(plain.model, batch)
        plain.model.zero_grad()
        loss.backward()
        losses.append(loss.item())
        with torch.no_grad():
            for parameter in plain.model.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
    assert_same_weights(cached, plain, atol=1e-12)
    entries = [entry for entry in cached.state.log_history if "loss" in entry]
    assert [entry["loss"] for entry in entries] == pytest.approx(losses, rel=1e-5)
    directions = [name for name in entries[0] if name.startswith("loss_")]
    for entry in entries:
        assert sum(entry[name] for name in directions) / 6 == pytest.approx(entry["loss"], rel=1e-5)


def test_equal_captions_are_masked_across_micro_batches(tmp_path):
    """With one caption for all no pair has negatives, whatever the accumulation: the loss is that of single pairs."""
    pairs = make_pairs(24)
    for pair in pairs:
        pair["captions"] = ["a dog"]
    losses = []
    for masked in (True, False):
        trainer = make_trainer(
            tmp_path, pairs, model=tiny_model(), per_device_train_batch_size=6, gradient_accumulation_steps=4,
            grad_cache_chunk=4, max_steps=1, mask_equal_captions=masked,
        )  # fmt: skip
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    start = make_trainer(tmp_path, pairs, model=tiny_model())
    alone = [start.embed_batch(start.model, start.data_collator([start.train_dataset[j]])) for j in range(24)]
    single = [start.compute_loss(start.model, batch).item() for batch in alone]
    assert losses[0] == pytest.approx(sum(single) / 24, rel=1e-5) and losses[1] > losses[0] + 2


def test_lora_trains_the_same(tmp_path):
    def adapted():
        torch.manual_seed(3)
        return add_lora(tiny_model(), LoraArguments(r=4), "unused")

    plain, cached = train(tmp_path, adapted()), train(tmp_path, adapted(), grad_cache_chunk=5)
    assert_same_weights(cached, plain)
    start = dict(adapted().named_parameters())
    moved = {name for name, p in cached.model.named_parameters() if not torch.equal(p, start[name])}
    assert any("lora_B" in name for name in moved) and any("logit_scale" in name for name in moved)
    assert all("lora_" in name or "logit_scale" in name for name in moved)


def test_bf16_gradients_agree_with_the_plain_ones_within_its_rounding(tmp_path):
    full, half = train(tmp_path), train(tmp_path, bf16=True)
    cached = train(tmp_path, bf16=True, grad_cache_chunk=5)
    start = dict(tiny_model().named_parameters())

    def change(trainer):
        return torch.cat([(p - start[n]).flatten() for n, p in trainer.model.named_parameters()])

    rounding = (change(half) - change(full)).norm()
    assert 0 < (change(cached) - change(half)).norm() < rounding < 0.05 * change(full).norm()


def test_dropout_takes_part_in_the_gradient(tmp_path):
    """With one chunk of all pairs nothing is replayed; with the masks of that run any chunks must give its gradient."""
    model = toy()
    torch.manual_seed(1)
    inputs, labels = toy_batch(8)
    masks = nn.functional.dropout(torch.ones(8, 4, dtype=torch.float64), 0.5)
    fixed = copy.deepcopy(model).eval()
    rows = inputs["pixel_values"]
    fixed.image.register_forward_hook(
        lambda module, args, out: out * masks[[int((rows == row).all(1).nonzero()) for row in args[0]]]
    )
    expected = gradients(fixed, [(inputs, labels)], None)
    for name, gradient in gradients(fixed, [(inputs, labels)], 3).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=0)


def test_saved_activations_do_not_grow_with_the_batch(tmp_path):
    def most_saved(num_pairs, chunk):
        trainer = make_trainer(
            tmp_path, make_pairs(num_pairs), per_device_train_batch_size=num_pairs, grad_cache_chunk=chunk
        )
        trainer.optimizer = None
        batch = trainer.data_collator([trainer.train_dataset[j] for j in range(num_pairs)])
        alive, peak = {}, [0]
        serial = count()
        parameters = {p.untyped_storage().data_ptr() for p in trainer.model.parameters()}

        class Saved:
            def __init__(self, tensor):
                self.tensor, self.key = tensor, next(serial)
                if tensor.untyped_storage().data_ptr() not in parameters:
                    alive[self.key] = tensor.numel() * tensor.element_size()
                    peak[0] = max(peak[0], sum(alive.values()))

            def __del__(self):
                alive.pop(self.key, None)

        trainer.accelerator.gradient_state._set_sync_gradients(True)
        embed = trainer.grad_cache.embed

        def counted(model, inputs):  # the encoder alone: the loss is linear in the batch
            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
                return embed(model, inputs)

        trainer.grad_cache.embed = counted
        trainer.training_step(trainer.model, batch)
        return peak[0]

    small, large = most_saved(8, 8), most_saved(64, 8)
    assert 0 < large < 1.1 * small
    assert most_saved(64, None) > 6 * small


def test_the_trainer_recovers_from_a_shortage_of_memory(tmp_path):
    def run(chunk, at=()):
        trainer = make_trainer(
            tmp_path, uneven_pairs(48), model=tiny_model(dropout=0.2), per_device_train_batch_size=12,
            num_train_epochs=1, grad_cache_chunk=chunk,
        )  # fmt: skip
        trainer.grad_cache.embed = Failing(trainer.grad_cache.embed, at)
        trainer.train()
        return trainer

    disturbed, undisturbed = run(6, at=[1]), run(3)
    assert disturbed.batch_plan.chunk == 3
    for name, parameter in undisturbed.model.named_parameters():
        assert torch.equal(dict(disturbed.model.named_parameters())[name], parameter), name


def test_the_batches_of_the_last_step_are_free_before_the_next_are_fetched(tmp_path):
    trainer = make_trainer(
        tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=3, grad_cache_chunk=4, num_train_epochs=1
    )
    inner, lists = trainer.get_batch_samples, []

    def spied(*args):
        result = inner(*args)
        lists.append([len(batches) for batches in [*(fetched for fetched, _ in kept), result[0]]])
        kept.append(result)
        return result

    kept = []
    trainer.get_batch_samples = spied
    trainer.train()
    assert lists == [[3], [0, 3]]
