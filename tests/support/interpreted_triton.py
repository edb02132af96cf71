"""The Triton kernels under Triton's interpreter against every logit held at once in float64.

Run by `test_kernels.py` in a process of its own: TRITON_INTERPRET=1 must be set before triton is imported.
"""

from itertools import combinations_with_replacement
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from modeling_gcl import kernels, logsumexp
from modeling_gcl import loss as loss_module
from tests.support import dense_loss
from tests.support.dense_panel import dense_sums, dense_weighted

SCALE, SHIFT = 20.0, 3.0


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several tiles of rows and columns, parts of D and parts of the columns in tens of rows."""
    small = kernels._Config(16, 16, 16)
    monkeypatch.setattr(kernels, "_sums_config", lambda *_: small)
    monkeypatch.setattr(kernels, "_gradient_config", lambda *_: small)
    monkeypatch.setattr(kernels, "_step", lambda *_: 16)
    monkeypatch.setattr(kernels, "PROGRAMS", 4)


def make_panel(
    rows=20, cols=40, dim=24, modalities=2, blocks=None, symmetric=False, labels=0, semantic=0,
    dtype=torch.float32, seed=0,
):  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def unit(length, dim):
        return F.normalize(torch.randn(length, dim, generator=generator), dim=-1)

    row_embeds = tuple(unit(rows, dim).to(dtype) for _ in range(modalities))
    row_labels = tuple(torch.randint(0, 9, (rows,), generator=generator) for _ in range(labels))
    row_semantic = unit(rows, semantic) if semantic else None
    if symmetric:
        col_embeds, col_labels, col_semantic = row_embeds, row_labels, row_semantic
    else:
        col_embeds = tuple(unit(cols, dim).to(dtype) for _ in range(modalities))
        col_labels = tuple(torch.randint(0, 9, (cols,), generator=generator) for _ in range(labels))
        col_semantic = unit(cols, semantic) if semantic else None
    return SimpleNamespace(
        rows=row_embeds, cols=col_embeds, symmetric=symmetric,
        blocks=blocks or list(combinations_with_replacement(range(modalities), 2)),
        row_labels=row_labels, col_labels=col_labels, row_semantic=row_semantic, col_semantic=col_semantic,
    )  # fmt: skip


def kernel_sums(panel):
    modalities, rows = len(panel.rows), len(panel.rows[0])
    sums = torch.zeros(modalities, modalities, rows)
    kernels.add_sums(panel, SCALE, SHIFT, sums)
    return sums


def ratios_of(panel, seed=1):
    generator = torch.Generator().manual_seed(seed)
    modalities = len(panel.rows)
    return tuple(
        torch.rand(modalities, modalities, len(side[0]), generator=generator) for side in (panel.rows, panel.cols)
    )


def kernel_weighted(panel, wanted=None, bf16=False):
    grads = [torch.zeros(x.shape) if wanted is None or a in wanted else None for a, x in enumerate(panel.rows)]
    kernels.add_weighted(panel, SCALE, SHIFT, *ratios_of(panel), grads, bf16=bf16)
    return grads


def check(panel, *, gradient=1e-5, bf16=False):
    """Each sum to 1e-5; each row of the gradients by its norm, as its terms may cancel."""
    torch.testing.assert_close(kernel_sums(panel).double(), dense_sums(panel, SCALE, SHIFT), rtol=1e-5, atol=0)
    expected = dense_weighted(panel, SCALE, SHIFT, *ratios_of(panel))
    for got, exact in zip(kernel_weighted(panel, bf16=bf16), expected, strict=True):
        assert got.shape == exact.shape and got.isfinite().all()
        assert ((got.double() - exact).norm(dim=-1) <= gradient * exact.norm(dim=-1)).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("labels", [0, 1, 2])
def test_hidden_candidates(symmetric, labels):
    check(make_panel(symmetric=symmetric, labels=labels))


@pytest.mark.parametrize("blocks", [None, [(0, 1), (0, 2), (1, 2)], [(1, 1)], [(0, 0), (1, 2)]])
def test_blocks(blocks):
    check(make_panel(blocks=blocks, modalities=3, cols=20))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("semantic", [8, 33])
def test_semantic_repulsion_of_like_modalities_only(symmetric, semantic):
    check(make_panel(symmetric=symmetric, semantic=semantic, labels=1, cols=20))


@pytest.mark.parametrize("rows, cols", [(1, 1), (1, 50), (50, 1), (16, 32), (33, 17)])
def test_lengths(rows, cols):
    check(make_panel(rows=rows, cols=cols, labels=1, blocks=[(0, 1)]))


def test_an_anchor_alone_has_no_negatives():
    panel = make_panel(rows=1, symmetric=True)
    assert not kernel_sums(panel).any()
    assert not any(grad.any() for grad in kernel_weighted(panel))


@pytest.mark.parametrize("dim", [1, 16, 40, 64, 65, 150])
def test_dimensions(dim):
    """Up to 64 the accumulators hold all of D; beyond, programs share it."""
    check(make_panel(dim=dim, blocks=[(0, 1)], cols=20))


@pytest.mark.parametrize("dim", [5, 384, 1280])
def test_configurations_of_a_gpu(dim, monkeypatch):
    monkeypatch.undo()
    check(make_panel(dim=dim, rows=20, cols=20, blocks=[(0, 1)]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_embeddings_keep_exact_similarities(dtype):
    check(make_panel(dtype=dtype, labels=1, symmetric=True), gradient=1e-2)


def test_bf16_gradient():
    panel = make_panel(labels=1, blocks=[(0, 1)])
    check(panel, bf16=True, gradient=1e-2)
    exact, rounded = kernel_weighted(panel), kernel_weighted(panel, bf16=True)
    assert any((a - b).abs().max() > 1e-4 for a, b in zip(exact, rounded))


def test_gradients_not_wanted():
    panel = make_panel(modalities=3, cols=20)
    grads, every = kernel_weighted(panel, wanted=[1]), kernel_weighted(panel)
    assert grads[0] is None and grads[2] is None
    assert torch.equal(grads[1], every[1])


@pytest.mark.parametrize("programs", [1, 1000])
def test_parts_of_the_columns(programs, monkeypatch):
    monkeypatch.setattr(kernels, "PROGRAMS", programs)
    check(make_panel(labels=1, blocks=[(0, 1)]))


def test_same_bits_each_run():
    panel = make_panel(labels=1, blocks=[(0, 1)])
    assert torch.equal(kernel_sums(panel), kernel_sums(panel))
    for first, second in zip(kernel_weighted(panel), kernel_weighted(panel)):
        assert torch.equal(first, second)


def test_results_are_added():
    panel = make_panel(cols=20)
    once, sums = kernel_weighted(panel), kernel_sums(panel)
    twice, twice_sums = [grad.clone() for grad in once], sums.clone()
    kernels.add_weighted(panel, SCALE, SHIFT, *ratios_of(panel), twice)
    kernels.add_sums(panel, SCALE, SHIFT, twice_sums)
    torch.testing.assert_close(twice, [2 * grad for grad in once])
    torch.testing.assert_close(twice_sums, 2 * sums)


def test_labels_of_any_integer_type():
    panel = make_panel(labels=2, cols=20)
    narrow = SimpleNamespace(**vars(panel))
    narrow.row_labels, narrow.col_labels = (
        [x.to(torch.int32) for x in y] for y in (panel.row_labels, panel.col_labels)
    )
    assert torch.equal(kernel_sums(panel), kernel_sums(narrow))


@pytest.fixture
def kernels_everywhere(monkeypatch):
    """The loss takes CPU tensors to the kernels, too; counts their launches."""
    launched = []
    for name in ("add_sums_by_kernel", "add_weighted_by_kernel"):
        kernel = getattr(logsumexp, name)
        monkeypatch.setattr(logsumexp, name, lambda *a, kernel=kernel, name=name: launched.append(name) or kernel(*a))
    monkeypatch.setattr(logsumexp, "kernels_support", lambda x: x.dtype in kernels.DTYPES)
    return launched


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("loss", ["gcl_loss", "contrastive_loss", "alignclip_loss"])
@pytest.mark.parametrize("dims", [None, [8, 3]])
def test_losses_on_the_kernels(loss, dims, dtype, tolerance, kernels_everywhere):
    embeds = make_panel(rows=21, dim=12, modalities=3, dtype=dtype).rows[: 3 if loss == "gcl_loss" else 2]
    labels = {"ids": torch.arange(21) % 15, "matryoshka_dims": dims}

    def results(module, dtype):
        leaves = [x.to(dtype).requires_grad_() for x in embeds]
        scale = torch.tensor(20.0, requires_grad=True)
        value = getattr(module, loss)(*leaves, scale, **labels)
        return value, torch.autograd.grad(value, (*leaves, scale))

    (got, grads), (exact, exact_grads) = results(loss_module, dtype), results(dense_loss, torch.float64)
    assert set(kernels_everywhere) == {"add_sums_by_kernel", "add_weighted_by_kernel"}
    assert got.dtype == torch.float32 and got.item() == pytest.approx(exact.item(), rel=1e-5)
    for a, b in zip(grads, exact_grads, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


def test_a_fallback_from_half_precision(kernels_everywhere):
    """Where the shift underflows, log-sum-exps are computed by the tiles, in float32."""
    embeds = [x.requires_grad_() for x in make_panel(rows=9, dim=4, modalities=3, dtype=torch.bfloat16).rows]
    loss = loss_module.gcl_loss(*embeds, 3000.0)
    loss.backward()
    assert loss.item() == pytest.approx(dense_loss.gcl_loss(*(x.double() for x in embeds), 3000.0).item(), rel=1e-5)
    assert "add_weighted_by_kernel" not in kernels_everywhere
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in embeds)
