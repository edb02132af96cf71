"""mteb's tasks for a model of texts and images: choose them by name, measure them, show a table."""

import math
from collections.abc import Iterable, Mapping
from pathlib import Path

import mteb
from mteb import AbsTask, TaskMetadata
from mteb.results import TaskResult

from universal_gcl.evaluation.mteb.model import MTEB_MODALITIES, GCLEncoder


def select_tasks(names: Iterable[str]) -> list[AbsTask]:
    """
    mteb's tasks with these names, each once, in this order. The name of a benchmark, such as `MIEB(eng)`, stands for
    all of its tasks.

    Raises:
        ValueError: a name that mteb doesn't have, or a task with audio or video.
    """
    benchmarks = {benchmark.name for benchmark in mteb.get_benchmarks()}
    tasks: dict[str, AbsTask] = {}
    for name in names:
        for task in mteb.get_benchmark(name).tasks if name in benchmarks else [_task(name)]:
            tasks.setdefault(task.metadata.name, task)
    foreign = [name for name, task in tasks.items() if not set(task.metadata.modalities) <= set(MTEB_MODALITIES)]
    if foreign:
        raise ValueError(f"these tasks have audio or video, which a GCL model can't embed: {', '.join(foreign)}")
    return list(tasks.values())


def _task(name: str) -> AbsTask:
    try:
        return mteb.get_task(name)
    except KeyError as error:  # its message suggests similar names
        raise ValueError(f"mteb {mteb.__version__} has no task or benchmark {name!r}: {error.args[0]}") from error


def measure_tasks(
    encoder: GCLEncoder, tasks: list[AbsTask], out: str | Path, *, batch_size: int = 64, show_progress: bool = False
) -> list[dict]:
    """
    Measure a model on tasks. Tasks whose results are in `out` already are not measured again.

    Args:
        out: folder; mteb writes `results/MODEL/REVISION/TASK.json` there as each task ends.
        batch_size: rows per forward pass.

    Returns:
        for each task: `task`; `type`; `direction` (mteb's category: `it2i` means it→i); `dataset` (path and revision);
        `metric`, the task's main one; `score`, its mean over splits and subsets; and `scores`: split → subset → all
        figures that are finite, except mteb's `nauc_…`, which are in its own file.

    Raises:
        ValueError, FloatingPointError: see `GCLEncoder.encode`.
    """
    measured = mteb.evaluate(
        encoder,  # type: ignore[arg-type]  # see `GCLEncoder.encode`
        tasks,
        cache=mteb.ResultCache(out),
        encode_kwargs={"batch_size": batch_size, "show_progress_bar": show_progress},
        show_progress_bar=show_progress,
        co2_tracker=False,
    )
    described = {task.metadata.name: task.metadata for task in tasks}
    return [_result(result, described[result.task_name]) for result in measured.task_results]


def _result(result: TaskResult, metadata: TaskMetadata) -> dict:
    scores = {
        split: {scores["hf_subset"]: _figures(scores) for scores in subsets} for split, subsets in result.scores.items()
    }
    return {
        "task": metadata.name,
        "type": metadata.type,
        "direction": metadata.category,
        "dataset": metadata.dataset | {"revision": result.dataset_revision},
        "metric": metadata.main_score,
        "score": float(result.get_score()),
        "scores": scores,
    }


def _figures(scores: Mapping) -> dict[str, float]:
    numbers = {name: value for name, value in scores.items() if isinstance(value, (int, float))}
    return {name: value for name, value in numbers.items() if math.isfinite(value) and not name.startswith("nauc_")}


def tasks_table(results: list[dict]) -> str:
    """One line per task: direction, metric, score in percent."""
    header = ("task", "direction", "metric", "score")
    lines = [header] + [
        (result["task"], result["direction"], result["metric"], f"{100 * result['score']:.2f}") for result in results
    ]
    widths = [max(map(len, column)) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)
