"""Metrics of rankings against the relevant items of each query: the only implementation, which all benchmarks call."""

import math
from collections.abc import Callable, Collection, Hashable, Sequence

Ranking = Sequence[Hashable]  # ids of the retrieved items, best first
Relevant = Collection[Hashable]  # ids of the relevant items of a query, at least one


def hit_rate_at_k(predictions: Sequence[Ranking], references: Sequence[Relevant], k: int) -> float:
    """The share of queries with at least one relevant item among their first `k`, in 0..1.

    M-BEIR calls this Recall@k (UniIR, arXiv 2311.17136). If each query has one relevant item, it equals the recall.

    Args:
        predictions: Q rankings, each a sequence of ids, best first. A ranking may be shorter than `k`.
        references: Q collections of relevant ids.

    Raises:
        ValueError: no queries, different numbers of rankings and references, k < 1, a query without a relevant item.
    """
    return _mean(lambda first, relevant: any(item in relevant for item in first), predictions, references, k)


def recall_at_k(predictions: Sequence[Ranking], references: Sequence[Relevant], k: int) -> float:
    """The share of a query's relevant items that are among its first `k`, mean over queries, in 0..1.

    M-BEIR's "Recall@k" is a different figure, `hit_rate_at_k`.

    Args:
        predictions: Q rankings, each a sequence of ids, best first, none twice. A ranking may be shorter than `k`.
        references: Q collections of relevant ids.

    Raises:
        ValueError: no queries, different numbers of rankings and references, k < 1, a query without a relevant item.
    """
    return _mean(lambda first, relevant: len(relevant.intersection(first)) / len(relevant), predictions, references, k)


def mrr_at_k(predictions: Sequence[Ranking], references: Sequence[Relevant], k: int) -> float:
    """Mean over queries of 1 / rank of the first relevant item, in 0..1. A query without one in the first `k` counts 0.

    Source: Voorhees, "The TREC-8 question answering track report", 1999.

    Args:
        predictions: Q rankings, each a sequence of ids, best first. A ranking may be shorter than `k`.
        references: Q collections of relevant ids.

    Raises:
        ValueError: no queries, different numbers of rankings and references, k < 1, a query without a relevant item.
    """

    def reciprocal_rank(first: Ranking, relevant: set) -> float:
        return next((1 / rank for rank, item in enumerate(first, start=1) if item in relevant), 0.0)

    return _mean(reciprocal_rank, predictions, references, k)


def ndcg_at_k(predictions: Sequence[Ranking], references: Sequence[Relevant], k: int) -> float:
    """nDCG with binary relevance, mean over queries, in 0..1, as trec_eval's `ndcg_cut` computes it for gains 0 and 1.

    A relevant item gains 1 / log2(1 + rank). The sum of the gains is divided by that of an ideal ranking, which begins
    with all relevant items, retrieved or not, up to `k`. With one relevant item, a query scores 1 / log2(1 + rank).

    Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.

    Args:
        predictions: Q rankings, each a sequence of ids, best first, none twice. A ranking may be shorter than `k`.
        references: Q collections of relevant ids.

    Raises:
        ValueError: no queries, different numbers of rankings and references, k < 1, a query without a relevant item,
            an id that occurs twice in one ranking.
    """
    discounts = [1 / math.log2(1 + rank) for rank in range(1, k + 1)]

    def ndcg(first: Ranking, relevant: set) -> float:
        if len(set(first)) < len(first):
            raise ValueError("its ranking holds an item twice")
        gain = sum(discount for item, discount in zip(first, discounts) if item in relevant)
        return gain / sum(discounts[: len(relevant)])

    return _mean(ndcg, predictions, references, k)


def _mean(
    score: Callable[[Ranking, set], float], predictions: Sequence[Ranking], references: Sequence[Relevant], k: int
) -> float:
    """Mean over queries of `score(first k of the ranking, relevant ids)`, after the checks that all metrics share."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(predictions) != len(references) or len(predictions) == 0:
        raise ValueError(f"need one ranking for each query, got {len(predictions)} for {len(references)} queries")
    total = 0.0
    for query, (ranking, relevant) in enumerate(zip(predictions, references)):
        if len(relevant) == 0:
            raise ValueError(f"query {query} has no relevant item")
        try:
            total += score(ranking[:k], set(relevant))
        except ValueError as error:
            raise ValueError(f"query {query}: {error}") from error
    return total / len(predictions)
