"""`evaluate.load` reads this file alone; the metric is `universal_gcl.evaluation.metrics.recall_at_k`."""

from universal_gcl.evaluation.metrics import recall_at_k
from universal_gcl.evaluation.metrics.evaluate_module import RankingMetric


class Recall(RankingMetric):
    figure = "recall"
    at_k = staticmethod(recall_at_k)
