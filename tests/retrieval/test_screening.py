"""Screened search equals exact search bit for bit on all kinds of pools, and it does discard candidates."""

import threading

import faiss
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from universal_gcl.retrieval import quantised, screening
from universal_gcl.retrieval.quantised import SavedCodes, StreamedCodes
from universal_gcl.retrieval.screening import screened_top_k
from universal_gcl.retrieval.search import exact_top_k


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Smaller limits, so that a thousand candidates are a large pool with several blocks."""
    monkeypatch.setattr(screening, "_MIN_CANDIDATES", 0)
    monkeypatch.setattr(screening, "_MIN_SAMPLE", 64)
    monkeypatch.setattr(quantised, "_SAMPLE", 64)
    monkeypatch.setattr(quantised, "_SAMPLE_RUNS", 16)
    monkeypatch.setattr(quantised, "_ROWS_AT_ONCE", 50)
    monkeypatch.setattr(screening, "_BLOCK_QUERIES", 7)
    monkeypatch.setattr(screening, "_BLOCK_PRODUCTS", {"cpu": 1500})
    monkeypatch.setattr(screening, "_ROWS_AT_ONCE", 50)
    monkeypatch.setattr(screening, "_QUERIES_AT_ONCE", 11)


def sphere(rng, n, dim):
    return F.normalize(torch.from_numpy(rng.normal(size=(n, dim))), dim=1).float()


def cone(rng, n, dim):
    """Like the embeddings of one tower: the cosine of two vectors is about 0.9."""
    return F.normalize(torch.ones(dim) / dim**0.5 + 0.3 * sphere(rng, n, dim), dim=1)


def needle(rng, n, dim):
    """The cosine of two vectors is about 0.99999, which float32 can hardly resolve."""
    return F.normalize(torch.ones(dim) / dim**0.5 + 0.003 * sphere(rng, n, dim), dim=1)


def duplicates(rng, n, dim):
    return sphere(rng, max(1, n // 9), dim)[torch.from_numpy(rng.integers(0, max(1, n // 9), n))]


def all_equal(rng, n, dim):
    return sphere(rng, 1, dim).expand(n, -1).clone()


def integers(rng, n, dim):
    """Most scores are tied, and some vectors are zero."""
    return torch.from_numpy(rng.integers(-1, 2, (n, dim))).float()


def uneven(rng, n, dim):
    """Only a few dimensions vary."""
    return sphere(rng, n, dim) * torch.logspace(0, -6, dim)


def outlier(rng, n, dim):
    rows = sphere(rng, n, dim)
    rows[n // 2] *= 1e4
    return rows


def zeros(rng, n, dim):
    rows = sphere(rng, n, dim)
    rows[torch.from_numpy(rng.random(n) < 0.5)] = 0
    return rows


def sorted_by_score(rng, n, dim):
    """The worst candidates come first, so that the first bounds are loose."""
    rows = sphere(rng, n, dim)
    return rows[(rows @ torch.ones(dim)).argsort()]


def extremes(rng, n, dim):
    return sphere(rng, n, dim) * torch.from_numpy(10.0 ** rng.integers(-20, 15, (n, 1))).float()


POOLS = (sphere, cone, needle, duplicates, all_equal, integers, uneven, outlier, zeros, sorted_by_score, extremes)


def kept(candidates):
    pool = StreamedCodes(candidates)
    codes, lengths = pool.part(0, len(candidates))
    return SavedCodes(codes, lengths, pool.mean, pool.scale)


def assert_equal(queries, candidates, k, **options):
    """Checks a search that computes the codes, and one with codes computed before."""
    expected = exact_top_k(queries, candidates, k)
    for pool in (None, kept(candidates)):
        found = screened_top_k(queries, candidates, k, codes=pool, **options)
        assert torch.equal(found[1], expected[1]) and torch.equal(found[0], expected[0])
        assert found[0].dtype == torch.float32 and found[1].dtype == torch.int64


@settings(max_examples=12, deadline=None)
@given(st.data())
@pytest.mark.parametrize("pool", POOLS)
def test_equals_the_exact_search(pool, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    count, num_queries, dim = (
        data.draw(st.integers(130, 900)),
        data.draw(st.integers(1, 25)),
        data.draw(st.integers(1, 40)),
    )
    k = data.draw(st.sampled_from((1, 2, 5)))
    rows = pool(rng, count + num_queries, dim)
    if data.draw(st.booleans()):
        rows = rows.half().float() if rows.abs().max() < 6e4 else rows
    queries, candidates = rows[count:], rows[:count]
    if data.draw(st.booleans()):
        queries = candidates[
            torch.from_numpy(rng.integers(0, count, num_queries))
        ]  # each query finds itself, as in i→i
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from((1, 3))))
    assert_equal(queries, candidates, k, chunk_size=data.draw(st.integers(1, count + 2)))
    torch.set_num_threads(threads)


@pytest.mark.parametrize("k", [1, 7, 299, 300])
def test_pools_too_small_to_be_sampled_and_k_up_to_all(k):
    rng = np.random.default_rng(k)
    assert_equal(sphere(rng, 9, 24), sphere(rng, 300, 24), k)


def test_float64_and_half_precision_arrays_and_memory_maps(tmp_path):
    rng = np.random.default_rng(0)
    rows, queries = rng.normal(size=(800, 33)), rng.normal(size=(20, 33))
    assert_equal(queries, rows, 3)
    np.save(tmp_path / "rows.npy", rows.astype(np.float16))
    assert_equal(queries, np.load(tmp_path / "rows.npy", mmap_mode="r"), 3, chunk_size=128)
    assert_equal(queries.astype(np.float32), torch.from_numpy(rows).to(torch.bfloat16), 3)


def test_threads_are_torchs_and_given_back():
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        seen, chunk = set(), screening._Screen.chunk
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(
                screening._Screen, "chunk",
                lambda *args: seen.add((threading.get_ident(), torch.get_num_threads())) or chunk(*args),
            )  # fmt: skip
            assert_equal(sphere(rng, 9, 24), sphere(rng, 3000, 24), 5, chunk_size=100)
        main = (threading.get_ident(), 3)  # samples
        assert main in seen and {number for _, number in seen - {main}} == {1}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_few_candidates_are_scored_exactly(monkeypatch):
    """Without this test, a screen that discards nothing would pass all tests above."""
    scored, whole = [], []
    keys_of, add_all = screening.keys_of, screening._Results.add_all
    monkeypatch.setattr(screening, "keys_of", lambda *args: scored.append(len(args[1])) or keys_of(*args))
    monkeypatch.setattr(screening._Results, "add_all", lambda *args: whole.append(args) or add_all(*args))
    rng, threads = np.random.default_rng(0), torch.get_num_threads()
    torch.set_num_threads(1)  # with more threads, each one finds its own k best first
    for pool in (sphere, cone, uneven):
        queries, candidates = pool(rng, 30, 64), pool(rng, 4000, 64)
        assert_equal(queries, candidates, 5, chunk_size=1000)
        assert 2 * 30 * 5 <= sum(scored) < 2 * 30 * 6, pool.__name__
        scored.clear()
    torch.set_num_threads(threads)
    assert not whole


def test_what_is_pending_is_score_pendingd_before_it_grows(monkeypatch):
    settled = []
    settle = screening._Results._score_pending
    monkeypatch.setattr(
        screening._Results, "_score_pending", lambda self: settled.append(self.num_pending) or settle(self)
    )
    monkeypatch.setattr(screening, "_MAX_PENDING", -60)
    rng = np.random.default_rng(0)
    queries = 0.1 * sphere(rng, 10, 16) + torch.ones(16)  # the pool is sorted for all queries
    assert_equal(queries, sorted_by_score(rng, 3000, 16), 20, chunk_size=200)
    assert len(settled) > 2


def test_broken_input_is_named_as_in_the_exact_search():
    rows = np.random.default_rng(0).normal(size=(700, 8)).astype(np.float32)
    with pytest.raises(ValueError, match="queries have 5 dimensions, candidates 8"):
        screened_top_k(np.zeros((2, 5)), rows, 1)
    broken = rows[:30].copy()
    broken[17] = np.nan
    with pytest.raises(ValueError, match="queries row 17 holds NaN"):
        screened_top_k(broken, rows, 1)
    for value in (np.inf, -np.inf, np.nan):
        broken = rows.copy()
        broken[333, 3] = value
        with pytest.raises(ValueError, match="candidates row 333 holds NaN or infinite"):
            screened_top_k(rows[:4], broken, 1, chunk_size=100)
        with pytest.raises(ValueError, match="candidates row 333 holds NaN or infinite"):
            screened_top_k(rows[:4], broken, 1, codes=kept(broken), chunk_size=100)


def test_faiss_finds_the_same():
    rng = np.random.default_rng(3)
    queries, candidates = sphere(rng, 50, 96).numpy(), sphere(rng, 6000, 96).numpy()
    index = faiss.IndexFlatIP(96)
    index.add(candidates)
    expected_scores, expected = index.search(queries, 10)
    scores, found = screened_top_k(queries, candidates, 10)
    assert np.abs(scores.numpy() - expected_scores).max() < 1e-6
    # they may differ only where float32 can't resolve two neighbours
    assert (found.numpy() != expected).mean() < 0.01
