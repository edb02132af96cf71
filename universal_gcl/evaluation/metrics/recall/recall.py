"""Recall: the share of a query's relevant items among its first k, mean over queries.

M-BEIR's "Recall@k" is another figure, the hit rate: see `evaluation.metrics.hit_rate`.
"""

import datasets
import evaluate

_DESCRIPTION = "The share of a query's relevant items among the first k of its ranking, mean over queries, in 0..1."
_INPUTS = """
Args:
    predictions: for each query, the ids of the retrieved items, best first, none twice.
    references: for each query, the ids of its relevant items, at least one.
    k: how many of the retrieved items count.
Returns:
    {"recall@k": float in 0..1}
"""


def recall_at_k(predictions, references, k: int) -> float:
    """Mean over queries of the share of relevant items that are among the first `k`.

    Args:
        predictions: Q rankings, each a sequence of ids, best first, none twice. A shorter one than `k` counts as it is.
        references: Q collections of relevant ids.

    Raises:
        ValueError: no queries, another number of rankings than of references, k < 1, a query with nothing relevant.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(predictions) != len(references) or len(predictions) == 0:
        raise ValueError(f"need one ranking for each query, got {len(predictions)} for {len(references)} queries")
    total = 0.0
    for query, (ranking, relevant) in enumerate(zip(predictions, references, strict=True)):
        relevant = set(relevant)
        if not relevant:
            raise ValueError(f"query {query} has no relevant item")
        total += len(relevant.intersection(ranking[:k])) / len(relevant)
    return total / len(predictions)


class Recall(evaluate.Metric):
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
        return {f"recall@{k}": recall_at_k(predictions, references, k)}
