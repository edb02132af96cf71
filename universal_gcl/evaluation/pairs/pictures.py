"""The pictures of a training run: curves, nine-way heat map, modality gap, result sheet."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings
from universal_gcl.evaluation.pairs.plots import modality_pca, nine_way_heatmap, training_curves
from universal_gcl.evaluation.pairs.result_sheet import result_sheet


class Evaluated(NamedTuple):
    """Embeddings of the evaluation pairs, and the nine-way result that was computed from them."""

    embeddings: PairEmbeddings
    result: dict[str, Any]


def draw_pictures(
    folder: Path,
    log_history: Sequence[dict],
    pairs: Sequence[dict] | None = None,
    before: Evaluated | None = None,
    after: Evaluated | None = None,
) -> dict[str, Path]:
    """
    Draw the pictures that the evaluations allow.

    Args:
        folder: where the PNG files go; created if absent.
        log_history: the log entries of the run, for the curves.
        pairs: the evaluation pairs.
        before, after: the evaluations. With `after` alone, the pictures show only that state. Without `after` or the
            pairs, only the curves are drawn.

    Returns:
        Name of each picture, as the model card knows it, and its file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"training_curves": training_curves(log_history, folder / "training_curves.png")}
    if after is None or pairs is None:
        return pictures
    first = after if before is None else before
    last = None if before is None else after
    last_embeddings, last_result = last or (None, None)
    return pictures | {
        "nine_way": nine_way_heatmap(first.result, last_result, folder / "nine_way.png"),
        "modality_pca": modality_pca(first.embeddings, last_embeddings, folder / "modality_pca.png"),
        "result_sheet": result_sheet(pairs, first.embeddings, last_embeddings, folder / "result_sheet.png"),
    }
