"""GradCache survives one shortage of memory as if there had been none, and says what to do at the next."""

import logging

import pytest
import torch

from tests.support.toy_towers import Failing, grad_cache, gradients, toy, toy_batch

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
