"""The tiles: their path for rows of any kind, what they cost in flops, and that they never hold the logits."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from modeling_gcl import alignclip_loss, contrastive_loss, gcl_loss, tiles
from modeling_gcl.logsumexp import block_logsumexp

EVERY_BLOCK = [(0, 0), (0, 1), (0, 2), (1, 1), (1, 2), (2, 2)]


def random_embeds(n, d, seed=0, dtype=torch.float64, num=3):
    generator = torch.Generator().manual_seed(seed)
    return [F.normalize(torch.randn(n, d, generator=generator, dtype=dtype), dim=-1) for _ in range(num)]


def dense_blocks(embeds, scale, hidden):
    logits = scale * torch.stack([torch.stack([a @ m.T for m in embeds]) for a in embeds])
    return logits.masked_fill(hidden, -torch.inf).logsumexp(-1)[None]


@pytest.mark.parametrize(
    "dtype, scale, norm, exact",
    [
        (torch.float32, 20.0, 1.0, False),
        (torch.float32, 100.0, 1.0, False),
        (torch.float32, 1000.0, 1.0, True),  # the shift cannot bridge 2·1000
        (torch.float32, 20.0, 5.0, True),  # 20·25 overflows the shift of unit rows
        (torch.float64, 100.0, 1.0, False),
        (torch.float64, 100.0, 5.0, True),
    ],
)
def test_shift_where_it_is_safe_else_the_running_maximum(dtype, scale, norm, exact, monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", 16)
    embeds = [(norm * x).to(dtype) for x in random_embeds(37, 4)]
    exact_embeds = [x.double().requires_grad_() for x in embeds]
    embeds = [x.requires_grad_() for x in embeds]
    negatives, _ = block_logsumexp(embeds, torch.tensor(scale, dtype=dtype), EVERY_BLOCK, [4])
    assert negatives.grad_fn.exact == exact
    expected = dense_blocks(exact_embeds, scale, torch.eye(37, dtype=torch.bool))
    rounding = 1e-12 if dtype == torch.float64 else 1e-6
    torch.testing.assert_close(negatives.double(), expected, rtol=rounding, atol=scale * norm**2 * rounding)
    weights = torch.rand(negatives.shape, dtype=torch.float64)
    got = torch.autograd.grad((negatives * weights.to(dtype)).sum(), embeds)
    for a, b in zip(got, torch.autograd.grad((expected * weights).sum(), exact_embeds)):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e3 * rounding


def test_anchors_without_negatives_are_finite_and_pull_on_nothing():
    embeds = [x.requires_grad_() for x in random_embeds(6, 4)]
    labels = [torch.tensor([0, 0, 0, 1, 2, 2]), torch.tensor([5, 6, 7, 5, 5, 6])]  # pair 0 is like 1, 2 and 3, 4
    hidden = (labels[0][:, None] == labels[0]) | (labels[1][:, None] == labels[1])
    negatives, cosines = block_logsumexp(embeds, torch.tensor(9.0).double(), EVERY_BLOCK, [4], labels=labels)
    expected = dense_blocks(embeds, 9.0, hidden)
    finite = expected.isfinite()
    torch.testing.assert_close(negatives[finite], expected[finite], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cosines[0, 0, 2], (embeds[0] * embeds[2]).sum(-1))
    alone, _ = block_logsumexp([x[:1] for x in embeds], torch.tensor(9.0).double(), EVERY_BLOCK, [4])
    assert (alone < -1e300).all() and alone.isfinite().all()
    for gradient in torch.autograd.grad(alone.exp().sum(), embeds):
        assert not gradient.any()


def test_nothing_is_kept_without_gradient():
    with torch.no_grad():
        negatives, _ = block_logsumexp(
            random_embeds(6, 4), torch.tensor(9.0).double(), EVERY_BLOCK, [4], cache_bytes=10**9
        )
    assert negatives.grad_fn is None


def count_flops(loss_of, num_embeds, n, d):
    def addmm_(_, left, right, **__):  # FlopCounterMode does not know the in-place form
        return 2 * left[0] * left[1] * right[1]

    embeds = [x.requires_grad_() for x in random_embeds(n, d, dtype=torch.float32, num=num_embeds)]
    scale = torch.tensor(20.0, requires_grad=True)
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: addmm_}) as counter:
        loss_of(*embeds, scale).backward()
    return counter.get_total_flops() / (n * n * d)


def test_flops_at_four_thousand_pairs():
    """The matrix products of GCL, forward and backward, temperature's gradient included: 36 N²D and under 1 % more."""
    flops = count_flops(gcl_loss, 3, 4096, 16)
    assert 36 <= flops <= 1.01 * 36


@pytest.mark.parametrize(
    "loss_of, num_embeds, expected",
    [
        (gcl_loss, 3, 36),
        (lambda *x: gcl_loss(*x, intra_modality=False), 3, 24),
        (lambda *x: gcl_loss(*x, denominator="target"), 3, 24),
        (lambda *x: gcl_loss(*x, cache_bytes=10**9), 3, 27),
        (lambda *x: gcl_loss(*x, matryoshka_dims=[8, 4, 2]), 3, 36),
        (contrastive_loss, 2, 8),
        (alignclip_loss, 2, 18),
    ],
    ids=["gcl", "no_intra", "target", "all_tiles_kept", "matryoshka", "cl", "alignclip"],
)
def test_flops_of_the_switches(loss_of, num_embeds, expected, monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", 128)
    assert expected <= count_flops(loss_of, num_embeds, 1024, 16) <= 1.04 * expected


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's count of resident memory")
@pytest.mark.parametrize(
    "loss, num_pairs, dim",
    [
        ("gcl", 6144, 32),
        ("masked", 6144, 32),
        ("alignclip", 6144, 32),
        ("matryoshka", 6144, 32),
        pytest.param("gcl", 32768, 512, marks=pytest.mark.slow),
    ],
)
def test_peak_memory_is_linear_in_the_pairs(loss, num_pairs, dim):
    """At N = 6,144 one N×N float32 matrix is 151 MB, a bool one 38 MB. Allowed beyond E and dE: 3 E + 4 kB a pair,
    which is 27 MB then."""
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("peak_memory.py"), loss, str(num_pairs), str(dim)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parents[2],
    )
    beyond, embeds = map(float, run.stdout.split())
    assert beyond <= 3 * embeds + 4e3 * num_pairs
