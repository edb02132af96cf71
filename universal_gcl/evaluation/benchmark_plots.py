"""Pictures of benchmark runs side by side, as PNG: figures by direction, and where the positives were ranked."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from universal_gcl.evaluation.benchmark import DEPTH
from universal_gcl.evaluation.benchmark_report import check_runs_comparable, figures, mean_by_direction, ranked_tasks
from universal_gcl.evaluation.plot_style import COLOURS, save_figure

_EDGES = (1, 2, 3, 5, 10, 20, 50, DEPTH)  # of ranks, last of each bin: about equal steps of a logarithm
RANK_BINS = (
    *(f"{low + 1}–{high}" if high > low + 1 else str(high) for low, high in zip((0, *_EDGES), _EDGES)),
    f"not in\nthe first\n{DEPTH}",
)
_HATCHES = ("", "//", "..")  # of more runs the bars are too thin for them


def direction_bars(runs: Mapping[str, dict], path: str | Path) -> Path:
    """For each pool a panel: the mean over the tasks of each direction, one bar a run.

    Args:
        runs: name → as `evaluation.benchmark_report.read_run` gives it; two to seven.

    Raises:
        ValueError: more runs than colours, or runs that are not comparable.
    """
    _check(runs)
    found = [figures(run) for run in runs.values()]
    means = [mean_by_direction(of) for of in found]
    metrics: dict[str, dict[str, None]] = {}
    for line in found[0]:
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
    figure.suptitle(f"{next(iter(runs.values()))['protocol']}: mean over the tasks of each direction", fontsize=12)
    _legend(figure)
    return save_figure(figure, path)


def rank_histogram(runs: Mapping[str, dict], records: Mapping[str, Path], path: str | Path) -> Path:
    """At which rank the first positive of a query was found, as the GCL paper's figure 4: a panel for all tasks and one
    for each direction if there are several. Within a panel all tasks count equally, whatever their number of queries.

    Args:
        runs: name → as `read_run` gives it; two to seven.
        records: name → the run's folder `records/`.

    Raises:
        ValueError: the benchmark keeps no such records, or as `direction_bars`, or records that are not the result's.
        OSError: records are missing; see `missing_records`.
    """
    _check(runs)
    pool, directions = ranked_tasks(next(iter(runs.values())))
    if not directions:
        raise ValueError(f"{next(iter(runs.values()))['protocol']} keeps no ranks of positives in a pool")
    shares = {name: _shares(run, records[name], pool, directions) for name, run in runs.items()}
    groups = {"all directions": list(directions)} if len(set(directions.values())) > 1 else {}
    for direction in dict.fromkeys(directions.values()):
        groups[direction] = [task for task, of in directions.items() if of == direction]
    columns = 1 if len(groups) == 1 else 3 if len(groups) > 4 else 2
    lines = -(-len(groups) // columns)
    figure = Figure(figsize=(max(6.4, 5.4 * columns), 2.9 * lines + 1.0), layout="constrained")
    axes = list(figure.subplots(lines, columns, squeeze=False).flat)
    for ax, (title, tasks) in zip(axes, groups.items()):
        values = [100 * np.mean([of[task] for task in tasks], axis=0) for of in shares.values()]
        _grouped_bars(ax, values, list(runs))
        ax.set_xticks(range(len(RANK_BINS)), RANK_BINS, fontsize=7.5)
        ax.set_title(f"{title} ({len(tasks)} task{'s' * (len(tasks) > 1)})", fontsize=10)
        ax.set_ylim(0, max(5.0, 1.08 * max(map(max, values))))
        ax.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        ax.set_xlabel("rank of the first positive", fontsize=9)
        ax.set_ylabel("share of the queries", fontsize=9)
    for ax in axes[len(groups) :]:
        ax.remove()
    figure.suptitle(f"Where the first positive stands in the {pool} pool", fontsize=12)
    _legend(figure)
    return save_figure(figure, path)


def missing_records(run: dict, records: Path) -> list[Path]:
    """The files of records that `rank_histogram` needs and that are not there."""
    pool, directions = ranked_tasks(run)
    paths = [records / f"{task}.{pool}.jsonl" for task in directions]
    return [path for path in paths if not path.is_file()]


def first_rank_shares(ranks: Sequence[int | None]) -> np.ndarray:
    """(len(RANK_BINS),) share of the queries in each bin, by the rank of their first positive; None: not found."""
    places = np.searchsorted(_EDGES, [DEPTH + 1 if rank is None else rank for rank in ranks])
    return np.bincount(places, minlength=len(RANK_BINS)) / len(ranks)


def _shares(run: dict, folder: Path, pool: str, tasks: Mapping[str, str]) -> dict[str, np.ndarray]:
    of_result = run["result"].get("tasks") or run["result"]["subsets"]
    shares = {}
    for task in tasks:
        path = folder / f"{task}.{pool}.jsonl"
        ranks: list[int | None] = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found = json.loads(line)["ranks"]
                ranks.append(found[0] if found else None)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number}: no record of a query ({error!r})") from error
        if len(ranks) != of_result[task]["queries"]:
            raise ValueError(
                f"{path} has records of {len(ranks)} queries, results.json of {of_result[task]['queries']}: they are "
                "of different runs; evaluate again"
            )
        shares[task] = first_rank_shares(ranks)
    return shares


def _check(runs: Mapping[str, dict]) -> None:
    check_runs_comparable(runs)
    if len(runs) > len(COLOURS):
        raise ValueError(f"{len(runs)} runs in one picture, but {len(COLOURS)} colours that can be told apart")


def _grouped_bars(ax, values: Sequence[Sequence[float]], names: Sequence[str]) -> list:
    """Bars of each run, those of a group side by side in the order of the legend, so that colour is not all."""
    width = 0.8 / len(names)
    drawn = []
    for number, (name, heights) in enumerate(zip(names, values)):
        places = np.arange(len(heights)) + (number - (len(names) - 1) / 2) * width
        style = {"color": COLOURS[number], "edgecolor": "white", "linewidth": 0.5}
        if len(names) <= len(_HATCHES):
            style["hatch"] = _HATCHES[number]
        drawn.append(ax.bar(places, heights, width, label=name, **style))
    ax.margins(x=0.02)
    ax.grid(axis="y", alpha=0.3)
    ax.set_axisbelow(True)
    return drawn


def _legend(figure: Figure) -> None:
    handles, names = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)), frameon=False)
