"""Runs of one benchmark side by side: which runs may be compared, and their table. All figures are in percent."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Line:
    """One line of the table: a metric of a task, or of a mean over tasks, in one pool."""

    pool: str
    task: str
    direction: str
    metric: str


@dataclass(frozen=True)
class RankedTasks:
    """The tasks for which a run has records of the positives' ranks, in the pool whose ranks are the most informative.

    Attributes:
        pool: the pool of these records; `records/TASK.POOL.jsonl` has the records of a task.
        directions, queries: task → its direction, and its number of queries.
    """

    pool: str
    directions: Mapping[str, str]
    queries: Mapping[str, int]


@dataclass(frozen=True)
class Measured:
    """A run in the form in which runs are compared; `evaluation.protocol.Protocol.measured` makes it.

    Attributes:
        protocol: the benchmark's name.
        figures: line → percent, without means.
        conditions: what must be equal in runs that are compared, by name, the most important first.
        ranked: the tasks with records of ranks; None if the benchmark keeps no ranks.
        limit: the number of queries per task of a smoke run, else None.
        num_skipped: how many rows have no embedding.
    """

    protocol: str
    figures: Mapping[Line, float]
    conditions: Mapping[str, object]
    ranked: RankedTasks | None = None
    limit: int | None = None
    num_skipped: int = 0


def with_means(figures: Mapping[Line, float]) -> dict[Line, float]:
    """The same figures. After a pool with several tasks comes the plain mean over them."""
    result: dict[Line, float] = {}
    for pool, lines in _by_pool(figures).items():
        result |= {line: figures[line] for line in lines}
        if len(lines) > 1 and not _several_metrics(lines):
            metric = ", ".join(sorted({line.metric for line in lines}, key=_natural))
            result[Line(pool, "mean", "", metric)] = sum(figures[line] for line in lines) / len(lines)
    return result


def mean_by_direction(figures: Mapping[Line, float]) -> dict[str, dict[str, float]]:
    """pool → direction → plain mean over its tasks, in the order of the figures. For a pool with one task and several
    metrics (WebVid-CoVR): pool → metric → figure."""
    means: dict[str, dict[str, float]] = {}
    for pool, lines in _by_pool(figures).items():
        several = _several_metrics(lines)
        grouped: dict[str, list[float]] = {}
        for line in lines:
            grouped.setdefault(line.metric if several else line.direction, []).append(figures[line])
        means[pool] = {group: sum(values) / len(values) for group, values in grouped.items()}
    return means


def check_runs_comparable(runs: Mapping[str, Measured]) -> None:
    """
    Check that runs may be compared.

    Args:
        runs: name → run.

    Raises:
        ValueError: there are fewer than two runs, or they differ in protocol or conditions. The message says in what.
    """
    if len(runs) < 2:
        raise ValueError("there is nothing to compare: name two runs or more")
    (first, one), *others = runs.items()
    for name, other in others:
        for what, a, b in _conditions_of(one, other):
            if a != b:
                raise ValueError(f"{first} and {name} are not comparable: {what} differs, {_shown(a)} and {_shown(b)}")


def comparison_table(runs: Mapping[str, Measured]) -> str:
    """Lines for a terminal: for each task in each pool the first run's figure, then each other run's with its gain.

    Args:
        runs: name → run; two or more.

    Raises:
        ValueError: see `check_runs_comparable`.
    """
    rows = [("pool", "task", "", "in %", *runs), *_rows(runs, "{} {:+z6.1f}".format)]
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row: Sequence[str]) -> str:
        left = "  ".join(cell.ljust(width) for cell, width in zip(row[:4], widths))
        right = "  ".join(cell.rjust(width) for cell, width in zip(row[4:], widths[4:]))
        return f"{left}  {right}".rstrip()

    return "\n".join([*map(line, rows), _footer(runs)])


def comparison_markdown(runs: Mapping[str, Measured]) -> str:
    """The same as a markdown table, then the means by direction if a direction has several tasks.

    Raises:
        ValueError: see `check_runs_comparable`.
    """
    rows = _rows(runs, "{} ({:+z.1f})".format)
    parts = [_markdown(("pool", "task", "direction", "in %"), runs, rows), _footer(runs)]
    by_direction = _direction_rows(runs)
    if by_direction:
        parts += ["Means over the tasks of a direction:", _markdown(("pool", "direction"), runs, by_direction)]
    return "\n\n".join(parts)


def _by_pool(figures: Mapping[Line, float]) -> dict[str, list[Line]]:
    pools: dict[str, list[Line]] = {}
    for line in figures:
        pools.setdefault(line.pool, []).append(line)
    return pools


def _several_metrics(lines: Sequence[Line]) -> bool:
    return len({line.task for line in lines}) < len(lines)


def _conditions_of(one: Measured, other: Measured) -> Iterator[tuple[str, object, object]]:
    """(what, its value in one, in the other) for everything that must be equal, the most important first."""
    yield "protocol", one.protocol, other.protocol
    for what in dict.fromkeys((*one.conditions, *other.conditions)):
        yield what, one.conditions.get(what), other.conditions.get(what)


def _shown(value: object) -> str:
    if isinstance(value, list):
        return f"{len(value)} ({', '.join(map(str, value[:3]))}{', …' if len(value) > 3 else ''})"
    return "none" if value is None else str(value)


def _rows(runs: Mapping[str, Measured], changed: Callable[[str, float], str]) -> list[tuple[str, ...]]:
    check_runs_comparable(runs)
    figures = [with_means(run.figures) for run in runs.values()]
    return [
        (line.pool, line.task, line.direction, line.metric, *_cells([of[line] for of in figures], changed))
        for line in figures[0]
    ]


def _direction_rows(runs: Mapping[str, Measured]) -> list[tuple[str, ...]]:
    """No rows if each direction has one task, or if there is one direction."""
    means = [mean_by_direction(run.figures) for run in runs.values()]
    rows = [
        (pool, direction, *_cells([of[pool][direction] for of in means], "{} ({:+z.1f})".format))
        for pool, directions in means[0].items()
        for direction in directions
    ]
    return rows if len(means[0]) < len(rows) < len(next(iter(runs.values())).figures) else []


def _cells(values: Sequence[float], changed: Callable[[str, float], str]) -> list[str]:
    base = values[0]
    return [f"{base:.1f}", *(changed(f"{value:.1f}", value - base) for value in values[1:])]


def _markdown(left: Sequence[str], runs: Mapping[str, Measured], rows: Sequence[Sequence[str]]) -> str:
    lines = [(*left, *runs), ("---",) * len(left) + ("---:",) * len(runs), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


def _footer(runs: Mapping[str, Measured]) -> str:
    name, first = next(iter(runs.items()))
    text = f"{first.protocol}; the other runs' figures with their difference to {name}, in points."
    if first.limit is not None:
        text += f" A smoke run (--limit {first.limit}): these are not the benchmark's figures."
    if first.num_skipped:
        text += f" {first.num_skipped} rows were skipped, the same ones in all runs."
    return text


def _natural(metric: str) -> tuple[str, int]:
    name, _, k = metric.partition("@")
    return name, int(k)
