"""M-BEIR's result as the paper's tables have it: rows in its order, its columns beside ours. Rates in percent."""

from universal_gcl.evaluation.mbeir.tasks import MODALITIES, MBEIRTask, parse_task
from universal_gcl.evaluation.paper import markdown_table, paper_table, terminal_table

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
        result: of `evaluation.mbeir.measure.evaluate_mbeir`.
        markdown: for a file, else for a terminal.

    The paper's columns are left out where none of its rows is there; its average stands beside ours where all 16 are.
    """
    columns, paper = paper_table(f"mbeir_{scope}")
    header = [f"{scope} pool", "hit", "ours"]
    tasks = {name: parse_task(name) for name in result["tasks"]}
    keys = {name: f"{of.dataset} {MODALITIES[of.query]}>{MODALITIES[of.candidate]}" for name, of in tasks.items()}
    theirs = [paper[key] for key in keys.values() if key in paper]
    columns = columns if theirs else []
    lines = []
    for name, of in result["tasks"].items():
        task, row = tasks[name], paper.get(keys[name])
        shown = [_MISSING] * len(columns) if row is None else [f"{value:.2f}" for value in row]
        label = f"{task.dataset} {task.direction}"
        lines.append([label, of[scope]["paper_metric"].removeprefix("hit"), f"{100 * _figure(of, scope):.2f}", *shown])
    means = [_MISSING] * len(columns)
    if len(theirs) == _ROWS:
        means = [f"{sum(values) / _ROWS:.2f}" for values in zip(*theirs, strict=True)]
    label = f"average of {len(lines)}"
    lines.append([label, "", f"{100 * result['average'][scope]:.2f}", *means])
    footer = _footer(result, scope, bool(columns))
    if not markdown:
        return f"{terminal_table(header, columns, [], lines)}\n{footer}"
    return f"{markdown_table([*header, *columns], lines)}\n\n{footer}"


def _figure(task: dict, scope: str) -> float:
    return task[scope][task[scope]["paper_metric"]]


def _footer(result: dict, scope: str, with_paper: bool) -> str:
    notes = ["In %, the share of queries with a positive among the first k"]
    notes[0] += "; the other columns are the paper's." if with_paper else "."
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
