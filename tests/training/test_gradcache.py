"""GradCache against one backward pass over the whole batch, through the trainer and alone."""

import copy
import logging
from itertools import count

import pytest
import torch
from backbones import tiny_encoder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from training_runs import make_pairs, make_trainer

from modeling_gcl import GCLModel
from training.freezing import freeze_parts
from training.gradcache import GradCache, RandomState
from training.training_arguments import GCLTrainingArguments

LOSSES = {
    "gcl": {"loss": "gcl"},
    "gcl_weighted": {"denominator": "without_other_positive", "direction_weights": {"i->t": 2.0, "t->it": 0.5}},
    "matryoshka": {"matryoshka_dims": [8, 3], "matryoshka_weights": [0.5, 2.0]},
    "cl": {"loss": "cl"},
    "alignclip": {"loss": "alignclip"},
}
CHECKPOINTING = {
    "activation_checkpointing"
    if "activation_checkpointing" in GCLTrainingArguments.__dataclass_fields__  # transformers 5.23
    else "gradient_checkpointing": True
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
        (torch.float32, 5e-6, CHECKPOINTING),
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
        loss = plain.compute_loss(plain.model.train(), collate([item for items in group for item in items]))
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
    single = [start.compute_loss(start.model, start.data_collator([start.train_dataset[j]])).item() for j in range(24)]
    assert losses[0] == pytest.approx(sum(single) / 24, rel=1e-5) and losses[1] > losses[0] + 2


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # peft asks for it
def test_lora_trains_the_same(tmp_path):
    peft = pytest.importorskip("peft")

    def adapted():
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["logit_scale"])
        torch.manual_seed(3)
        return peft.get_peft_model(tiny_model(), config)

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


def test_the_loss_scale_of_fp16_is_applied_once():
    model, batches = toy().eval(), [toy_batch(6)]
    expected = gradients(model, batches, None)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(model.parameters())
    model.zero_grad()
    cache = grad_cache(2)
    cache.backward = lambda scalar: scaler.scale(scalar).backward()
    cache.step(model, batches)
    torch.testing.assert_close(model.scale.grad, 1024 * expected["scale"], atol=1e-9, rtol=1e-9)
    scaler.unscale_(optimizer)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-12, rtol=1e-9)


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(5, 4), nn.Embedding(9, 4)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def forward(self, pixel_values, input_ids, attention_mask):
        self.seen.append((torch.is_grad_enabled(), pixel_values, self.drop(self.image(pixel_values))))
        text = (self.text(input_ids) * attention_mask[..., None]).sum(1)
        return self.seen[-1][2], text, self.scale


def toy():
    torch.manual_seed(0)
    return Toy().double()


def toy_batch(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.randint(1, 8, (n, 1), generator=generator)
    inputs = {
        "pixel_values": torch.randn(n, 5, generator=generator, dtype=torch.float64),
        "input_ids": torch.randint(0, 9, (n, 7), generator=generator),
        "attention_mask": mask.long(),
    }
    return inputs, {"ids": torch.randint(0, 4, (n,), generator=generator)}


def toy_loss(embeds, scale, labels):
    logits = scale * embeds[0] @ embeds[1].T / 10
    hidden = (labels["ids"][:, None] == labels["ids"]).fill_diagonal_(False)
    logits = logits.masked_fill(hidden, -torch.inf)
    return nn.functional.cross_entropy(logits, torch.arange(len(logits))), "terms"


def grad_cache(chunk_size, **settings):
    return GradCache(
        lambda model, inputs: model(**inputs), toy_loss, lambda scalar: scalar.backward(),
        device=torch.device("cpu"), chunk_size=chunk_size, **settings,
    )  # fmt: skip


def gradients(model, batches, chunk_size):
    model.zero_grad()
    grad_cache(chunk_size).step(model, batches)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 10), st.integers(0, 99))
