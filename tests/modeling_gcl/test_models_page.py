"""docs/models.md lists what the tests test."""

import re
from pathlib import Path

from tests.modeling_gcl.test_backbone import REFUSED
from tests.support.backbones import FAMILIES

PAGE = (Path(__file__).parents[2] / "docs/models.md").read_text()
ROWS = [[cell.strip() for cell in line.strip("|").split("|")] for line in PAGE.splitlines() if line.startswith("| ")][
    1:
]


def model_types(how):
    return {name for row in ROWS if how(row[2]) for name in re.findall(r"`([\w-]+)`", row[0])}


def test_every_family_of_the_loop_is_in_the_table_and_the_other_way_round():
    towers = {"VisionTextDualEncoder": "vision-text-dual-encoder", "vista": "vista"}
    tested = {towers.get(family.name, name.split(",")[0]) for name, family in FAMILIES.items()}
    assert model_types(lambda how: how != "not") == tested


def test_what_is_not_taken_is_tested_to_be_refused():
    assert model_types(lambda how: how == "not") == set(REFUSED) - {"clip_text_model"}


def test_links_within_the_page():
    headings = {line[3:].lower().replace(" ", "-") for line in PAGE.splitlines() if line.startswith("## ")}
    for anchor in re.findall(r"\(#([^)]+)\)", PAGE):
        assert anchor in headings
