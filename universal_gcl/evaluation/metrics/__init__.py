"""Ranking metrics as plain functions, and as modules of the `evaluate` library that need no network.

`evaluate.load` takes the path of a folder NAME here, which holds NAME.py, and copies that file alone. So the file only
imports the function that this package has.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from universal_gcl.evaluation.metrics.ranking import hit_rate_at_k, mrr_at_k, ndcg_at_k, recall_at_k

if TYPE_CHECKING:
    import evaluate

__all__ = ["hit_rate_at_k", "load_metric", "mrr_at_k", "ndcg_at_k", "recall_at_k"]


def load_metric(name: str) -> evaluate.Metric:
    """The `evaluate` module `hit_rate`, `mrr`, `ndcg` or `recall`, for `.compute(predictions=…, references=…, k=…)`.

    Raises:
        ValueError: there is no such metric; the message lists those there are.
    """
    import evaluate

    folder = Path(__file__).parent / name
    if not (folder / f"{name}.py").is_file():
        known = sorted(path.parent.name for path in folder.parent.glob("*/*.py") if path.stem == path.parent.name)
        raise ValueError(f"there is no metric {name!r}; there are: {', '.join(known)}")
    return evaluate.load(str(folder))
