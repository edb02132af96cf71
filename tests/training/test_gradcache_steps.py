"""One step of GradCache against one backward pass over the whole batch, on toy towers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.toy_towers import grad_cache, gradients, toy, toy_batch, toy_loss
from universal_gcl.training.gradcache import GradCache, RandomState


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


def test_chunk_counts_that_differ_between_processes_are_an_error_on_each():
    for mine in (3, 4):
        cache = grad_cache(4, exchange=lambda number: [3, 4])
        with pytest.raises(ValueError, match=r"different numbers of chunks .*\[3, 4\] in rank order.*drop_last"):
            cache.step(toy(), [toy_batch(4 * mine)])


def test_random_states_are_those_of_the_cpu_here():
    state = RandomState(torch.device("cpu"))
    first = torch.rand(3)
    state.restore()
    assert torch.equal(first, torch.rand(3))


def test_weights_that_the_loss_uses_directly_are_refused_where_they_are_sharded():
    model = toy()

    def regularised(embeds, scale, labels):
        loss, terms = toy_loss(embeds, scale, labels)
        return loss + model.image.weight.square().sum(), terms

    cache = grad_cache(2, sharded=True)
    cache.loss = regularised
    with pytest.raises(ValueError, match="depends on weights of the model, which FSDP2 shards.*eight_gpus.yaml"):
        cache.step(model, [toy_batch(4)])
    cache.sharded = False
    cache.step(model, [toy_batch(4)])
