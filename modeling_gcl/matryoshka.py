"""Matryoshka embeddings (Kusupati et al., arXiv 2205.13147): they stay useful when cut to their first d entries.

A cut embedding is normalised again. The full embedding is always one of the cuts, and is used unchanged.

The entries are divided into K parts, from each cut to the next. The dot products of the K cuts are the prefix sums of
the parts' dot products, times the inverse norms of both sides. An entry's gradient is the sum over all cuts that
contain it. So K cuts need as many multiplications as the full embedding alone.
"""

import math
from collections.abc import Sequence

import torch

# An embedding with a smaller norm can't be normalised: its direction is rounding noise, and its gradient is multiplied
# by a million.
SMALLEST_NORM = 1e-6


def cuts_and_shares(dims: Sequence[int] | None, weights: Sequence[float] | None, whole: int) -> dict[int, float]:
    """
    The dimensions that embeddings are cut to, and the share of each in the loss.

    Args:
        dims (sequence of `int`, *optional*): in any order. `whole` is added if it is missing.
        weights (sequence of `float`, *optional*): positive weights of `dims`, 1 by default. An added `whole` has
            weight 1.
        whole (`int`): D.

    Returns:
        `dict[int, float]`: dimension → share, from the smallest dimension to `whole`. The shares sum to 1.

    Raises:
        ValueError: a dimension is not a whole number from 1 to D, or is repeated, or the weights don't fit.
    """
    if dims is None:
        if weights is not None:
            raise ValueError("matryoshka_weights need matryoshka_dims, which are not given")
        return {whole: 1.0}
    dims = list(dims)
    for d in dims:
        if not isinstance(d, int) or isinstance(d, bool) or not 1 <= d <= whole:
            raise ValueError(f"matryoshka_dims holds {d!r}: use whole numbers from 1 to the embeddings' {whole}")
    if len(set(dims)) < len(dims):
        raise ValueError(f"matryoshka_dims names a dimension twice: {dims}")
    weights = [1.0] * len(dims) if weights is None else [float(w) for w in weights]
    if len(weights) != len(dims):
        raise ValueError(f"matryoshka_weights must be one for each of matryoshka_dims {dims}, got {weights}")
    if not all(math.isfinite(w) and w > 0 for w in weights):
        raise ValueError(
            f"matryoshka_weights must be finite and positive, got {weights}: leave out dims without weight"
        )
    by_dim = {whole: 1.0} | dict(zip(dims, weights))
    return {d: by_dim[d] / sum(by_dim.values()) for d in sorted(by_dim)}


def cut(x: torch.Tensor, d: int) -> torch.Tensor:
    """(N, D) → (N, d) rows of unit norm. If d is D, x itself."""
    return x if d == x.shape[1] else torch.nn.functional.normalize(x[:, :d], dim=-1)


def parts(dims: Sequence[int]) -> list[slice]:
    """The entries between each cut and the next, as slices."""
    return [slice(*bounds) for bounds in zip((0, *dims), dims)]


def inverse_norms(x: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """(K, N) 1/norm of the rows of `x`, cut to each of `dims`. For the last, D, it is 1."""
    inverses = x.new_ones(len(dims), len(x))
    if len(dims) > 1:
        squares = [torch.linalg.vector_norm(x[:, part], dim=-1).square() for part in parts(dims)[:-1]]
        inverses[:-1] = torch.stack(squares).cumsum(0).rsqrt_()
    return inverses


def cosines(x: torch.Tensor, y: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """(K, N) cosines between row j of `x` and row j of `y`, cut to each of `dims`."""
    products = torch.stack([torch.linalg.vecdot(x[:, part], y[:, part]) for part in parts(dims)]).cumsum_(0)
    return products.mul_(inverse_norms(x, dims)).mul_(inverse_norms(y, dims))


def sums_beyond(x: torch.Tensor) -> torch.Tensor:
    """(K, ...) → for each cut, the sum over this cut and all larger ones."""
    return x.flip(0).cumsum(0).flip(0)
