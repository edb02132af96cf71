"""The base of the four metrics that `evaluate.load` finds, in the folders next to this file."""

from abc import ABC, abstractmethod

import datasets
import evaluate

_INPUTS = """
Args:
    predictions: for each query, the ids of the retrieved items, best first, none twice. Ids are integers or strings.
    references: for each query, the ids of its relevant items, at least one.
    k: how many of the retrieved items count.
Returns:
    {"%s@k": float in 0..1}
"""


class RankingMetric(evaluate.Metric, ABC):
    """A metric of `universal_gcl.evaluation.metrics` as a module of the `evaluate` library.

    It is abstract because `evaluate.load` takes the first class of a file that is not abstract. So a file can import
    this class by its name.
    """

    figure: str  # in the result: {"figure@k": …}

    @staticmethod
    @abstractmethod
    def at_k(predictions: list, references: list, k: int) -> float:
        """The metric itself, one of `metrics.ranking`."""

    def _info(self) -> evaluate.MetricInfo:
        ids = [datasets.Sequence(datasets.Value(kind)) for kind in ("string", "int64")]
        return evaluate.MetricInfo(
            description=self.at_k.__doc__,
            citation="",
            inputs_description=_INPUTS % self.figure,
            features=[datasets.Features({"predictions": one, "references": one}) for one in ids],
        )

    def _compute(self, predictions: list, references: list, k: int = 10) -> dict[str, float]:
        return {f"{self.figure}@{k}": self.at_k(predictions, references, k)}
