"""Runs of one benchmark side by side: what may be compared, and the table of it. All figures in percent.

A run is the `results.json` that `evaluation.session.Session.write` wrote, of M-BEIR and data in its layout (tasks in
a local and a global pool), MixBench (mixed pools), MMEB (each query has its own candidates) or WebVid-CoVR (a gallery).
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from universal_gcl.evaluation.benchmark import SCOPES
from universal_gcl.evaluation.mmeb.sets import PAPER_DIRECTIONS

_SETTINGS = ("protocol", "limit", "instructions", "version")  # of a run, that make its figures comparable


@dataclass(frozen=True)
class Line:
    """One line of the table: a metric of a task, or of a mean over tasks, in one pool."""

    pool: str
    task: str
    direction: str
    metric: str


def read_run(path: str | Path) -> dict:
    """What `Session.write` wrote: settings, and the `result`; from a run's folder or its `results.json`.

    Raises:
        ValueError: the file is no JSON, or no run of one of the four.
        OSError: there is none.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); was it cut off?") from error
    protocol = written.get("protocol") if isinstance(written, dict) else None
    if protocol not in _READ or not written.get("result"):
        raise ValueError(f"{path} holds no result of {', '.join(_READ)}, but of {protocol!r}")
    return written


def figures(run: dict) -> dict[Line, float]:
    """The figures by which a run is judged, without means.

    M-BEIR: what the paper reports, `paper_metric` of each task and pool; MixBench: nDCG@10, of all queries and by what
    is relevant to them; MMEB: precision@1; WebVid-CoVR: hit@k for either way to join frames.
    """
    found, _ = _READ[run["protocol"]](run["result"])
    return {line: 100 * value for line, value in found.items() if value is not None}


def _read_tasks(result: dict) -> tuple[dict[Line, float], dict]:
    """The figures in 0..1, and what was measured, which must be equal in runs that are compared."""
    found, same = {}, {"the choice of tasks": list(result["tasks"])}
    for scope in SCOPES:
        for name, task in result["tasks"].items():
            same |= {f"{name}: {key}": task[key] for key in ("direction", "queries", "pool")}
            same[f"{name}: the choice of pools"] = [scope for scope in SCOPES if scope in task]
            if scope in task:
                metric = task[scope]["paper_metric"]
                found[Line(scope, name, task["direction"], metric)] = task[scope][metric]
                same |= {f"{name}, {scope}: {key}": task[scope][key] for key in ("candidates", "positives_outside")}
    return found, same


def _read_mixbench(result):
    found, same = {}, {"the choice of subsets": list(result["subsets"])}
    for name, subset in result["subsets"].items():
        same |= {f"{name}: {key}": subset[key] for key in ("queries", "candidates", "corpus")}
        found[Line("mixed", name, subset["direction"], "ndcg@10")] = subset["ndcg@10"]
    for modality in next(iter(result["subsets"].values()))["by_target"]:
        for name, subset in result["subsets"].items():
            line = Line(f"mixed, {modality} relevant", name, subset["direction"], "ndcg@10")
            found[line] = subset["by_target"][modality]["ndcg@10"]
    return found, same


def _read_mmeb(result):
    same = {"the choice of sets": list(result["sets"])} | {key: result[key] for key in ("version", "instructions")}
    counts = ("queries", "candidates", "distinct_candidates")
    same |= {f"{name}: {key}": of[key] for name, of in result["sets"].items() for key in counts}
    found = {
        Line("own", name, PAPER_DIRECTIONS.get(name, of["category"]), "precision@1"): of["precision@1"]
        for name, of in result["sets"].items()
    }
    return found, same


def _read_covr(result):
    same = {key: result[key] for key in ("rows", "gallery", "coverage", "frames")}
    same |= {"squash": result["source"]["squash"], "weighting by scores": result["weighted"] is not None}
    found = {
        Line(f"gallery, {name} of frames", "WebVid-CoVR", "it→video", metric): value
        for name in ("mean", "weighted")
        for metric, value in (result[name] or {}).items()
        if metric.startswith("hit@")
    }
    return found, same


_READ = {
    "mbeir": _read_tasks,
    "mixbench": _read_mixbench,
    "mmeb": _read_mmeb,
    "covr": _read_covr,
}


def with_means(found: Mapping[Line, float]) -> dict[Line, float]:
    """The same figures, and after those of several tasks in a pool their plain mean."""
    result = {}
    for pool, lines in _by_pool(found).items():
        result |= {line: found[line] for line in lines}
        if len(lines) > 1 and not _several_metrics(lines):
            metric = ", ".join(sorted({line.metric for line in lines}, key=_natural))
            result[Line(pool, "mean", "", metric)] = sum(found[line] for line in lines) / len(lines)
    return result


def mean_by_direction(found: Mapping[Line, float]) -> dict[str, dict[str, float]]:
    """pool → direction → plain mean over its tasks, in the order in which the directions come; of WebVid-CoVR, which is
    one task with several metrics, pool → metric → figure."""
    means: dict[str, dict[str, float]] = {}
    for pool, lines in _by_pool(found).items():
        several = _several_metrics(lines)
        grouped: dict[str, list[float]] = {}
        for line in lines:
            grouped.setdefault(line.metric if several else line.direction, []).append(found[line])
        means[pool] = {group: sum(values) / len(values) for group, values in grouped.items()}
    return means


