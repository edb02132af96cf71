"""M-BEIR's result as the paper's tables have it: rows in its order, its columns beside ours. Rates in percent."""

from evaluation.mbeir_tasks import MODALITIES, MBEIRTask, parse_task
from evaluation.paper import paper_table

_GLOBAL_K = 50
_ROWS = 16
_MISSING = "–"


def paper_metric(task: MBEIRTask, scope: str) -> str:
    """Which of the metrics the paper's table of this scope reports."""
    return f"hit@{task.k if scope == 'local' else _GLOBAL_K}"


def average_of(result: dict, scope: str) -> float:
    """The plain mean of the tasks' figures, in 0..1."""
    figures = [_figure(task, scope) for task in result["tasks"].values()]
    return sum(figures) / len(figures)


def mbeir_table(result: dict, scope: str, *, markdown: bool = False) -> str:
    """The table of one scope.

    Args:
        result: of `evaluation.mbeir.evaluate_mbeir`.
        markdown: for a file, else for a terminal.

    The paper's columns stand beside ours where it has any of the rows, its average where all its 16 are there.
    """
    columns, paper = paper_table(f"mbeir_{scope}")
    tasks = {name: parse_task(name) for name in result["tasks"]}
    rows = {
        name: paper.get(f"{t.dataset} {MODALITIES[t.query]}>{MODALITIES[t.candidate]}") for name, t in tasks.items()
    }
    theirs = [row for row in rows.values() if row is not None]
    columns = columns if theirs else []
    header = [f"{scope} pool", "hit", "ours", *(name.replace("_", " ") for name in columns)]
    lines = []
    for name, of in result["tasks"].items():
        task, row = tasks[name], rows[name]
        shown = [_MISSING] * len(columns) if row is None else [f"{value:.2f}" for value in row]
        label = f"{task.dataset} {task.direction}"
        lines.append([label, of[scope]["paper_metric"].removeprefix("hit"), f"{100 * _figure(of, scope):.2f}", *shown])
    means = [_MISSING] * len(columns)
    if len(theirs) == _ROWS:
        means = [f"{sum(values) / _ROWS:.2f}" for values in zip(*theirs, strict=True)]
    label = f"average of {len(lines)}"
    lines.append([label, "", f"{100 * result['average'][scope]:.2f}", *means])
    table = _markdown(header, lines) if markdown else _terminal(header, lines)
    return "\n".join([table, *([""] if markdown else []), _footer(result, scope, bool(theirs))])


def _figure(task: dict, scope: str) -> float:
    return task[scope][task[scope]["paper_metric"]]


def _markdown(header: list[str], lines: list[list[str]]) -> str:
    rows = [header, ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _terminal(header: list[str], lines: list[list[str]]) -> str:
    # the long names of the paper's columns take two lines: model and training
    split = [name.rsplit(" ", 1) if place > 2 else ["", name] for place, name in enumerate(header)]
    rows = [[part[0] for part in split], [part[1] for part in split], *lines]
    widths = [max(len(row[place]) for row in rows) for place in range(len(header))]
    shown = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join([row[0].ljust(widths[0]), *cells[1:]]) for row, cells in zip(rows, shown, strict=True))


def _footer(result: dict, scope: str, beside_paper: bool) -> str:
    notes = ["In %, the share of queries with a positive among the first k"]
    notes[0] += "; the other columns are the paper's." if beside_paper else "."
    if result["limit"] is not None:
        notes.append(
            f"A smoke run: the first {result['limit']} queries of each task over as many candidates and the positives. "
            "Its figures are far too high and must not be compared."
        )
    outside = {name: task[scope]["positives_outside"] for name, task in result["tasks"].items()}
    if any(outside.values()):
        named = ", ".join(f"{name} {count}" for name, count in outside.items() if count)
        notes.append(f"Positives that are in no pool searched, and can't be found: {named}.")
    skipped = sum(map(len, result["skipped"].values()))
    if skipped:
        notes.append(f"{skipped} rows could not be read and were left out; a query without embedding is a miss.")
    empty = sum(map(len, result["empty"].values()))
    if empty:
        notes.append(f"{empty} rows hold nothing once their text is cleaned, and have no embedding.")
    return "\n".join(notes)
