"""Mixing of several sources: how many items each gives to an epoch, and which."""

from collections.abc import Sequence

import numpy as np


def mixing_shares(sizes: Sequence[int], weights: Sequence[float] | None, alpha: float | None) -> np.ndarray:
    """Each source's share of an epoch.

    Args:
        sizes: number of pairs of each source.
        weights: one positive number a source; they win over `alpha`.
        alpha: shares proportional to size^alpha (temperature mixing).

    Returns:
        (len(sizes),) float64 that sums to 1.
    """
    raw = np.asarray(weights, dtype=np.float64) if weights is not None else np.asarray(sizes, dtype=np.float64) ** alpha
    return raw / raw.sum()


def draws_per_epoch(shares: np.ndarray, total: int) -> np.ndarray:
    """Whole numbers that sum to `total`, each less than 1 from shares * total (largest remainders).

    Returns:
        (len(shares),) int64.
    """
    exact = shares * total
    draws = np.floor(exact).astype(np.int64)
    largest = np.argsort(draws - exact, kind="stable")
    draws[largest[: total - draws.sum()]] += 1
    return draws


def epoch_plan(sizes: Sequence[int], draws: Sequence[int], seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray]:
    """The source and row of every item of one epoch.

    A source is gone through in a random order, then in a new one, and so on, across epochs: no pair comes a second time
    before all of its source have come.

    Args:
        sizes: number of pairs of each source.
        draws: items that each source gives to an epoch.
        seed, epoch: the plan depends on these only.

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
