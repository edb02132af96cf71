"""Matryoshka embeddings (Kusupati et al., arXiv 2205.13147): of use also when cut to their first d entries.

A cut embedding is normalised again. The whole embedding is one of the cuts, always, and is taken as it is.

Products of K cuts are prefix sums over K parts of the entries, times the inverse norms of both sides; what an entry
gets back, it gets from all cuts beyond it. So all K cost as many multiplications as the largest alone.
"""

import math

import torch

# below, the direction of a cut embedding is rounding noise, and its gradient has a millionfold weight
SMALLEST_NORM = 1e-6


def cuts_and_shares(dims, weights, whole):
    """
    The dimensions to cut to, and each one's share of the loss.

    Args:
        dims (sequence of `int`, *optional*): in any order; `whole` is added where it is missing.
        weights (sequence of `float`, *optional*): one for each of `dims`, positive. By default, and for a `whole` that
            is added, 1.
        whole (`int`): D.

    Returns:
        `dict[int, float]`: from the smallest to `whole`; the shares' sum is 1.

    Raises:
        ValueError: dimensions that are not whole numbers from 1 to D or named twice, or weights that don't fit them.
    """
    if dims is None:
        if weights is not None:
            raise ValueError("matryoshka_weights are for matryoshka_dims, which are not given")
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
        raise ValueError(f"matryoshka_weights must be finite and positive, got {weights}: leave out dims of no weight")
    by_dim = {whole: 1.0} | dict(zip(dims, weights))
    return {d: by_dim[d] / sum(by_dim.values()) for d in sorted(by_dim)}


def cut(x, d):
    """(N, D) → (N, d) rows of unit norm; x itself where d is D."""
    return x if d == x.shape[1] else torch.nn.functional.normalize(x[:, :d], dim=-1)


def parts(dims):
    """Slices of the entries between one cut and the next."""
    return [slice(*bounds) for bounds in zip((0, *dims), dims)]


def inverse_norms(x, dims):
    """(K, N) 1/norm of the rows of `x`, cut to each of `dims`; of the whole, the last of them, 1."""
    inverses = x.new_ones(len(dims), len(x))
    if len(dims) > 1:
        squares = [torch.linalg.vector_norm(x[:, part], dim=-1).square() for part in parts(dims)[:-1]]
        inverses[:-1] = torch.stack(squares).cumsum(0).rsqrt_()
    return inverses


def cosines(x, y, dims):
    """(K, N) cosines of row j of `x` and row j of `y`, cut to each of `dims`."""
    products = torch.stack([torch.linalg.vecdot(x[:, part], y[:, part]) for part in parts(dims)]).cumsum_(0)
    return products.mul_(inverse_norms(x, dims)).mul_(inverse_norms(y, dims))


def sums_beyond(x):
    """(K, ...): of each cut's values, the sums over it and all larger ones."""
    return x.flip(0).cumsum(0).flip(0)
