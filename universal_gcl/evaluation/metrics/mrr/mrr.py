"""Mean reciprocal rank of the first relevant item.

Source: Voorhees, "The TREC-8 question answering track report", 1999.
"""

import datasets
import evaluate

_DESCRIPTION = "Mean over queries of 1 / rank of the first relevant item, 0 where none is among the first k, in 0..1."
_INPUTS = """
Args:
    predictions: for each query, the ids of the retrieved items, best first.
    references: for each query, the ids of its relevant items, at least one.
    k: how many of the retrieved items count.
Returns:
    {"mrr@k": float in 0..1}
"""


def mrr_at_k(predictions, references, k: int) -> float:
    """Mean over queries of 1 / rank of the first relevant item; a query without one in the first `k` counts 0.

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
    total = 0.0
    for query, (ranking, relevant) in enumerate(zip(predictions, references, strict=True)):
        relevant = set(relevant)
        if not relevant:
            raise ValueError(f"query {query} has no relevant item")
        total += next((1 / rank for rank, item in enumerate(ranking[:k], start=1) if item in relevant), 0.0)
    return total / len(predictions)


class MRR(evaluate.Metric):
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
        return {f"mrr@{k}": mrr_at_k(predictions, references, k)}
