"""M-BEIR's result in the form of the paper's tables: its rows in its order, its columns next to ours. In percent."""

from universal_gcl.evaluation.mbeir.tasks import MBEIRTask, parse_task
from universal_gcl.evaluation.paper import markdown_table, paper_table, terminal_table

_GLOBAL_K = 50
_ROWS = 16
_MISSING = "–"


def paper_metric(task: MBEIRTask, scope: str) -> str:
    """The metric that the paper's table of this scope reports."""
    return f"hit@{task.k if scope == 'local' else _GLOBAL_K}"


def average_of(result: dict, scope: str) -> float:
    """The plain mean of the tasks' figures, in 0..1."""
    figures = [_figure(task, scope) for task in result["tasks"].values()]
    return sum(figures) / len(figures)


def mbeir_table(result: dict, scope: str, *, markdown: bool = False) -> str:
    """The table of one scope.

    Args:
        result: the result of `evaluation.mbeir.measure.evaluate_mbeir`.
        markdown: for a file, else for a terminal.

    The paper's columns are shown if one of its tasks was measured, its average if all 16 were.
    """
    columns, paper = paper_table(f"mbeir_{scope}")
    header = [f"{scope} pool", "hit", "ours"]
    tasks = {name: parse_task(name) for name in result["tasks"]}
    labels = {name: f"{task.dataset} {task.direction}" for name, task in tasks.items()}  # the rows of the paper
    theirs = [paper[label] for label in labels.values() if label in paper]
    columns = columns if theirs else []
    lines = []
    for name, of in result["tasks"].items():
        row = paper.get(labels[name])
        shown = [_MISSING] * len(columns) if row is None else [f"{value:.2f}" for value in row]
        lines.append(
            [labels[name], of[scope]["paper_metric"].removeprefix("hit"), f"{100 * _figure(of, scope):.2f}", *shown]
        )
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
            f"A smoke run: the first {result['limit']} queries of each task search as many candidates and the "
            "positives. These figures are far too high and must not be compared."
        )
    outside = {name: task[scope]["positives_outside"] for name, task in result["tasks"].items()}
    if any(outside.values()):
        named = ", ".join(f"{name} {count}" for name, count in outside.items() if count)
        notes.append(f"Positives that can't be found, since they are in no pool that was searched: {named}.")
    skipped = sum(map(len, result["skipped"].values()))
    if skipped:
        notes.append(f"{skipped} rows could not be read and were left out; a query without embedding is a miss.")
    empty = sum(map(len, result["empty"].values()))
    if empty:
        notes.append(f"{empty} rows are empty once their text is cleaned, and have no embedding.")
    return "\n".join(notes)
