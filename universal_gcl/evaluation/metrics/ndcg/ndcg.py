"""`evaluate.load` reads this file alone; the metric is `universal_gcl.evaluation.metrics.ndcg_at_k`."""

from universal_gcl.evaluation.metrics import ndcg_at_k
from universal_gcl.evaluation.metrics.evaluate_module import RankingMetric


class NDCG(RankingMetric):
    figure = "ndcg"
    at_k = staticmethod(ndcg_at_k)
