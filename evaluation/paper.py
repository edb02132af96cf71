"""The tables of the paper (arXiv 2509.25638, NeurIPS 2025 camera-ready), to stand beside ours. Rates in percent."""

import json
from functools import cache
from pathlib import Path

_FILE = Path(__file__).with_name("paper_tables.json")
_TABLES = {
    "mbeir_global": "table1_mbeir_global_R@50",
    "mmeb": "table2_mmeb_R@1",
    "mbeir_local": "table3_mbeir_local_R@5_(R@10 F200K,FashionIQ)",
    "covr": "table4_covr",
    "ablation": "table5_ablation_mbeir_global_R@50",
}


def paper_table(name: str) -> tuple[list[str], dict[str, list[float]]]:
    """The columns (a model and how it was trained, e.g. `"CLIP-SF_GCL+Pairwise"`) and rows (e.g. `"CIRR it>i"` → one
    figure for each column) of a table: mbeir_local, mbeir_global, mmeb, covr or ablation. Averages are not rows."""
    table = dict(_read()[_TABLES[name]])
    columns = table.pop("columns", _read()["columns"])
    return columns, table.get("rows", table)


@cache
def _read() -> dict:
    return json.loads(_FILE.read_text(encoding="utf-8"))
