"""MMEB's result as a table in the form of the GCL paper's table 2, with its columns next to ours. In percent."""

from universal_gcl.evaluation.mmeb.sets import CATEGORIES, PAPER_DIRECTIONS
from universal_gcl.evaluation.paper import markdown_table, paper_table, terminal_table


def mmeb_table(result: dict, *, markdown: bool = False) -> str:
    """
    The paper's sets in its order, then the others by category, then the averages.

    Args:
        result: the result of `evaluation.mmeb.measure.evaluate_mmeb`. The paper's columns are shown if the result is of
            version 1, as in the paper, and has one of the paper's sets.
        markdown: for a file, else for a terminal.
    """
    ours = {name: one["precision@1"] for name, one in result["sets"].items()}
    columns, paper = paper_table("mmeb")
    shown = result["version"] == 1 and any(name in PAPER_DIRECTIONS for name in ours)
    if not shown:
        columns = []

    def row(label: str, figure: float, figures: list[float] | None = None) -> list[str]:
        theirs = [f"{value:.1f}" for value in figures] if figures else ["–"] * len(columns)
        return [label, *theirs, f"{100 * figure:.1f}"]

    lines = []
    figures = {name: paper[f"{name.split('_')[0]} {way}"] for name, way in PAPER_DIRECTIONS.items()}
    for name, way in PAPER_DIRECTIONS.items():
        if name in ours:
            lines.append(row(f"{way:<6}{name}", ours[name], figures[name] if shown else None))
    for category, names in CATEGORIES.items():
        lines += [
            row(f"{category[:5]:<6}{name}", ours[name]) for name in names if name in ours.keys() - PAPER_DIRECTIONS
        ]
    for group, mean in result["averages"].items():
        means = None
        if group == "paper" and shown:
            means = [sum(column) / len(column) for column in zip(*figures.values())]
        label = {"all": f"average of {len(ours)}", "paper": "average of the paper's 12"}.get(group, f"average {group}")
        lines.append(row(label, mean, means))
    notes = []
    missing = sum(one["missing_queries"] + one["missing_candidates"] for one in result["sets"].values())
    if missing:
        notes.append(f"{missing} queries and candidates could not be read and count as misses; results.json names them")
    if result["limit"] is not None:
        notes.append(f"a smoke run on the first {result['limit']} queries of each set: not comparable")
    if markdown:
        return "\n\n".join([markdown_table(["precision@1 in %", *columns, "ours"], lines), *notes])
    return "\n".join([terminal_table(["precision@1 in %"], columns, ["ours"], lines), *notes])
