"""The losses in tiles against the dense oracle in float64: values, terms, gradients, precision."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gcl import gcl_loss, tiles
from modeling_gcl import loss as loss_module
from tests.support import dense_loss
from tests.support.dense_loss import random_embeds

SWITCHES = {
    "gcl": ("gcl_loss", {}),
    "without_other_positive": ("gcl_loss", {"denominator": "without_other_positive"}),
    "target": ("gcl_loss", {"denominator": "target"}),
    "no_intra": ("gcl_loss", {"intra_modality": False}),
    "no_intra_without": ("gcl_loss", {"intra_modality": False, "denominator": "without_other_positive"}),
    "weights": ("gcl_loss", {"direction_weights": {"i→t": 0.0, "t→i": 0.25, "it→t": 3.0}}),
    "cl": ("contrastive_loss", {}),
    "alignclip": ("alignclip_loss", {"separation_weight": 0.7}),
    "alignclip_semantic": ("alignclip_loss", {"semantic_embeds": True}),
}


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles so small that a few dozen pairs fill several, the last one cut short."""
    monkeypatch.setitem(tiles.TILE, "cpu", 16)


def results(module, switch, embeds, scale, **more):
    """(loss, terms, gradients of the embeddings and of the scale)."""
    name, options = SWITCHES[switch]
    if options.get("semantic_embeds"):
        options = options | {"semantic_embeds": random_embeds(len(embeds[0]), 5, seed=99)[0]}
    leaves = [x.clone().requires_grad_() for x in embeds[: 3 if name == "gcl_loss" else 2]]
    s = torch.tensor(scale, dtype=embeds[0].dtype, requires_grad=True)
    loss, terms = getattr(module, name)(*leaves, s, return_terms=True, **options, **more)
    return loss, terms, torch.autograd.grad(loss, [*leaves, s])


def tiled_and_dense(*arguments, **more):
    return results(loss_module, *arguments, **more), results(dense_loss, *arguments, **more)


