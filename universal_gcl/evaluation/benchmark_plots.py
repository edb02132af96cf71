"""Pictures of benchmark runs side by side, as PNG: figures by direction, and the ranks of the positives."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from universal_gcl.evaluation.benchmark import DEPTH
from universal_gcl.evaluation.benchmark_report import (
    Measured,
    RankedTasks,
    check_runs_comparable,
    mean_by_direction,
)
from universal_gcl.evaluation.plot_style import COLOURS, save_figure

_EDGES = (1, 2, 3, 5, 10, 20, 50, DEPTH)  # the last rank of each bin: about equal steps of a logarithm
RANK_BINS = (
    *(f"{low + 1}–{high}" if high > low + 1 else str(high) for low, high in zip((0, *_EDGES), _EDGES)),
    f"not in\nthe first\n{DEPTH}",
)
_HATCHES = ("", "//", "..")  # with more runs than hatches the bars are too thin to show one


def draw_comparison(runs: Mapping[str, Measured], folders: Mapping[str, Path], out: Path) -> list[str]:
    """Draw `directions.png` and, if the benchmark keeps ranks, `ranks.png`.

    Args:
        runs: name → run; two to seven.
        folders: name → folder of the run, whose `records/` has the ranks.
        out: folder for the pictures.

    Returns:
        one message for each picture that can't be drawn, with the reason.

    Raises:
        ValueError: see `direction_bars` and `rank_histogram`.
    """
    direction_bars(runs, out / "directions.png")
    if not any(run.ranked for run in runs.values()):
        return []
    records = {name: folder / "records" for name, folder in folders.items()}
    missing = [path for name, run in runs.items() for path in missing_records(run, records[name])]
    if missing:
        return [f"ranks.png is not drawn: {len(missing)} files of records are missing, e.g. {missing[0]}"]
    rank_histogram(runs, records, out / "ranks.png")
    return []


def direction_bars(runs: Mapping[str, Measured], path: str | Path) -> Path:
    """Draw one panel per pool: the mean over the tasks of each direction, one bar per run.

    Args:
        runs: name → run; two to seven.

    Raises:
        ValueError: there are more runs than colours, or the runs are not comparable.
    """
    _check(runs)
    first = next(iter(runs.values()))
    means = [mean_by_direction(run.figures) for run in runs.values()]
    metrics: dict[str, dict[str, None]] = {}
    for line in first.figures:
        metrics.setdefault(line.pool, {})[line.metric] = None
    directions = max(map(len, means[0].values()))
    width = max(6.0, 1.6 + directions * (0.4 + 0.37 * len(runs)))
    figure = Figure(figsize=(width, 2.7 * len(metrics) + 1.1), layout="constrained")
    for ax, pool in zip(figure.subplots(len(metrics), 1, squeeze=False)[:, 0], metrics):
        groups = list(means[0][pool])
        values = [[of[pool][direction] for direction in groups] for of in means]
        for bars, shown in zip(_grouped_bars(ax, values, list(runs)), values):
            ax.bar_label(bars, [f"{value:.1f}" for value in shown], padding=2, fontsize=8)
        ax.set_xticks(range(len(groups)), groups, fontsize=11)
        ax.set_title(f"pool: {pool}", fontsize=11)
        ax.set_ylabel(f"{', '.join(metrics[pool])} in %", fontsize=9)
        ax.set_ylim(0, 109)  # room for the number on a bar of 100
        ax.set_yticks(range(0, 101, 20))
    figure.suptitle(f"{first.protocol}: mean over the tasks of each direction", fontsize=12)
    _legend(figure)
    return save_figure(figure, path)


def rank_histogram(runs: Mapping[str, Measured], records: Mapping[str, Path], path: str | Path) -> Path:
    """Draw at which rank the first positive of a query was found, as in figure 4 of the GCL paper.

    There is one panel for all tasks and, if there are several directions, one for each. Within a panel all tasks count
    equally, however many queries they have.

    Args:
        runs: name → run; two to seven.
        records: name → the run's folder `records/`.

    Raises:
        ValueError: the benchmark keeps no ranks, there are more runs than colours, the runs are not comparable, or the
            records are from another run than the result.
        OSError: records are missing; see `missing_records`.
    """
    _check(runs)
    first = next(iter(runs.values()))
    if first.ranked is None:
        raise ValueError(f"{first.protocol} keeps no ranks of positives in a pool")
    pool, directions = first.ranked.pool, first.ranked.directions
    shares = [_shares(run.ranked, records[name]) for name, run in runs.items() if run.ranked is not None]
    groups = {"all directions": list(directions)} if len(set(directions.values())) > 1 else {}
    for direction in dict.fromkeys(directions.values()):
        groups[direction] = [task for task, of in directions.items() if of == direction]
    columns = 1 if len(groups) == 1 else 3 if len(groups) > 4 else 2
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(max(6.4, 5.4 * columns), 2.9 * lines + 1.0), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, (title, tasks) in zip(axes, groups.items()):
        values = [100 * np.mean([of[task] for task in tasks], axis=0) for of in shares]
        _grouped_bars(ax, values, list(runs))
        ax.set_xticks(range(len(RANK_BINS)), RANK_BINS, fontsize=7.5)
        ax.set_title(f"{title} ({len(tasks)} task{'s' * (len(tasks) > 1)})", fontsize=10)
        ax.set_ylim(0, max(5.0, 1.08 * max(map(max, values))))
        ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        ax.set_xlabel("rank of the first positive", fontsize=9)
        ax.set_ylabel("share of the queries", fontsize=9)
    for ax in axes[len(groups) :]:
        ax.remove()
    figure.suptitle(f"Rank of the first positive in the {pool} pool", fontsize=12)
    _legend(figure)
    return save_figure(figure, path)


def missing_records(run: Measured, records: Path) -> list[Path]:
    """The files of records that `rank_histogram` needs and that are absent."""
    paths = [] if run.ranked is None else [_records_file(run.ranked, task, records) for task in run.ranked.directions]
    return [path for path in paths if not path.is_file()]


def first_rank_shares(ranks: Sequence[int | None]) -> np.ndarray:
    """(len(RANK_BINS),) share of the queries in each bin, by the rank of their first positive; None: not found."""
    places = np.searchsorted(_EDGES, [DEPTH + 1 if rank is None else rank for rank in ranks])
    return np.bincount(places, minlength=len(RANK_BINS)) / len(ranks)


def _records_file(ranked: RankedTasks, task: str, folder: Path) -> Path:
    return folder / f"{task}.{ranked.pool}.jsonl"


def _shares(ranked: RankedTasks, folder: Path) -> dict[str, np.ndarray]:
    shares = {}
    for task, queries in ranked.queries.items():
        path = _records_file(ranked, task, folder)
        ranks: list[int | None] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found = json.loads(line)["ranks"]
                ranks.append(found[0] if found else None)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: not the record of a query ({error!r})") from error
        if len(ranks) != queries:
            raise ValueError(
                f"{path} has records of {len(ranks)} queries, results.json of {queries}: they come from different "
                "runs; evaluate again"
            )
        shares[task] = first_rank_shares(ranks)
    return shares


def _check(runs: Mapping[str, Measured]) -> None:
    check_runs_comparable(runs)
    if len(runs) > len(COLOURS):
        raise ValueError(f"{len(runs)} runs are too many for one picture: there are {len(COLOURS)} distinct colours")


def _grouped_bars(ax: Axes, values: Sequence[Sequence[float]], names: Sequence[str]) -> list[BarContainer]:
    """Bars of each run. Those of a group stand side by side in the order of the legend, so that they can be identified
    without colours."""
    width = 0.8 / len(names)
    drawn = []
    for number, (name, heights) in enumerate(zip(names, values)):
        places = np.arange(len(heights)) + (number - (len(names) - 1) / 2) * width
        hatch = _HATCHES[number] if len(names) <= len(_HATCHES) else ""
        bars = ax.bar(
            places, heights, width, label=name, color=COLOURS[number], edgecolor="white", linewidth=0.5, hatch=hatch
        )
        drawn.append(bars)
    ax.margins(x=0.02)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    return drawn


def _legend(figure: Figure) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