def test_any_chunks_of_any_micro_batches_give_the_gradient_of_the_whole(sizes, chunk_size, seed):
    model = toy().eval()
    batches = [toy_batch(n, seed + i) for i, n in enumerate(sizes)]
    inputs = {name: torch.cat([batch[0][name] for batch in batches]) for name in batches[0][0]}
    labels = {"ids": torch.cat([batch[1]["ids"] for batch in batches])}
    *embeds, scale = model(**inputs)
    expected, _ = toy_loss(embeds, scale, labels)
    expected.backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    loss, terms = grad_cache(chunk_size).step(model, batches)
    assert loss.item() == pytest.approx(expected.item()) and terms == "terms" and not loss.requires_grad
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, whole[name], atol=1e-12, rtol=1e-12)


def test_dropout_is_replayed_bit_by_bit_and_the_generator_goes_on_once():
    model = toy()
    torch.manual_seed(4)
    grad_cache(2).step(model, [toy_batch(8), toy_batch(3, seed=1)])
    after = torch.rand(4)
    first, again = ([out for grad, _, out in model.seen if grad is with_graph] for with_graph in (False, True))
    assert len(first) == 5 and len(again) == 6  # the last chunk is embedded once, with its graph, and comes first
    for one, other in zip(first, again[1:]):
        assert torch.equal(one, other)
        assert (one == 0).any() and (one != 0).any()
    torch.manual_seed(4)
    for _, pixels, _ in model.seen[:6]:
        model.drop(model.image(pixels))
    assert torch.equal(after, torch.rand(4))


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


def test_chunks_that_are_not_the_last_do_not_communicate():
    events = []

    class NoSync:
        def __enter__(self):
            events.append("(")

        def __exit__(self, *exc):
            events.append(")")

    cache = GradCache(
        lambda model, inputs: model(**inputs), toy_loss, lambda scalar: (events.append("b"), scalar.backward()),
        device=torch.device("cpu"), chunk_size=2, no_sync=lambda model: NoSync(),
    )  # fmt: skip
    cache.step(toy(), [toy_batch(8)])
    assert "".join(events) == "()" + "(b)" * 3 + "b"
    events.clear()
    cache.step(toy(), [toy_batch(2)])
    assert "".join(events) == "b"


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
        forward = trainer._forward

        def counted(model, inputs):  # the encoder alone: the loss is linear in the batch
            with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
                return forward(model, inputs)

        trainer._forward = counted
        trainer.training_step(trainer.model, batch)
        return peak[0]

    small, large = most_saved(8, 8), most_saved(64, 8)
    assert 0 < large < 1.1 * small
    assert most_saved(64, None) > 6 * small


class Failing:
    """A backward or forward that runs out of memory at the given calls, counted from 0."""

    def __init__(self, call, at, error=None):
        self.call, self.at, self.calls = call, set(at), 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def __call__(self, *args):
        self.calls += 1
        if self.calls - 1 in self.at:
            raise type(self.error)(*self.error.args)  # a new one: it will hold the frames it came through
        return self.call(*args)


CPU_ERROR = RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory: 12 bytes")


@pytest.mark.parametrize("part, at, error", [
    ("embed", 0, None), ("embed", 1, CPU_ERROR), ("embed", 2, None), ("loss", 0, None), ("backward", 0, None),
    ("backward", 1, CPU_ERROR), ("embed", 4, None), ("backward", 2, None),
])  # fmt: skip
def test_one_shortage_of_memory_halves_the_chunk_and_repeats_the_step(part, at, error, caplog):
    """3 chunks of 4: embed 0, 1 without and 2 with a graph, 3 and 4 again; 3 times backward, the last one syncs."""
    batches = [toy_batch(12)]
    undisturbed, model = toy(), toy()
    torch.manual_seed(7)
    expected = gradients(undisturbed, batches, 2)
    after = torch.rand(3)
    torch.manual_seed(7)
    cache = grad_cache(4)
    setattr(cache, part, Failing(getattr(cache, part), {at}, error))
    with caplog.at_level(logging.WARNING):
        cache.step(model, batches)
    assert torch.equal(after, torch.rand(3)) and cache.chunk_size == 2
    for name, parameter in model.named_parameters():  # dropout included: the random numbers went back too
        assert torch.equal(parameter.grad, expected[name]), name
    assert len(caplog.records) == 1 and "grad_cache_chunk 2 instead of 4" in caplog.text
    with pytest.raises(MemoryError, match=r"chunks of 2 pairs. Lower grad_cache_chunk \(to 1\), .* resume"):
        cache.embed = Failing(cache.embed, {0})
        cache.step(model, batches)