def _by_pool(found: Mapping[Line, float]) -> dict[str, list[Line]]:
    pools: dict[str, list[Line]] = {}
    for line in found:
        pools.setdefault(line.pool, []).append(line)
    return pools


def _several_metrics(lines: Sequence[Line]) -> bool:
    return len({line.task for line in lines}) < len(lines)


def ranked_tasks(run: dict) -> tuple[str, dict[str, str]]:
    """The pool whose ranks say most, `"global"` if it was searched, and task → direction of what was searched in it:
    the names of the records, `records/TASK.POOL.jsonl`. MMEB and WebVid-CoVR have none of that form."""
    tasks = run["result"].get("tasks") or run["result"].get("subsets") or {}
    scope = "global" if any("global" in task for task in tasks.values()) else "local"
    return scope, {name: task["direction"] for name, task in tasks.items()}


def check_runs_comparable(runs: Mapping[str, dict]) -> None:
    """
    Args:
        runs: name → as `read_run` gives it.

    Raises:
        ValueError: fewer than two runs; they differ in protocol, limit, instructions, version, tasks, scopes, numbers
            of queries or candidates, or in what was skipped. What differs is named.
    """
    if len(runs) < 2:
        raise ValueError("there is nothing to compare: name two runs or more")
    (first, one), *others = runs.items()
    for name, other in others:
        for what, a, b in _differences(one, other):
            if a != b:
                raise ValueError(f"{first} and {name} are not comparable: {what} differs, {_shown(a)} and {_shown(b)}")


def _differences(one: dict, other: dict):
    """(what, its value in one, in the other) of all that must be equal, the most telling first."""
    for key in _SETTINGS:
        yield key, one.get(key), other.get(key)
    a, b = (_identity(run) for run in (one, other))
    for what in dict.fromkeys((*a, *b)):
        yield what, a.get(what), b.get(what)


def _identity(run: dict) -> dict:
    _, same = _READ[run["protocol"]](run["result"])
    return same | {f"skipped rows of {name}": sorted(rows) for name, rows in run["result"].get("skipped", {}).items()}


def _shown(value) -> str:
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(map(str, value[:3]))}{', …' if len(value) > 3 else ''})"
    return "none" if value is None else str(value)


def comparison_table(runs: Mapping[str, dict]) -> str:
    """Lines for a terminal: of each task in each pool the first run's figure, then each other's with what it gained.

    Args:
        runs: name → as `read_run` gives it; two or more.

    Raises:
        ValueError: see `check_runs_comparable`.
    """
    rows = [("pool", "task", "", "in %", *runs), *_rows(runs, "{} {:+z6.1f}".format)]
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row):
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[4:], widths[4:]))
        return f"{left}  {right}".rstrip()

    return "\n".join([*map(line, rows), _footer(runs)])


def comparison_markdown(runs: Mapping[str, dict]) -> str:
    """The same as a markdown table, and after it the means by direction, where a direction has several tasks.

    Raises:
        ValueError: see `check_runs_comparable`.
    """
    rows = _rows(runs, "{} ({:+z.1f})".format)
    parts = [_markdown(("pool", "task", "direction", "in %"), runs, rows), _footer(runs)]
    by_direction = _direction_rows(runs)
    if by_direction:
        parts += ["Means over the tasks of a direction:", _markdown(("pool", "direction"), runs, by_direction)]
    return "\n\n".join(parts)


def _rows(runs: Mapping[str, dict], changed: Callable[[str, float], str]) -> list[tuple[str, ...]]:
    check_runs_comparable(runs)
    found = [with_means(figures(run)) for run in runs.values()]
    return [
        (line.pool, line.task, line.direction, line.metric, *_cells([of[line] for of in found], changed))
        for line in found[0]
    ]


def _direction_rows(runs: Mapping[str, dict]) -> list[tuple[str, ...]]:
    """None where each direction has one task, or there is one direction."""
    means = [mean_by_direction(figures(run)) for run in runs.values()]
    rows = [
        (pool, direction, *_cells([of[pool][direction] for of in means], "{} ({:+z.1f})".format))
        for pool, directions in means[0].items()
        for direction in directions
    ]
    return rows if len(means[0]) < len(rows) < len(figures(next(iter(runs.values())))) else []


def _cells(values: Sequence[float], changed: Callable[[str, float], str]) -> list[str]:
    base = values[0]
    return [f"{base:.1f}", *(changed(f"{value:.1f}", value - base) for value in values[1:])]


def _markdown(left: Sequence[str], runs: Mapping[str, dict], rows: Sequence[Sequence[str]]) -> str:
    lines = [(*left, *runs), ("---",) * len(left) + ("---:",) * len(runs), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _footer(runs: Mapping[str, dict]) -> str:
    name, first = next(iter(runs.items()))
    text = f"{first['protocol']}; the others' figures with their difference to {name}, in points."
    if first.get("limit") is not None:
        text += f" A smoke run: --limit {first['limit']}, not the benchmark's figures."
    skipped = sum(map(len, first["result"].get("skipped", {}).values()))
    if skipped:
        text += f" {skipped} rows were skipped, in all runs the same."
    return text


def _natural(metric: str) -> tuple[str, int]:
    name, _, k = metric.partition("@")
    return name, int(k)
