"""The losses over embeddings cut to several dimensions against separate dense losses of each, in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gcl import alignclip_loss, contrastive_loss, gcl_loss, tiles
from modeling_gcl import loss as loss_module
from tests.modeling_gcl.test_tiled_loss import SWITCHES, assert_same, results, tiled_and_dense
from tests.support import dense_loss
from tests.support.dense_loss import random_embeds

DIMS = {
    "halves": {"matryoshka_dims": [12, 6, 3]},
    "without the whole": {"matryoshka_dims": [5]},
    "weighted, in any order": {"matryoshka_dims": [2, 12, 7], "matryoshka_weights": [0.5, 3.0, 1.0]},
    "one entry": {"matryoshka_dims": (1, 11)},
    "the whole": {"matryoshka_dims": [12]},
}


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setitem(tiles.TILE, "cpu", 16)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dims", DIMS)
def test_equals_dense_losses_of_each_cut(switch, dims):
    embeds = random_embeds(37, 12)
    assert_same(*tiled_and_dense(switch, embeds, 20.0, **DIMS[dims]))
    labels = {"ids": torch.arange(37) * 7 % 31, "caption_ids": torch.arange(37) % 30}
    assert_same(*tiled_and_dense(switch, embeds, 20.0, **labels, **DIMS[dims]))


@settings(max_examples=30, deadline=None)
@given(
    switch=st.sampled_from(list(SWITCHES)),
    n=st.integers(1, 24),
    d=st.integers(1, 7),
    data=st.data(),
    scale=st.sampled_from([0.01, 1.0, 14.3, 100.0]),
    seed=st.integers(0, 10**6),
    num_ids=st.one_of(st.none(), st.integers(1, 60)),
    tile=st.sampled_from([4, 9, 16]),
)
def test_equals_dense_for_anything(switch, n, d, data, scale, seed, num_ids, tile):
    dims = data.draw(st.lists(st.integers(1, d), min_size=1, unique=True))
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(dims), max_size=len(dims)))
    more = {} if num_ids is None else {"ids": torch.arange(n) * 7 % num_ids}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiles.TILE, "cpu", tile)
        more |= {"matryoshka_dims": dims, "matryoshka_weights": weights}
        assert_same(*tiled_and_dense(switch, random_embeds(n, d, seed), scale, **more), 1e-9)


@pytest.mark.parametrize("switch", SWITCHES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-10), (torch.float32, 2e-3)])
def test_rows_whose_shift_underflows(switch, dtype, tolerance):
    """Image and fused embeddings opposite to all texts, at a temperature that no shift can bridge."""
    embeds = random_embeds(20, 12)
    embeds[0][:] = embeds[2][:] = embeds[0][:1]
    embeds[1][:] = -embeds[0]
    more = {"matryoshka_dims": [6, 3]}
    tiled = results(loss_module, switch, [x.to(dtype) for x in embeds], 600.0, **more)
    dense = results(dense_loss, switch, [x.to(dtype).double() for x in embeds], 600.0, **more)
    tiled = tiled[0].double(), {k: v.double() for k, v in tiled[1].items()}, [g.double() for g in tiled[2]]
    assert_same(tiled, dense, tolerance)


def test_the_whole_alone_is_the_plain_loss():
    embeds = random_embeds(37, 12, dtype=torch.float32)
    (loss, _, gradients), plain = (
        results(loss_module, "gcl", embeds, 20.0, **more) for more in ({"matryoshka_dims": [12]}, {})
    )
    assert torch.equal(loss, plain[0])
    assert all(torch.equal(a, b) for a, b in zip(gradients, plain[2]))


def test_terms_make_up_the_loss():
    embeds = random_embeds(9, 12)
    loss, terms = gcl_loss(*embeds, 20.0, matryoshka_dims=[3, 6], matryoshka_weights=[1, 2], return_terms=True)
    assert list(terms) == [*dense_loss.DIRECTIONS, "dim_12", "dim_6", "dim_3"]
    assert loss.item() == pytest.approx(sum(terms[d].item() for d in dense_loss.DIRECTIONS) / 6)
    assert loss.item() == pytest.approx((terms["dim_3"] + 2 * terms["dim_6"] + terms["dim_12"]).item() / 4)
    cut = [F.normalize(x[:, :3], dim=-1) for x in embeds]
    assert terms["dim_3"].item() == pytest.approx(gcl_loss(*cut, 20.0).item())


@pytest.mark.parametrize("live", [(0,), (1, 2), (3,), (0, 3)])
def test_frozen_arguments(live):
    arguments = [*random_embeds(9, 12), torch.tensor(20.0, dtype=torch.float64)]
    everything = [x.clone().requires_grad_() for x in arguments]
    expected = torch.autograd.grad(gcl_loss(*everything, matryoshka_dims=[5, 2]), everything)
    some = [x.clone().requires_grad_(k in live) for k, x in enumerate(arguments)]
    got = torch.autograd.grad(gcl_loss(*some, matryoshka_dims=[5, 2]), [some[k] for k in live])
    for k, gradient in zip(live, got):
        torch.testing.assert_close(gradient, expected[k], atol=1e-14, rtol=1e-12)


def test_half_precision_autocast_and_bf16_products():
    embeds = random_embeds(53, 12, dtype=torch.float32)
    more = {"matryoshka_dims": [6, 3]}
    plain = results(loss_module, "gcl", embeds, 20.0, **more)
    with torch.autocast("cpu", torch.bfloat16):
        inside = results(loss_module, "gcl", embeds, 20.0, **more)
    assert torch.equal(inside[0], plain[0]) and all(map(torch.equal, inside[2], plain[2]))
    rounded = results(loss_module, "gcl", embeds, 20.0, bf16=True, **more)
    assert torch.equal(rounded[0], plain[0])
    for a, b in zip(rounded[2][:3], plain[2]):
        assert 0 < (a - b).norm() / b.norm() < 0.02
    cached = results(loss_module, "gcl", embeds, 20.0, cache_bytes=10**6, **more)
    assert_same(cached, plain, 1e-6)
    halves = [x.bfloat16() for x in embeds]
    loss = gcl_loss(*halves, torch.tensor(20.0), **more)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(gcl_loss(*(x.double() for x in halves), 20.0, **more).item(), rel=1e-5)


@pytest.mark.parametrize(
    "dims, weights, message",
    [
        ([16], None, "matryoshka_dims holds 16: use whole numbers from 1 to the embeddings' 12"),
        ([0, 12], None, "matryoshka_dims holds 0"),
        ([6.0], None, "matryoshka_dims holds 6.0"),
        ([True], None, "matryoshka_dims holds True"),
        ([6, 6], None, "names a dimension twice"),
        ([6, 3], [1.0], "one for each of matryoshka_dims"),
        ([6, 3], [1.0, 0.0], "finite and positive"),
        ([6], [float("nan")], "finite and positive"),
        (None, [1.0], "matryoshka_dims, which are not given"),
    ],
)
def test_bad_dims_are_named(dims, weights, message):
    embeds = random_embeds(4, 12)
    more = {"matryoshka_dims": dims, "matryoshka_weights": weights}
    for loss_of, num in ((gcl_loss, 3), (contrastive_loss, 2), (alignclip_loss, 2)):
        with pytest.raises(ValueError, match=message):
            loss_of(*embeds[:num], 20.0, **more)


def test_a_row_that_is_zero_once_cut_is_named():
    embeds = random_embeds(4, 12)
    embeds[1][2, :6] = 0
    embeds[1] = F.normalize(embeds[1], dim=-1)
    with pytest.raises(ValueError, match="text_embeds can't be cut to 6 dimensions: the norm of row 2 is 0 there"):
        gcl_loss(*embeds, 20.0, matryoshka_dims=[8, 6])
    assert gcl_loss(*embeds, 20.0, matryoshka_dims=[8]).isfinite()
