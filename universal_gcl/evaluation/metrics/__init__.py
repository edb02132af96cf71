"""Ranking metrics, each one a local `evaluate` module: `metrics/<name>/<name>.py`, which needs no network.

Each module file holds its only implementation as a plain function, which the protocols call directly.
"""

from pathlib import Path

import evaluate

_FOLDER = Path(__file__).parent


def load_metric(name: str) -> evaluate.Metric:
    """The local `evaluate` module of that name (`hit_rate`, `ndcg`), ready for `.compute(predictions=…, references=…)`.

    Raises:
        ValueError: no such metric; the message lists those there are.
    """
    folder = _FOLDER / name
    if not (folder / f"{name}.py").is_file():
        known = sorted(path.parent.name for path in _FOLDER.glob("*/*.py") if path.stem == path.parent.name)
        raise ValueError(f"there is no metric {name!r}; there are: {', '.join(known)}")
    return evaluate.load(str(folder))
