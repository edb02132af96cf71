"""README's figures are those of the files that commands wrote, and what it names exists."""

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


def test_links_lead_somewhere():
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", README) if not link.startswith("http")]
    assert links
    for link in links:
        assert (ROOT / link).exists(), link


def test_recipes_and_configs_named_exist():
    for name in re.findall(r"hub_configs/[\w/.]+\.(?:yaml|sh|md)", README):
        assert (ROOT / name).is_file(), name
