"""docs/recipes.md: its figures are those of paper_tables.json, and its recipes parse as they are called. To
make the blocks between markers anew: python -m tests.test_recipes_page"""

import re
import shlex
from pathlib import Path

import pytest

from universal_gcl.evaluation.paper import paper_table
from universal_gcl.training.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "recipes.md"
MARKED = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
TABLES = ("mbeir_global", "mbeir_local", "mmeb", "covr", "ablation", "tinyclip")
# what is trained, its recipe and options, and its columns in the paper's tables
ROWS = (
    ("VISTA, pretrained (stage 1)", None, "", ("VISTA_pretrained", "VISTA_pre")),
    ("VISTA, CL+Triplet (stage 2)", None, "", ("VISTA_CL+Triplet",)),
    ("VISTA, CL", "vista", "--loss cl", ("VISTA_CL+Pairwise", "VISTA_CL")),
    ("VISTA, CL with AlignCLIP's separation", "vista", "--loss alignclip", ("CL+intra-modality-sep",)),
    ("VISTA, GCL", "vista", "", ("VISTA_GCL+Pairwise", "VISTA_GCL")),
    ("CLIP ViT-L/14, pretrained", None, "", ("CLIP-SF_pretrained", "CLIP-SF_pre")),
    ("CLIP ViT-L/14, CL", "clip", "--loss cl", ("CLIP-SF_CL+Pairwise", "CLIP-SF_CL")),
    ("CLIP ViT-L/14, CL with AlignCLIP's separation", "clip", "--loss alignclip", ()),
    ("CLIP ViT-L/14, GCL", "clip", "", ("CLIP-SF_GCL+Pairwise", "CLIP-SF_GCL")),
    ("TinyCLIP, pretrained", None, "", ("TinyCLIP-SF",)),
    ("TinyCLIP, CL", "tinyclip", "--loss cl", ()),
    ("TinyCLIP, CL with AlignCLIP's separation", "tinyclip", "--loss alignclip", ()),
    ("TinyCLIP, GCL", "tinyclip", "", ("TinyCLIP-SF+GCL",)),
)
ABLATIONS = (  # column of table 5, options
    ("GCL w/o Li2t,Lt2i", '--direction_weights "{i->t: 0, t->i: 0}"'),
    ("GCL w/o Li2it,Lt2it", '--direction_weights "{i->it: 0, t->it: 0}"'),
    ("GCL w/o Lit2i,Lit2t", '--direction_weights "{it->i: 0, it->t: 0}"'),
    ("GCL", ""),
)


def figure(name, columns):
    """The average of a column of the paper's table `name` (of covr: R@1), or None."""
    names, rows = paper_table(name)
    place = next((names.index(column) for column in columns if column in names), None)
    if place is None:
        return None
    single = {"covr": "R@1", "tinyclip": "mbeir_global_avg"}.get(name)
    figures = [rows[single][place]] if single else [row[place] for row in rows.values()]
    return sum(figures) / len(figures)


def recipes_markdown():
    lines = [
        "|  | recipe and options | M-BEIR global | M-BEIR local | MMEB | CoVR R@1 |\n",
        "| --- | --- | ---: | ---: | ---: | ---: |\n",
    ]
    for label, recipe, options, columns in ROWS:
        found = {name: figure(name, columns) for name in TABLES}
        pools = next(
            (found[name] for name in ("mbeir_global", "ablation", "tinyclip") if found[name] is not None), None
        )
        cells = [(pools, 2), (found["mbeir_local"], 2), (found["mmeb"], 1), (found["covr"], 2)]
        shown = ["–" if value is None else f"{value:.{digits}f}" for value, digits in cells]
        name = "–" if recipe is None else f"[{recipe}.yaml](../hub_configs/lcs558k/{recipe}.yaml)"
        name += f" `{options}`" if options else ""
        lines.append(f"| {' | '.join([label, name, *shown])} |\n")
    return "".join(lines)


