"""Mixing: proportions, and every pair once before any comes again."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from universal_gcl.training.mixing import draws_per_epoch, epoch_plan, mixing_shares

sizes = st.lists(st.integers(1, 40), min_size=1, max_size=4)


def test_shares_by_hand():
    np.testing.assert_allclose(mixing_shares([900, 100], None, 0.5), [0.75, 0.25])
    np.testing.assert_allclose(mixing_shares([900, 100], None, 1.0), [0.9, 0.1])
    np.testing.assert_allclose(mixing_shares([900, 100], None, 0.0), [0.5, 0.5])
    np.testing.assert_allclose(mixing_shares([900, 100], [1, 3], 1.0), [0.25, 0.75], err_msg="weights win")


def test_draws_by_hand():
    assert draws_per_epoch(np.array([0.5, 0.25, 0.25]), 10).tolist() == [5, 3, 2]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6), st.integers(1, 10_000))
def test_draws_follow_the_weights(weights, total):
    shares = mixing_shares([1] * len(weights), weights, None)
    draws = draws_per_epoch(shares, total)
    assert draws.sum() == total
    assert np.all(np.abs(draws - shares * total) < 1)


@settings(max_examples=100, deadline=None)
@given(sizes, st.data())
def test_no_pair_repeats_before_its_source_is_through(sizes, data):
    draws = data.draw(st.lists(st.integers(1, 60), min_size=len(sizes), max_size=len(sizes)))
    seen = [[] for _ in sizes]
    for epoch in range(4):
        sources, rows = epoch_plan(sizes, draws, seed=5, epoch=epoch)
        assert len(sources) == len(rows) == sum(draws)
        for source, count in enumerate(draws):
            assert (sources == source).sum() == count
            seen[source] += rows[sources == source].tolist()
    for size, rows in zip(sizes, seen):
        for start in range(0, len(rows) - size + 1, size):
            assert sorted(rows[start : start + size]) == list(range(size))


def test_the_order_depends_on_seed_and_epoch():
    plans = {(seed, epoch): tuple(epoch_plan([50], [50], seed, epoch)[1]) for seed in (0, 1) for epoch in (0, 1)}
    assert len(set(plans.values())) == 4
    assert tuple(epoch_plan([50], [50], 1, 1)[1]) == plans[1, 1]
