import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from universal_gcl.retrieval.search import exact_top_k


def slow_top_k(queries, candidates, k):
    """Sort all pairs by descending score, then by index, with Python integers."""
    rankings = []
    for query in queries:
        scores = [sum(int(a) * int(b) for a, b in zip(query, row, strict=True)) for row in candidates]
        rankings.append(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:k])
    return rankings


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_equals_a_full_sort_with_ties_for_every_chunk_size(data):
    # with entries of -1, 0 and 1, most scores are tied
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    num_queries, num_candidates, width = (data.draw(st.integers(1, 12)) for _ in range(3))
    k = data.draw(st.integers(1, num_candidates))
    chunk_size = data.draw(st.integers(1, num_candidates + 2))
    queries = rng.integers(-1, 2, (num_queries, width))
    candidates = rng.integers(-1, 2, (num_candidates, width))
    scores, indices = exact_top_k(queries, candidates, k, chunk_size=chunk_size)
    expected = slow_top_k(queries, candidates, k)
    assert indices.tolist() == expected
    assert scores.tolist() == [[float(queries[q] @ candidates[j]) for j in row] for q, row in enumerate(expected)]
    assert scores.dtype == torch.float32 and indices.dtype == torch.int64


@pytest.mark.parametrize("width", [64, 384, 513])
def test_equal_candidates_tie_exactly_wherever_they_stand(width):
    # a float32 matrix product scores these copies differently in the last bit
    torch.manual_seed(0)
    queries = torch.nn.functional.normalize(torch.randn(37, width), dim=1)
    originals = torch.nn.functional.normalize(torch.randn(300, width), dim=1)
    reference = exact_top_k(queries, originals.repeat(7, 1), 21)
    best = exact_top_k(queries, originals, 3)[1]
    expected = (best[:, :, None] + 300 * torch.arange(7)).reshape(37, 21)
    assert torch.equal(reference[1], expected)
    for chunk_size in (2, 7, 1000, 2003):
        scores, indices = exact_top_k(queries, originals.repeat(7, 1), 21, chunk_size=chunk_size)
        assert torch.equal(scores, reference[0]) and torch.equal(indices, reference[1])


def test_scores_are_inner_products_to_float32_accuracy():
    rng = np.random.default_rng(0)
    queries, candidates = rng.normal(size=(20, 96)) * 1e3, rng.normal(size=(500, 96)) * 1e-4
    scores, indices = exact_top_k(queries, candidates, 500, chunk_size=64)
    exact = np.take_along_axis(queries @ candidates.T, indices.numpy(), axis=1)
    assert np.abs(scores.numpy() - exact).max() < 1e-6 * np.abs(exact).max()
    assert (np.diff(scores.numpy(), axis=1) <= 0).all()


def test_reads_float16_candidates_from_a_memory_mapped_file(tmp_path):
    rng = np.random.default_rng(1)
    rows = rng.normal(size=(100, 8)).astype(np.float16)
    rows.tofile(tmp_path / "candidates.bin")
    mapped = np.memmap(tmp_path / "candidates.bin", dtype=np.float16, mode="r", shape=(100, 8))
    queries = rng.normal(size=(5, 8)).astype(np.float32)
    expected = np.argsort(-(queries.astype(np.float64) @ rows.astype(np.float64).T), axis=1)[:, :4]
    assert exact_top_k(queries, mapped, 4, chunk_size=33)[1].tolist() == expected.tolist()


def test_zero_and_negative_zero_tie():
    scores, indices = exact_top_k([[1.0, 0.0]], [[-0.0, 1.0], [0.0, 1.0], [-1.0, 0.0]], 3)
    assert indices.tolist() == [[0, 1, 2]]
    assert scores.tolist() == [[0.0, 0.0, -1.0]]


@pytest.mark.parametrize(
    ("queries", "candidates", "k", "message"),
    [
        (np.zeros((0, 4)), np.zeros((3, 4)), 1, r"there are no queries: their shape is \(0, 4\)"),
        (np.zeros((2, 4)), np.zeros((0, 4)), 1, "there are no candidates"),
        (np.zeros(4), np.zeros((3, 4)), 1, r"queries must be a matrix .* got shape \(4,\)"),
        (np.zeros((2, 4)), np.zeros((3, 5)), 1, "queries have 4 dimensions, candidates 5"),
        (np.zeros((2, 4)), np.zeros((3, 4)), 4, "between 1 and the number of candidates, 3, got 4"),
        (np.zeros((2, 4)), np.zeros((3, 4)), 0, "got 0"),
        (np.full((2, 4), np.nan), np.zeros((3, 4)), 1, "queries row 0 holds NaN"),
    ],
)
def test_bad_input_is_named(queries, candidates, k, message):
    with pytest.raises(ValueError, match=message):
        exact_top_k(queries, candidates, k)


def test_a_broken_candidate_is_named_by_its_place_in_the_whole_set():
    candidates = np.ones((50, 4), dtype=np.float32)
    candidates[37, 2] = np.inf
    with pytest.raises(ValueError, match="candidates row 37 holds NaN or infinite"):
        exact_top_k(np.ones((1, 4)), candidates, 1, chunk_size=10)
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        exact_top_k(np.ones((1, 4)), candidates, 1, chunk_size=0)
