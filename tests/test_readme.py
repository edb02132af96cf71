"""README's figures are those of the files that commands wrote, and what it names exists."""

import json
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_every_table_row_comes_from_results():
    written = "\n".join(path.read_text() for path in (ROOT / "results").rglob("*.md"))
    rows = [line for line in README.splitlines() if line.startswith("|") and re.search(r"\d", line)]
    assert rows
    for row in rows:
        assert row in written, row


def test_the_tables_of_lora_are_those_of_its_summary():
    folder = ROOT / "results" / "flickr8k_lora"
    rows = [line for line in (folder / "README.md").read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 12 and set(rows) <= set((folder / "summary.md").read_text().splitlines())


def test_recipes_and_configs_named_exist():
    for name in re.findall(r"hub_configs/[\w/.]+\.(?:yaml|sh|md)", README):
        assert (ROOT / name).is_file(), name


def test_the_tables_of_composed_retrieval_are_those_of_its_runs():
    page = (ROOT / "results" / "composed" / "README.md").read_text().replace("**", "")
    runs = ("stage1", "stage1-centring", "stage1-sum", "stage1-normalized_sum", "cl", "gcl")
    names = ("fashion it→i", "t→i", "t→t", "t→it", "i→t", "it→t", "average")
    for experiment in ("flickr8k", "flickr8k_vista"):
        files = [ROOT / "results" / "composed" / "runs" / f"{experiment}-{run}.json" for run in runs]
        results = [json.loads(file.read_text())["result"] for file in files if file.is_file()]
        lines = [[result["average"] for result in results]]
        for task in reversed(results[0]["tasks"]):
            figures = [result["tasks"][task] for result in results]
            lines.insert(
                0, [{pool: of[pool][of[pool]["paper_metric"]] for pool in ("local", "global")} for of in figures]
            )
        for name, line in zip(names, lines, strict=True):
            cells = [f"{100 * of['local']:.1f} / {100 * of['global']:.1f}" for of in line]
            assert f"| {name} | {' | '.join(cells)} |" in page
