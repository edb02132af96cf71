"""Mixing several sources: how many items each contributes to an epoch, and which ones."""

from collections.abc import Sequence

import numpy as np


def mixing_shares(sizes: Sequence[int], weights: Sequence[float] | None, alpha: float | None) -> np.ndarray:
    """Each source's share of an epoch.

    Args:
        sizes: number of pairs of each source.
        weights: one positive number for each source. If given, `alpha` is not used.
        alpha: makes the shares proportional to size^alpha (temperature mixing); None is 1.

    Returns:
        (len(sizes),) float64 that sums to 1.
    """
    if weights is not None:
        raw = np.asarray(weights, dtype=np.float64)
    else:
        raw = np.asarray(sizes, dtype=np.float64) ** (1.0 if alpha is None else alpha)
    return raw / raw.sum()


def draws_per_epoch(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total`, each less than 1 away from shares * total (method of largest remainders).

    Returns:
        (len(shares),) int64.
    """
    exact = shares * total
    draws = np.floor(exact).astype(np.int64)
    largest = np.argsort(draws - exact, kind="stable")
    draws[largest[: total - draws.sum()]] += 1
    return draws


def epoch_plan(
    sizes: Sequence[int], draws: Sequence[int] | np.ndarray, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray]:
    """The source and row of every item of one epoch.

    Each source is drawn in a random order until it is used up, then in a new order, and so on across epochs. So no pair
    repeats before every pair of its source has been drawn.

    Args:
        sizes: number of pairs of each source.
        draws: number of items that each source contributes to an epoch.
        seed, epoch: the plan depends only on these.

    Returns:
        sources, rows: (sum(draws),) int64 each.
    """
    sources = np.repeat(np.arange(len(sizes)), draws)
    rows = []
    for source, (size, count) in enumerate(zip(sizes, draws)):
        first = int(count) * epoch
        rounds = range(first // size, (first + int(count) - 1) // size + 1) if count else ()
        orders = [np.random.default_rng([seed, source, number]).permutation(size) for number in rounds]
        if orders:
            start = first % size
            rows.append(np.concatenate(orders)[start : start + int(count)])
    return sources, np.concatenate(rows)
