"""Counted bytes against what is known, memory at hand, and the chunk that follows."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder
from universal_gcl.training import memory
from universal_gcl.training.memory import (
    LARGEST_CHUNK,
    available_memory,
    chunk_that_fits,
    count_peak,
    fit_chunk,
    measure_pair_memory,
)

CPU = torch.device("cpu")
KB = 4 * 256  # bytes of 256 float32


def test_the_peak_counts_what_is_alive_together():
    x = torch.ones(256)
    assert count_peak(lambda: x + 1, [x]) == KB
    assert count_peak(lambda: (x + 1).view(2, 128).mul_(2), [x]) == KB
    assert count_peak(lambda: [x + 1 for _ in range(5)], [x]) == 5 * KB
    assert count_peak(lambda: sum(float((x + i).numel()) for i in range(5)), [x]) <= 2 * KB
    assert count_peak(lambda: x.view(16, 16), [x]) == 0


def layers():
    torch.manual_seed(0)
    return nn.Sequential(*(nn.Sequential(nn.Linear(64, 64), nn.Sigmoid()) for _ in range(8)))


def embed_layers(model, inputs):
    return model(inputs["x"]), torch.ones(())


def embed_checkpointed(model, inputs):
    x = inputs["x"].clone().requires_grad_()
    for layer in model:
        x = checkpoint(layer, x, use_reentrant=False)
    return x, torch.ones(())


def test_memory_of_a_pair_is_that_of_its_activations():
    model = layers()
    pair = measure_pair_memory(embed_layers, model, {"x": torch.randn(8, 64)})
    one = 64 * 4
    # forward keeps the sigmoids' outputs; the current linear's output or a few gradients come on top
    assert 8 * one <= pair.per_pair <= 12 * one
    weight = 64 * 64 * 4
    assert pair.constant < 2 * weight  # a gradient of one weight at most, not of all
    assert (pair.inputs, pair.dim) == (one, 64)
    assert measure_pair_memory(embed_checkpointed, model, {"x": torch.randn(8, 64)}).per_pair > 8 * one


def test_checkpointing_shows():
    """Wide layers whose inside is computed again: checkpoints are narrow, and one inside is alive at a time."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 256), nn.Sigmoid(), nn.Linear(256, 8)) for _ in range(8)))
    inputs = {"x": torch.randn(8, 8)}
    plain = measure_pair_memory(embed_layers, model, inputs).per_pair
    checkpointed = measure_pair_memory(embed_checkpointed, model, inputs).per_pair
    inside = 256 * 4
    assert plain >= 8 * inside and inside <= checkpointed <= 5 * inside


def test_measuring_leaves_no_trace():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    measure_pair_memory(embed_layers, model, {"x": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))})
    assert torch.equal(torch.rand(4), expected)
    assert all(parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_memory_of_pairs_is_linear_for_a_dual_encoder():
    model = GCLModel.from_encoder(tiny_encoder("clip")).train()

    def embed(model, inputs):
        output = model(**inputs, return_loss=False)
        return output.image_embeds, output.text_embeds, output.fused_embeds, output.logit_scale

    def inputs(n):
        ids = torch.randint(4, 20, (n, 16))
        return {"pixel_values": torch.randn(n, 3, 32, 32), "input_ids": ids, "attention_mask": torch.ones_like(ids)}

    few, many = (measure_pair_memory(embed, model, inputs(n)) for n in (8, 32))
    assert few.per_pair == pytest.approx(many.per_pair, rel=0.05)
    predicted = few.constant + 256 * few.per_pair
    batch = inputs(256)
    sum(output.sum() for output in embed(model, inputs(2))).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    existing = [*model.parameters(), *model.buffers(), *batch.values(), *gradients]
    real = count_peak(lambda: sum(output.sum() for output in embed(model, batch)).backward(), existing)
    assert predicted == pytest.approx(real, rel=0.05)


@settings(deadline=None)
@given(st.floats(1, 1e12), st.floats(0, 1e12), st.floats(1, 1e9))
def test_the_chunk_is_the_largest_power_of_two_that_fits(budget, fixed, per_pair):
    chunk = chunk_that_fits(budget, fixed, per_pair)
    if chunk == 0:
        assert fixed + per_pair > budget * (1 - 1e-9)
        return
    assert chunk & (chunk - 1) == 0 and fixed + chunk * per_pair <= budget * (1 + 1e-9)
    assert chunk == LARGEST_CHUNK or fixed + 2 * chunk * per_pair > budget * (1 - 1e-9)


def test_memory_at_hand_is_shared_by_processes_and_bounded_by_the_container(tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    free = available_memory(CPU)
    assert free > 2**20
    (tmp_path / "memory.max").write_text("max\n")
    assert available_memory(CPU) == pytest.approx(free, rel=0.5)
    (tmp_path / "memory.max").write_text("3000000\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    assert available_memory(CPU) == 2_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_memory(CPU) == 500_000


def test_fitting_counts_the_batch_and_the_optimiser(monkeypatch):
    model, inputs = layers(), {"x": torch.randn(8, 64)}
    pair = measure_pair_memory(embed_layers, model, inputs)
    weights = sum(p.numel() * 4 for p in model.parameters())
    all_pairs = 100
    fixed = pair.constant + 3 * weights + all_pairs * (64 * 4 + 3 * 4 * 4 * 64)

    def fit(free, exchange=lambda number: [number]):
        monkeypatch.setattr(memory, "available_memory", lambda device: free)
        return fit_chunk(embed_layers, model, inputs, CPU, all_pairs, exchange)

    for chunk in (1, 8, 64):
        enough = (fixed + chunk * pair.per_pair) / memory.USABLE_SHARE
        assert fit(enough + 10) == chunk and (chunk == 1 or fit(enough - 10) == chunk // 2)
    with pytest.raises(ValueError, match="effective_batch_size 100 does not fit on rank 0: one pair takes"):
        fit(fixed)
    with pytest.raises(ValueError, match="does not fit on rank 1"):
        fit(10**12, exchange=lambda number: [number, 0])
    assert fit(10**12, exchange=lambda number: [number, 2]) == 2
