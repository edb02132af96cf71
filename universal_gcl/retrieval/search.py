"""Exact nearest-neighbour search by inner product.

- The candidates are read in chunks, so they may be a memory-mapped file larger than memory.
- The result does not depend on `chunk_size`, the number of threads or the device. A plain float32 matrix product lacks
  this property: the scores of equal candidates can differ in the last bit, depending on their position.
- Candidates with equal scores are ranked by their index, the lower one first, also across chunks.
"""

from typing import Protocol

import numpy as np
import torch

_SCORE_BLOCK = 1 << 24  # scores computed at once (queries × candidates of a chunk): 128 MiB in float64
_INDEX_MASK = (1 << 32) - 1


class Matrix(Protocol):
    """A matrix that can be sliced by rows: a tensor, an array, `np.memmap`, or `retrieval.store.Vectors`."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def __getitem__(self, index, /): ...


def exact_top_k(
    queries: Matrix, candidates: Matrix, k: int, *, chunk_size: int = 65536
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Find the `k` candidates with the highest inner product for each query.

    Each vector is rounded to 26 bits below a bound of its norm (float32 has 24 bits). Then every partial sum of the
    product of two vectors fits into the 53 bits of float64, so that the order of summation can't change the result. The
    sum is rounded to float32.

    Args:
        queries: (Q, D) array or tensor. The search runs on the device of the queries.
        candidates: (C, D) array or tensor, or anything else that can be sliced, such as a `np.memmap` in float16.
        k: number of candidates for each query, 1 <= k <= C.
        chunk_size: number of candidates compared at once. It affects memory use, not the result.

    Returns:
        Scores (Q, k) float32, the best first, and indices (Q, k) int64. Equal scores are in the order of their indices.

    Raises:
        ValueError: a shape or size is wrong, there are no queries or candidates, or there are NaN or infinite numbers
            (the message names the row).
    """
    queries, candidates = check_inputs(queries, candidates, k, chunk_size)
    count = candidates.shape[0]
    queries = on_grid(queries, "queries", 0)
    best = torch.empty((queries.shape[0], 0), dtype=torch.int64, device=queries.device)
    for start in range(0, count, chunk_size):
        chunk = on_grid(as_tensor(candidates[start : start + chunk_size]).to(queries.device), "candidates", start)
        best = torch.cat([best, top_keys(queries, chunk, start, k)], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return scores_and_indices(best)


def check_inputs(queries: Matrix, candidates: Matrix, k: int, chunk_size: int) -> tuple[torch.Tensor, Matrix]:
    """Check the arguments of `exact_top_k`, and return the queries as a tensor and the candidates with a shape.

    Raises:
        ValueError: see `exact_top_k`. This does not look for NaN and infinite numbers.
    """
    queries = as_tensor(queries)
    candidates = candidates if hasattr(candidates, "shape") else np.asarray(candidates)
    for name, matrix in (("queries", queries), ("candidates", candidates)):
        if len(matrix.shape) != 2:
            raise ValueError(f"{name} must be a matrix with one embedding per row, got shape {tuple(matrix.shape)}")
        if matrix.shape[0] == 0 or matrix.shape[1] == 0:
            raise ValueError(f"there are no {name}: their shape is {tuple(matrix.shape)}")
    if queries.shape[1] != candidates.shape[1]:
        raise ValueError(
            f"queries have {queries.shape[1]} dimensions, candidates {candidates.shape[1]}: embed both with one model"
        )
    count = candidates.shape[0]
    if not 1 <= k <= count:
        raise ValueError(f"k must be between 1 and the number of candidates, {count}, got {k}")
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    if count > _INDEX_MASK:
        raise ValueError(f"there are {count} candidates, more than the {_INDEX_MASK} that can be indexed")
    return queries, candidates


def as_tensor(matrix: Matrix) -> torch.Tensor:
    """A matrix as a tensor without a gradient. Arrays are copied: torch warns about memory-mapped files (read-only)."""
    return matrix.detach() if isinstance(matrix, torch.Tensor) else torch.from_numpy(np.array(matrix))


def on_grid(matrix: torch.Tensor, name: str, start: int) -> torch.Tensor:
    """
    Round each row to multiples of 2^-26 times a power of two that is greater than its norm.

    Args:
        matrix: (n, D).
        name: "queries" or "candidates", for the error message.
        start: the index of the first row, for the error message.

    Returns:
        (n, D) float64.

    Raises:
        ValueError: a row has NaN or infinite numbers.
    """
    matrix = matrix.to(torch.float64)
    broken = ~torch.isfinite(matrix).all(dim=1)
    if broken.any():
        row = start + int(broken.nonzero()[0])
        raise ValueError(
            f"{name} row {row} holds NaN or infinite numbers ({int(broken.sum())} such rows in this chunk)"
        )
    # the norm itself could be rounded differently depending on the row's position; the largest entry can't
    exponent = torch.frexp(matrix.abs().amax(dim=1, keepdim=True) * matrix.shape[1] ** 0.5).exponent
    return torch.ldexp(torch.round(torch.ldexp(matrix, 26 - exponent)), exponent - 26)


def top_keys(queries: torch.Tensor, chunk: torch.Tensor, start: int, k: int) -> torch.Tensor:
    """
    The keys of the best candidates of a chunk. A key is an int64 that sorts by score, then by index, the lower first.

    Args:
        queries: (Q, D) from `on_grid`.
        chunk: (n, D) candidates from `on_grid`.
        start: the index of the first candidate.

    Returns:
        (Q, min(k, n)) int64.
    """
    block = max(1, _SCORE_BLOCK // len(chunk))
    return torch.cat([_top_of_scores(part @ chunk.T, start, min(k, len(chunk))) for part in queries.split(block)])


def _top_of_scores(scores: torch.Tensor, start: int, k: int) -> torch.Tensor:
    scores = scores.to(torch.float32)
    top, columns = scores.topk(k, dim=1)
    keys = keys_of(top, columns + start).sort(dim=1, descending=True).values
    # of several scores equal to the k-th, torch.topk takes any: in such rows, take the best by key
    tied = (scores >= top[:, -1:]).sum(dim=1) > k
    if tied.any():
        columns = torch.arange(start, start + scores.shape[1], device=scores.device)
        keys[tied] = keys_of(scores[tied], columns).topk(k, dim=1).values
    return keys


def keys_of(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """int64 keys of float32 scores and candidates' indices, the score in the high half and the index in the low."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # adding 0.0 turns -0.0 into 0.0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) + (_INDEX_MASK - indices)


def scores_and_indices(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 scores and int64 indices from which `keys_of` made the keys."""
    ordered = keys >> 32
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32).view(torch.float32)
    return scores, _INDEX_MASK - (keys & _INDEX_MASK)
