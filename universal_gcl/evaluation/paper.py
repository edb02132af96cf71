"""The tables of the paper (arXiv 2509.25638, NeurIPS 2025 camera-ready), shown next to ours. Rates in percent."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("paper_tables.json")
_TABLES = {
    "mbeir_global": "table1_mbeir_global_R@50",
    "mmeb": "table2_mmeb_R@1",
    "mbeir_local": "table3_mbeir_local_R@5_(R@10 F200K,FashionIQ)",
    "covr": "table4_covr",
    "ablation": "table5_ablation_mbeir_global_R@50",
    "tinyclip": "table6_tinyclip",
}


def paper_table(name: str) -> tuple[list[str], dict[str, list[float]]]:
    """The columns and rows of a table of the paper.

    Args:
        name: mbeir_local, mbeir_global, mmeb, covr, ablation or tinyclip.

    Returns:
        - the columns: a model and how it was trained, e.g. `"CLIP-SF_GCL+Pairwise"`;
        - the rows: e.g. `"CIRR it→i"` → one figure for each column. Averages are not among them, except in tinyclip,
          which has no tasks.
    """
    table = dict(_read()[_TABLES[name]])
    columns = table.pop("columns", _read()["columns"])
    return columns, table.get("rows", table)


def terminal_table(
    left: Sequence[str], columns: Sequence[str], right: Sequence[str], lines: Sequence[Sequence[str]]
) -> str:
    """
    Lines for a terminal; with seven of the paper's columns they fit into 100 characters.

    Args:
        left, columns, right: the header. `columns` are the paper's, whose names take three lines: model, loss, pairing.
        lines: cells as in the header. The first is aligned left, the others right.
    """
    heads = [_head(column) for column in columns]
    header = [[*[""] * len(left), *(head[place] for head in heads), *[""] * len(right)] for place in range(2)]
    rows = [*(header if columns else []), [*left, *(head[2] for head in heads), *right], *lines]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join(" ".join([row[0].ljust(widths[0]), *of[1:]]).rstrip() for row, of in zip(rows, cells, strict=True))


def markdown_table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """The same for a file; the paper's columns read as `"VISTA GCL+Pairwise"`. The first column is aligned left."""
    rows = [[cell.replace("_", " ") for cell in header], ["---"] + ["---:"] * (len(header) - 1), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def _head(column: str) -> tuple[str, str, str]:
    """`"VISTA_GCL+Pairwise"` → `"VISTA", "GCL+", "Pairwise"`."""
    model, _, training = column.partition("_")
    loss, plus, pairing = training.rpartition("+")
    return model, loss + plus, pairing


@cache
def _read() -> dict:
    return json.loads(_FILE.read_text(encoding="utf-8"))
