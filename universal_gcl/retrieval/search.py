"""Exact nearest-neighbour search by inner product.

- The candidates are streamed in chunks, so they may be a memory-mapped file larger than memory.
- The result depends neither on `chunk_size`, nor on threads, nor on the device. A plain float32 matrix product does not
  have this property: it gives equal candidates scores that differ in the last bit, depending on where they stand.
- Equal scores are ranked by the lower candidate index, also across chunks.
"""

import numpy as np
import torch

_SCORE_BLOCK = 1 << 24  # scores held at once (queries x candidates of a chunk): 128 MiB in float64
_INDEX_MASK = (1 << 32) - 1


def exact_top_k(queries, candidates, k: int, *, chunk_size: int = 65536) -> tuple[torch.Tensor, torch.Tensor]:
    """The `k` candidates of highest inner product for each query, best first.

    Args:
        queries: (Q, D) array or tensor of finite numbers. The search runs on its device.
        candidates: (C, D) array or tensor; anything that can be sliced, such as `np.memmap` (float16 shards included).
        k: how many to return for each query, 1 <= k <= C.
        chunk_size: candidates compared at once. Changes memory use, never the result.

    Returns:
        scores (Q, k) float32 and indices (Q, k) int64. Equal scores come in the order of their index.

    Raises:
        ValueError: a wrong shape or size, no queries or candidates, NaN or infinite numbers (the row is named).

    Each vector is rounded to 26 bits below a bound of its norm (a float32 has 24), so that every partial sum of a
    product of two vectors fits the 53 bits of a float64 and no order of summation can change it; the sum is then
    rounded to float32.
    """
    queries, candidates = checked(queries, candidates, k, chunk_size)
    count = candidates.shape[0]
    queries = on_grid(queries, "queries", 0)
    best = torch.empty((queries.shape[0], 0), dtype=torch.int64, device=queries.device)
    for start in range(0, count, chunk_size):
        chunk = on_grid(as_tensor(candidates[start : start + chunk_size]).to(queries.device), "candidates", start)
        best = torch.cat([best, top_keys(queries, chunk, start, k)], dim=1)
        best = best.topk(min(k, best.shape[1]), dim=1).values
    return scores_and_indices(best)


def checked(queries, candidates, k: int, chunk_size: int) -> tuple:
    """The queries as a tensor and the candidates as something with a shape; raises what `exact_top_k` does."""
    queries = as_tensor(queries)
    candidates = candidates if hasattr(candidates, "shape") else np.asarray(candidates)
    for name, matrix in (("queries", queries), ("candidates", candidates)):
        if len(matrix.shape) != 2:
            raise ValueError(f"{name} must be a matrix with one embedding a row, got shape {tuple(matrix.shape)}")
        if matrix.shape[0] == 0 or matrix.shape[1] == 0:
            raise ValueError(f"{name} are empty: shape {tuple(matrix.shape)}")
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
        raise ValueError(f"{count} candidates are more than the {_INDEX_MASK} that can be indexed")
    return queries, candidates


def as_tensor(matrix) -> torch.Tensor:
    """Without a gradient; an array is copied, since torch warns about the read-only pages of a memory-mapped file."""
    return matrix.detach() if isinstance(matrix, torch.Tensor) else torch.from_numpy(np.array(matrix))


def on_grid(matrix: torch.Tensor, name: str, start: int) -> torch.Tensor:
    """The rows as float64, rounded to multiples of 2^-26 times a power of two above their norm."""
    matrix = matrix.to(torch.float64)
    broken = ~torch.isfinite(matrix).all(dim=1)
    if broken.any():
        row = start + int(broken.nonzero()[0])
        raise ValueError(f"{name} row {row} holds NaN or infinite numbers ({int(broken.sum())} such rows here)")
    # a sum of squares could round differently with the row's place: the bound of the largest entry does not
    exponent = torch.frexp(matrix.abs().amax(dim=1, keepdim=True) * matrix.shape[1] ** 0.5).exponent
    return torch.ldexp(torch.round(torch.ldexp(matrix, 26 - exponent)), exponent - 26)


def top_keys(queries: torch.Tensor, chunk: torch.Tensor, start: int, k: int) -> torch.Tensor:
    """(Q, min(k, n)) keys of the best of n candidates, which are numbered from `start` on; both sides on the grid.

    A key is an int64 that sorts by score (high half), then by lower index (low half)."""
    block = max(1, _SCORE_BLOCK // len(chunk))
    return torch.cat([_top_of_scores(part @ chunk.T, start, min(k, len(chunk))) for part in queries.split(block)])


def _top_of_scores(scores: torch.Tensor, start: int, k: int) -> torch.Tensor:
    scores = scores.to(torch.float32)
    top, columns = scores.topk(k, dim=1)
    keys = keys_of(top, columns + start).sort(dim=1, descending=True).values
    # torch.topk picks any of several equal scores at the edge: those rows are chosen again by key
    tied = (scores >= top[:, -1:]).sum(dim=1) > k
    if tied.any():
        columns = torch.arange(start, start + scores.shape[1], device=scores.device)
        keys[tied] = keys_of(scores[tied], columns).topk(k, dim=1).values
    return keys


def keys_of(scores: torch.Tensor, indices: torch.Tensor) -> torch.Tensor:
    """int64 keys of float32 scores and the candidates' indices."""
    bits = (scores + 0.0).view(torch.int32).to(torch.int64)  # the sum turns -0.0 into 0.0
    return (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) + (_INDEX_MASK - indices)


def scores_and_indices(keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The float32 scores and int64 indices that keys are made of."""
    ordered = keys >> 32
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).to(torch.int32).view(torch.float32)
    return scores, _INDEX_MASK - (keys & _INDEX_MASK)
