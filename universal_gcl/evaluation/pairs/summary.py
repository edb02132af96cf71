"""Several runs side by side: mean ± standard deviation over seeds of the main figures, as a table and a picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from universal_gcl.evaluation.pairs.measure import HEADLINE
from universal_gcl.evaluation.pairs.report import check_comparable
from universal_gcl.evaluation.plot_style import POOL_COLOURS, save_figure

ReadFigure = Callable[[dict[str, Any]], float]


def _hit(direction: str, pool: str) -> ReadFigure:
    return lambda result: 100 * result["nine_way"][direction][pool]["hit@10"]


MAIN_FIGURES: dict[str, ReadFigure] = {
    "headline local": lambda result: 100 * result["headline"]["local"],
    "headline global": lambda result: 100 * result["headline"]["global"],
    "mixed nDCG@10": lambda result: 100 * result["mixed"]["ndcg@10"],
    "cos i,t": lambda result: result["gap"]["cosine"]["i,t"],
    "cos i,it": lambda result: result["gap"]["cosine"]["i,it"],
    "cos t,it": lambda result: result["gap"]["cosine"]["t,it"],
}
# read from the whole run, not from its result; a run that was only evaluated has none
COSTS: dict[str, ReadFigure] = {
    "trained parameters": lambda run: run["parameters"]["total"]["trained"],
    "training, min": lambda run: run["train_runtime"] / 60,
    "peak memory, GiB": lambda run: run["peak_memory"] / 2**30,
}
POOLS = ("local", "global")
FIGURES = MAIN_FIGURES | {f"{d} {pool}": _hit(d, pool) for d in HEADLINE for pool in POOLS}


def summarize(runs: Mapping[str, Sequence[Path]], out: Path) -> str:
    """
    Write `summary.json`, `summary.md` and `summary.png`.

    Args:
        runs: name → the `results.json` files of its seeds, each with an `"after"` result of `evaluate_pairs`.
        out: folder, made if absent.

    Returns:
        The markdown: a table of headline, mixed search and gap; a table of the directions (local / global hit@10); and
        a table of what training cost, if the runs recorded it.

    Raises:
        ValueError: a file has no `"after"` result, or the results can't be compared.
    """
    results = {name: [read_result(path) for path in paths] for name, paths in runs.items()}
    check_comparable([result for group in results.values() for result in group])
    summary = {
        name: {
            "seeds": len(group),
            "files": [str(path) for path in runs[name]],
            **{figure: _mean_std([read(result) for result in group]) for figure, read in FIGURES.items()},
            "costs": _costs([json.loads(path.read_text()) for path in runs[name]]),
        }
        for name, group in results.items()
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summary, indent=2, ensure_ascii=False) + "\n")
    markdown = _markdown(summary)
    (out / "summary.md").write_text(markdown + "\n")
    _bars(summary, out / "summary.png")
    return markdown


def read_result(path: Path) -> dict[str, Any]:
    """The result of `evaluate_pairs` that a `results.json` holds under `"after"`.

    Raises:
        ValueError: the file holds none.
    """
    result = json.loads(path.read_text()).get("after")
    if not result:
        raise ValueError(f"{path} holds no result under 'after': was the run evaluated?")
    return result


def _costs(runs: list[dict]) -> dict:
    """Mean and deviation of each cost; empty unless every run recorded every cost."""
    try:
        return {cost: _mean_std([read(run) for run in runs]) for cost, read in COSTS.items()}
    except KeyError:
        return {}


def _mean_std(values: list[float]) -> dict:
    """Mean and sample standard deviation; the deviation of a single value is None."""
    return {"mean": float(np.mean(values)), "std": float(np.std(values, ddof=1)) if len(values) > 1 else None}


def _cell(value: dict, digits: int) -> str:
    spread = "" if value["std"] is None else f" ± {value['std']:.{digits}f}"
    return f"{value['mean']:.{digits}f}{spread}"


def _markdown(summary: dict) -> str:
    head = list(MAIN_FIGURES)
    lines = ["| run | seeds | " + " | ".join(head) + " |", "|" + "---|" * (len(head) + 2)]
    for name, row in summary.items():
        cells = [_cell(row[figure], 3 if figure.startswith("cos") else 1) for figure in head]
        lines.append(f"| {name} | {row['seeds']} | " + " | ".join(cells) + " |")
    lines += ["", "Hit@10 in %, local / global:", ""]
    lines += ["| run | " + " | ".join(HEADLINE) + " |", "|" + "---|" * (len(HEADLINE) + 1)]
    for name, row in summary.items():
        cells = [" / ".join(f"{row[f'{d} {pool}']['mean']:.1f}" for pool in POOLS) for d in HEADLINE]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    if any(row["costs"] for row in summary.values()):
        lines += ["", "What training cost:", "", "| run | " + " | ".join(COSTS) + " |", "|---|" + "---:|" * len(COSTS)]
        for name, row in summary.items():
            cells = [_cost_cell(row["costs"].get(cost)) for cost in COSTS]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cost_cell(value: dict | None) -> str:
    if value is None:
        return "–"
    return f"{value['mean']:,.0f}" if value["mean"] >= 1000 else _cell(value, 1)


def _bars(summary: dict, path: Path) -> None:
    """Draw the headline hit@10 of each run in both pools, with whiskers of one standard deviation."""
    figure = Figure(figsize=(8, 0.7 * len(summary) + 1.2), layout="constrained")
    ax = figure.subplots()
    places = np.arange(len(summary))
    for shift, (pool, colour) in zip((-0.2, 0.2), POOL_COLOURS.items()):
        values = [row[f"headline {pool}"] for row in summary.values()]
        means, stds = [value["mean"] for value in values], [value["std"] or 0 for value in values]
        bars = ax.barh(places + shift, means, 0.38, xerr=stds, color=colour, label=f"{pool} pool", capsize=2)
        ax.bar_label(bars, [f"{mean:.1f}" for mean in means], padding=4, fontsize=9)
    ax.set_yticks(places, list(summary))
    ax.invert_yaxis()
    ax.set_xlim(0, 100)
    ax.set_xlabel("headline hit@10 in %")
    ax.legend(loc="lower right")
    save_figure(figure, path)