def assert_same(tiled, dense, tolerance=1e-12):
    assert tiled[1].keys() == dense[1].keys()
    for a, b in zip((tiled[0], *tiled[2]), (dense[0], *dense[2])):
        torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)
    for direction, term in tiled[1].items():
        torch.testing.assert_close(term, dense[1][direction], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("n", [1, 2, 16, 53])
def test_tiles_equal_dense(switch, n, small_tiles):
    assert_same(*tiled_and_dense(switch, random_embeds(n, 6), 20.0))


@pytest.mark.parametrize("switch", SWITCHES)
def test_tiles_equal_dense_with_false_negatives(switch, small_tiles):
    generator = torch.Generator().manual_seed(1)
    ids, captions = torch.randint(0, 30, (53,), generator=generator), torch.randint(0, 40, (53,), generator=generator)
    embeds = random_embeds(53, 6)
    for labels in ({"ids": ids}, {"caption_ids": captions}, {"ids": ids, "caption_ids": captions}):
        assert_same(*tiled_and_dense(switch, embeds, 20.0, **labels))
    assert_same(*tiled_and_dense(switch, embeds, 20.0, ids=torch.zeros(53)))  # no negatives at all
    plain = results(loss_module, switch, embeds, 20.0)
    assert torch.equal(results(loss_module, switch, embeds, 20.0, ids=torch.arange(53))[0], plain[0])


@settings(max_examples=30, deadline=None)
@given(
    switch=st.sampled_from(list(SWITCHES)),
    n=st.integers(1, 24),
    d=st.integers(1, 5),
    scale=st.sampled_from([0.01, 1.0, 14.3, 100.0]),
    seed=st.integers(0, 10**6),
    num_ids=st.one_of(st.none(), st.integers(1, 60)),
    tile=st.sampled_from([4, 9, 16]),
)
def test_tiles_equal_dense_for_anything(switch, n, d, scale, seed, num_ids, tile):
    more = {} if num_ids is None else {"ids": torch.arange(n) * 7 % num_ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.TILE, "cpu", tile)
        assert_same(*tiled_and_dense(switch, random_embeds(n, d, seed), scale, **more), 1e-11)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("case", ["opposite", "orthogonal", "duplicates", "one_far_row"])
def test_extreme_rows_at_the_lowest_temperature(switch, dtype, tolerance, case, small_tiles):
    n = 20
    embeds = random_embeds(n, 24)
    if case == "opposite":  # similarity -1 to every image; float32's shift underflows
        embeds[0][:] = embeds[0][:1]
        embeds[1][:] = -embeds[0]
        embeds[2][:] = embeds[0]
    elif case == "orthogonal":
        embeds = [torch.eye(60, dtype=torch.float64)[k * n : (k + 1) * n] for k in range(3)]
    elif case == "duplicates":
        embeds = [x[torch.arange(n) // 2] for x in embeds]
    else:
        common = embeds[0][:1]
        embeds = [F.normalize(0.1 * x + common, dim=-1) for x in embeds]
        embeds[0][3] = -common
    tiled = results(loss_module, switch, [x.to(dtype) for x in embeds], 100.0)
    dense = results(dense_loss, switch, [x.to(dtype).double() for x in embeds], 100.0)
    tiled = tiled[0].double(), {k: v.double() for k, v in tiled[1].items()}, [g.double() for g in tiled[2]]
    assert_same(tiled, dense, tolerance)


@pytest.mark.parametrize("switch", SWITCHES)
def test_gradcheck(switch, small_tiles):
    name, options = SWITCHES[switch]
    options = {k: v for k, v in options.items() if k != "semantic_embeds"}
    if name == "alignclip_loss":  # by default C follows the text embeddings but lends them no gradient
        options["semantic_embeds"] = random_embeds(18, 3, seed=5)[2]
    embeds = [x.requires_grad_() for x in random_embeds(18, 3)][: 3 if name == "gcl_loss" else 2]
    scale = torch.tensor(9.0, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(18) % 15
    loss_of = getattr(loss_module, name)
    torch.autograd.gradcheck(lambda *x: loss_of(*x, ids=ids, **options), (*embeds, scale), fast_mode=True)


@pytest.mark.parametrize("scale", [14.3, 100.0])
def test_float32_stays_close_to_float64(scale):
    """One cone-shaped set, as encoders give it, over several full tiles."""
    generator = torch.Generator().manual_seed(0)
    common = torch.randn(1, 64, generator=generator)
    embeds = [F.normalize(torch.randn(1100, 64, generator=generator) + common, dim=-1) for _ in range(3)]
    tiled = results(loss_module, "gcl", embeds, scale)
    dense = results(dense_loss, "gcl", [x.double() for x in embeds], scale)
    assert tiled[0].item() == pytest.approx(dense[0].item(), rel=1e-6)
    for a, b in zip(tiled[2], dense[2]):
        assert ((a.double() - b).norm() / b.norm()).item() < 1e-5


@pytest.mark.parametrize("switch", ["gcl", "target", "alignclip_semantic"])
def test_cache_changes_nothing_and_bf16_little(switch, small_tiles):
    embeds = random_embeds(53, 6, dtype=torch.float32)
    plain = results(loss_module, switch, embeds, 20.0)
    for cache_bytes in (5000, 10**6):
        cached = results(loss_module, switch, embeds, 20.0, cache_bytes=cache_bytes)
        assert_same(cached, plain, 1e-6)
    for cache_bytes in (0, 5000, 10**6):
        rounded = results(loss_module, switch, embeds, 20.0, bf16=True, cache_bytes=cache_bytes)
        assert torch.equal(rounded[0], plain[0])
        for a, b in zip(rounded[2], plain[2]):
            assert 0 < (a - b).norm() / b.norm() < 0.01


def test_cached_tiles_serve_a_second_backward():
    embeds = [x.requires_grad_() for x in random_embeds(9, 4)]
    loss = gcl_loss(*embeds, 20.0, cache_bytes=10**6)
    first = torch.autograd.grad(loss, embeds, retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, embeds)):
        assert torch.equal(a, b)


@pytest.mark.parametrize("live", [(0,), (1, 2), (3,), (0, 3)])
def test_frozen_arguments(live):
    """Only what needs a gradient gets one, and it is the same; index 3 is the scale."""
    arguments = [*random_embeds(9, 4), torch.tensor(20.0, dtype=torch.float64)]
    everything = [x.clone().requires_grad_() for x in arguments]
    expected = torch.autograd.grad(gcl_loss(*everything), everything)
    some = [x.clone().requires_grad_(k in live) for k, x in enumerate(arguments)]
    got = torch.autograd.grad(gcl_loss(*some), [some[k] for k in live])
    for k, gradient in zip(live, got):
        torch.testing.assert_close(gradient, expected[k], atol=1e-14, rtol=1e-12)


def test_backward_under_autocast_and_half_precision_inputs():
    embeds = [x.requires_grad_() for x in random_embeds(16, 8, dtype=torch.float32)]
    expected = torch.autograd.grad(gcl_loss(*embeds, 100.0), embeds)
    with torch.autocast("cpu", torch.bfloat16):
        got = torch.autograd.grad(gcl_loss(*embeds, 100.0), embeds)
    for a, b in zip(got, expected):
        assert torch.equal(a, b)
    halves = [x.detach().bfloat16().requires_grad_() for x in embeds]
    gcl_loss(*halves, torch.tensor(100.0)).backward()
    assert all(x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() for x in halves)


def test_unit_rows_rounded_to_bfloat16_are_accepted():
    generator = torch.Generator().manual_seed(0)
    embeds = [F.normalize(torch.randn(500, 512, generator=generator).bfloat16(), dim=-1) for _ in range(3)]
    assert gcl_loss(*embeds, 20.0).isfinite() and gcl_loss(*(x.float() for x in embeds), 20.0).isfinite()
