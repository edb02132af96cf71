"""nDCG with binary relevance: the standard form, as trec_eval's `ndcg_cut` computes it for gains of 0 and 1.

Source: Järvelin and Kekäläinen, "Cumulated gain-based evaluation of IR techniques", TOIS 2002.
"""

import math

import datasets
import evaluate

_DESCRIPTION = "Normalised discounted cumulative gain of the first k, binary relevance, mean over queries, in 0..1."
_INPUTS = """
Args:
    predictions: for each query, the ids of the retrieved items, best first, none twice.
    references: for each query, the ids of its relevant items, at least one.
    k: how many of the retrieved items count.
Returns:
    {"ndcg@k": float in 0..1}
"""


def ndcg_at_k(predictions, references, k: int) -> float:
    """Mean over queries of the gain 1 / log2(1 + rank) of the relevant items, over that of an ideal ranking.

    The ideal ranking holds all relevant items, at most `k`, whether they were retrieved or not. With one relevant
    item, a query scores 1 / log2(1 + rank).

    Args:
        predictions: Q rankings, each a sequence of ids, best first. A shorter one than `k` counts as it is.
        references: Q collections of relevant ids.

    Raises:
        ValueError: no queries, another number of rankings than of references, k < 1, a query with nothing relevant,
            an id twice in one ranking.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(predictions) != len(references) or len(predictions) == 0:
        raise ValueError(f"need one ranking for each query, got {len(predictions)} for {len(references)} queries")
    discounts = [1 / math.log2(1 + rank) for rank in range(1, k + 1)]
    total = 0.0
    for query, (ranking, relevant) in enumerate(zip(predictions, references, strict=True)):
        relevant = set(relevant)
        if not relevant:
            raise ValueError(f"query {query} has no relevant item")
        first = list(ranking[:k])
        if len(set(first)) < len(first):
            raise ValueError(f"the ranking of query {query} holds an item twice")
        gain = sum(discount for item, discount in zip(first, discounts, strict=False) if item in relevant)
        total += gain / sum(discounts[: len(relevant)])
    return total / len(predictions)


class NDCG(evaluate.Metric):
    """See `_DESCRIPTION`; ids are integers or strings."""

    def _info(self):
        ids = [datasets.Sequence(datasets.Value(kind)) for kind in ("string", "int64")]
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=[datasets.Features({"predictions": one, "references": one}) for one in ids],
        )

    def _compute(self, predictions, references, k=10):
        return {f"ndcg@{k}": ndcg_at_k(predictions, references, k)}
