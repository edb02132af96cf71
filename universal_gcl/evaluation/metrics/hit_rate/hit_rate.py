"""`evaluate.load` reads this file alone; the metric is `universal_gcl.evaluation.metrics.hit_rate_at_k`."""

from universal_gcl.evaluation.metrics import hit_rate_at_k
from universal_gcl.evaluation.metrics.evaluate_module import RankingMetric


class HitRate(RankingMetric):
    figure = "hit"
    at_k = staticmethod(hit_rate_at_k)
