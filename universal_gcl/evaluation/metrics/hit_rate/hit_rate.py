"""Hit rate: the share of queries with at least one relevant item among their first k.

M-BEIR calls this Recall@k (UniIR, arXiv 2311.17136). With one relevant item a query, it is the usual recall.
"""

import datasets
import evaluate

_DESCRIPTION = "The share of queries with at least one relevant item among the first k of their ranking, in 0..1."
_INPUTS = """
Args:
    predictions: for each query, the ids of the retrieved items, best first.
    references: for each query, the ids of its relevant items, at least one.
    k: how many of the retrieved items count.
Returns:
    {"hit@k": float in 0..1}
"""


def hit_rate_at_k(predictions, references, k: int) -> float:
    """The share of queries whose first `k` retrieved ids hold a relevant one.

    Args:
        predictions: Q rankings, each a sequence of ids, best first. A shorter one than `k` counts as it is.
        references: Q collections of relevant ids.

    Raises:
        ValueError: no queries, another number of rankings than of references, k < 1, a query with nothing relevant.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    if len(predictions) != len(references) or len(predictions) == 0:
        raise ValueError(f"need one ranking for each query, got {len(predictions)} for {len(references)} queries")
    hits = 0
    for query, (ranking, relevant) in enumerate(zip(predictions, references, strict=True)):
        if len(relevant) == 0:
            raise ValueError(f"query {query} has no relevant item")
        relevant = set(relevant)
        hits += any(item in relevant for item in ranking[:k])
    return hits / len(predictions)


class HitRate(evaluate.Metric):
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
        return {f"hit@{k}": hit_rate_at_k(predictions, references, k)}
