"""`evaluate.load` reads this file alone; the metric is `universal_gcl.evaluation.metrics.mrr_at_k`."""

from universal_gcl.evaluation.metrics import mrr_at_k
from universal_gcl.evaluation.metrics.evaluate_module import RankingMetric


class MRR(RankingMetric):
    figure = "mrr"
    at_k = staticmethod(mrr_at_k)
