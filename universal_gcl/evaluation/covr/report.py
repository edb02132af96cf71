"""WebVid-CoVR's result as a table, with the paper's figures. Rates in percent."""

from collections.abc import Mapping, Sequence

from universal_gcl.evaluation.paper import markdown_table, paper_table

WEIGHTINGS = ("mean", "weighted")  # how the frames of a video are joined; see `evaluation.covr.measure`
_KS = (1, 5, 10, 50)  # those of the paper's table 4


def covr_table(result: Mapping, *, limit: int | None = None, markdown: bool = False) -> str:
    """R@k, the paper's table 4 (measured with the mean of the frames), and what was not scored.

    Args:
        result: the result of `evaluation.covr.measure.evaluate_covr`.
        limit: the number of rows of a smoke run.
        markdown: for a file, else for a terminal.
    """
    columns, figures = paper_table("covr")
    ours = [name for name in WEIGHTINGS if result[name] is not None]
    rows = [
        (f"R@{k}", [f"{100 * result[name][f'hit@{k}']:.2f}" for name in ours], [f"{x:.2f}" for x in figures[f"R@{k}"]])
        for k in _KS
    ]
    notes = []
    for name, (found, total) in result["coverage"].items():
        if found < total:
            notes.append(f"{name}: {found:,} of {total:,}; without the others the benchmark is a different, easier one")
    if limit is not None:
        notes.append(f"a smoke run on the first {limit} rows: the gallery is smaller, and recall higher")
    counts = f"{result['rows']:,} queries, {result['gallery']:,} targets."
    if markdown:
        table = markdown_table(["", *ours, *columns], [(label, *cells, *paper) for label, cells, paper in rows])
        legend = f"{counts} Columns other than {' and '.join(ours)} are the paper's, with the mean of the frames."
        return "\n\n".join([table, legend, *notes])

    def line(label: str, cells: Sequence[str], paper: Sequence[str]) -> str:
        return f"{label:<6}" + "".join(f"{cell:>9}" for cell in cells) + "  |" + "".join(f"{c:>12}" for c in paper)

    lines = [line("", ours, columns), *(line(*row) for row in rows)]
    return "\n".join([*lines, f"{counts} Right of the bar: the paper's, with the mean of the frames", *notes])