def ablations_markdown():
    lines = ["| options | the paper's column | average |\n| --- | --- | ---: |\n"]
    for column, options in ABLATIONS:
        name = column.replace("w/o L", "without L").replace(",L", ", L")
        lines.append(f"| {f'`{options}`' if options else '–'} | {name} | {figure('ablation', [column]):.2f} |\n")
    return "".join(lines)


BLOCKS = {"recipes": recipes_markdown, "ablations": ablations_markdown}


def rendered():
    return MARKED.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[3], PAGE.read_text(encoding="utf-8"))


def test_the_page_shows_the_papers_figures():
    assert rendered() == PAGE.read_text(encoding="utf-8"), "run python -m tests.test_recipes_page"
    assert set(re.findall(r"<!-- begin (\w+) -->", PAGE.read_text(encoding="utf-8"))) == set(BLOCKS)


def test_what_is_said_of_cl_on_clip_is_in_the_papers_table():
    columns, rows = paper_table("mbeir_local")
    page = PAGE.read_text(encoding="utf-8").replace("\n ", "")
    for task in ("WebQA t→t", "CIRR it→i"):
        before, after = (rows[task][columns.index(f"CLIP-SF_{name}")] for name in ("pretrained", "CL+Pairwise"))
        assert f"{task} {before:.2f} → {after:.2f}" in page


def test_averages_are_the_papers_own():
    """As the paper prints them: headline results, table 6, and the ablation's."""
    assert figure("mbeir_global", ["VISTA_GCL+Pairwise"]) == pytest.approx(34.06, abs=0.011)
    assert figure("mbeir_global", ["VISTA_CL+Triplet"]) == pytest.approx(25.28, abs=0.011)
    assert figure("ablation", ["CL+intra-modality-sep"]) == pytest.approx(30.45, abs=0.011)
    assert figure("ablation", ["GCL w/o Li2t,Lt2i"]) == pytest.approx(28.36, abs=0.011)
    assert figure("mmeb", ["VISTA_GCL+Pairwise"]) == pytest.approx(44.9, abs=0.051)
    assert (figure("covr", ["CLIP-SF_GCL"]), figure("tinyclip", ["TinyCLIP-SF+GCL"])) == (37.60, 22.71)
    assert figure("tinyclip", ["VISTA_GCL+Pairwise"]) is None


def test_every_recipe_has_its_row():
    recipes = {path.stem for path in (ROOT / "hub_configs/lcs558k").iterdir()}
    assert {name for _, name, _, _ in ROWS if name} == recipes
    page = PAGE.read_text(encoding="utf-8")
    names = [path.name for path in (ROOT / "hub_configs").glob("*.yaml")]
    names += [f"runs/{path.name}" for path in (ROOT / "runs").glob("*.sh")]
    assert not [name for name in names if f"`{name}`" not in page]


def test_commands_parse(monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    page = PAGE.read_text(encoding="utf-8")
    commands = [line for block in re.findall(r"```bash\n(.*?)```", page, re.DOTALL) for line in block.splitlines()]
    runs = [shlex.split(re.split("train.py |gcl train ", line)[1]) for line in commands if is_training(line)]
    assert len(runs) >= 5
    others = [*(options for _, options in ABLATIONS), *(options for _, _, options, _ in ROWS)]
    others += re.findall(r"`(--[a-z_.0-9]+ [a-z_0-9]+)`", page)
    assert "--denominator without_other_positive" in others and "--peft.r 16" in others
    runs += [["lcs558k/vista", *shlex.split(options)] for options in dict.fromkeys(others)]
    own = tmp_path / "own.yaml"
    own.write_text(re.search(r"```yaml\n(.*?)```", page, re.DOTALL)[1])
    for run in [*runs, [str(own)]]:
        training = parse_recipe([*run, "--use_cpu"]).training
        if "{i->t: 0, t->i: 0}" in run:
            assert training.direction_weights == {"i→t": 0, "t→i": 0}


def is_training(command):
    return "train.py " in command or command.startswith("gcl train ")


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