def test_a_shortage_that_halving_does_not_cure_says_what_to_do():
    cache = grad_cache(8)
    cache.embed = Failing(cache.embed, range(2))
    with pytest.raises(MemoryError, match="out of memory.*, with chunks of 4 pairs. Lower .*bf16.*checkpointing"):
        cache.step(toy(), [toy_batch(12)])
    cache = grad_cache(1)
    cache.embed = Failing(cache.embed, {0})
    with pytest.raises(MemoryError, match="Lower the pairs per step"):
        cache.step(toy(), [toy_batch(12)])
    cache = grad_cache(4)
    cache.embed = Failing(cache.embed, {0}, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes"):
        cache.step(toy(), [toy_batch(12)])


def test_nothing_of_the_failed_attempt_stays_in_memory():
    """Else the second attempt would have less room than the first."""
    alive = set()

    class Big(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = object.__new__(Token)
            alive.add(id(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Token:
        def __del__(self):
            alive.discard(id(self))

    seen = []

    def embed(model, inputs):
        seen.append(len(alive))
        image, text, scale = model(**inputs)
        return Big.apply(image), text, scale

    cache = grad_cache(4)
    cache.embed = embed
    failing, at_loss = Failing(cache.loss, {0}), []
    cache.loss = lambda *args: (at_loss.append(len(alive)), failing(*args))[1]
    cache.step(toy(), [toy_batch(12)])
    assert at_loss == [1, 1]  # the graph of the last chunk, in each attempt
    assert seen[3] == 0  # where the second attempt begins


def test_chunk_counts_that_differ_between_processes_are_an_error_on_each():
    for mine in (3, 4):
        cache = grad_cache(4, exchange=lambda number: [3, 4])
        with pytest.raises(ValueError, match=r"different numbers of chunks .*\[3, 4\] in rank order.*drop_last"):
            cache.step(toy(), [toy_batch(4 * mine)])


def test_where_processes_wait_for_each_other_a_shortage_is_final():
    for part, at, sharded in (("loss", 0, False), ("backward", 2, False), ("embed", 0, True)):
        cache = grad_cache(4, exchange=lambda number: [number] * 2, sharded=sharded)
        setattr(cache, part, Failing(getattr(cache, part), {at}))
        with pytest.raises(MemoryError, match="while the processes exchange data: CUDA out of memory"):
            cache.step(toy(), [toy_batch(12)])


def test_a_shortage_elsewhere_stops_this_process_too(caplog):
    numbers = iter([3, 0, 1, 6, 0, 0, 0])  # what rank 1 says: chunks, fine, short of memory; chunks, fine from then on
    cache = grad_cache(4, exchange=lambda number: [number, next(numbers)])
    model = toy().eval()
    cache.step(model, [toy_batch(12)])
    assert "on rank 1" in caplog.text and cache.chunk_size == 2 and next(numbers, None) is None
    expected = gradients(toy().eval(), [toy_batch(12)], None)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-12, rtol=0)


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


def test_random_states_are_those_of_the_cpu_here():
    state = RandomState(torch.device("cpu"))
    first = torch.rand(3)
    state.restore()
    assert torch.equal(first, torch.rand(3))
