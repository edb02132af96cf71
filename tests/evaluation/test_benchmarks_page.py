"""docs/benchmarks.md: the paper's figures are those of paper_tables.json, what is computed is computed, and
the commands exist. To make the blocks between markers anew: python -m tests.evaluation.test_benchmarks_page"""

import json
import re
import shlex
from pathlib import Path

import pytest
import typer
from PIL import Image

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from universal_gcl import cli
from universal_gcl.evaluation.paper import paper_table

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "benchmarks.md"
MARKED = re.compile(r"(<!-- begin (\w+) -->\n).*?(<!-- end \2 -->)", re.DOTALL)
# M-BEIR's test pools: task, rows of the pool, queries, as counted by mteb 2.26 (its descriptive_stats)
POOLS = (
    ("visualnews_task0", "t→i", 542_246, 19_995), ("mscoco_task0", "t→i", 5_000, 24_809),
    ("fashion200k_task0", "t→i", 201_824, 1_719), ("webqa_task1", "t→t", 544_457, 2_455),
    ("edis_task2", "t→it", 1_047_067, 3_241), ("webqa_task2", "t→it", 403_196, 2_511),
    ("visualnews_task3", "i→t", 537_568, 20_000), ("mscoco_task3", "i→t", 24_809, 5_000),
    ("fashion200k_task3", "i→t", 61_707, 4_889), ("nights_task4", "i→i", 40_038, 2_120),
    ("oven_task6", "it→t", 676_667, 50_004), ("infoseek_task6", "it→t", 611_651, 11_323),
    ("fashioniq_task7", "it→i", 74_381, 6_003), ("cirr_task7", "it→i", 21_551, 4_170),
    ("oven_task8", "it→it", 335_135, 14_741), ("infoseek_task8", "it→it", 481_782, 17_593),
)  # fmt: skip
RATES = (50, 200, 1000, 5000)  # rows a second
SELF_CHECKS = (  # row of the paper's table 3, task, column of public weights
    ("WebQA t→t", "webqa_task1"), ("MSCOCO i→t", "mscoco_task3"), ("MSCOCO t→i", "mscoco_task0"),
    ("NIGHTS i→i", "nights_task4"), ("EDIS t→it", "edis_task2"), ("WebQA t→it", "webqa_task2"),
)  # fmt: skip


def rows_by_modality():
    """Modality → candidates and queries of M-BEIR together."""
    counts = {"i": 0, "t": 0, "it": 0}
    for _, direction, candidates, queries in POOLS:
        query, target = direction.split("→")
        counts[query] += queries
        counts[target] += candidates
    return counts


def table(*lines):
    head, *rest = lines
    rule = ["---"] + ["---:"] * (len(head) - 1)
    return "".join(f"| {' | '.join(line)} |\n" for line in (head, rule, *rest))


def paper_markdown(name):
    """A table of the paper, with its averages if it has tasks for rows."""
    columns, rows = paper_table(name)
    digits = 1 if name == "mmeb" else 2
    shown = [name.replace("_", " ").replace("CL+intra-modality-sep", "CL, intra-modality sep.") for name in columns]
    lines = [[row, *(f"{value:.{digits}f}" for value in values)] for row, values in rows.items()]
    if len(rows) > 4:
        means = [sum(column) / len(rows) for column in zip(*rows.values())]
        lines.append(["**average**", *(f"**{mean:.{digits}f}**" for mean in means)])
    return table(["", *shown], *lines)


def pools_markdown():
    lines = [[task, direction, f"{pool:,}", f"{queries:,}"] for task, direction, pool, queries in POOLS]
    total = [f"{sum(pool[column] for pool in POOLS):,}" for column in (2, 3)]
    return table(["task", "direction", "candidates", "queries"], *lines, ["**all**", "", *total])


def sizes():
    counts = rows_by_modality()
    decoded = counts["i"] + counts["it"]
    return {
        "M-BEIR, all 16 tasks, both pools": (sum(counts.values()), decoded),
        "M-BEIR, cirr_task7 alone, local": (21_551 + 4_170, 21_551 + 4_170),
        "WebVid-CoVR (2,556 rows, 15 frames a target)": (2_556 * 16, 2_556 * 16),
        "MixBench, all four sets": (
            984 + 1_000 + 981 + 1_000 + 984 + 4_421 + 981 + 1_000,
            1_000 + 656 + 2_948 + 654 + 667,
        ),
    }


def duration(seconds):
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def times_markdown():
    lines = [
        [name, f"{rows:,}", f"{decoded:,}", *(duration(rows / rate) for rate in RATES)]
        for name, (rows, decoded) in sizes().items()
    ]
    return table(["", "rows", "of them with an image", *(f"at {rate:,} rows/s" for rate in RATES)], *lines)


def decoding_markdown():
    """What preparing images takes, from results/benchmarks/pipeline.json."""
    found = json.loads((ROOT / "results" / "benchmarks" / "pipeline.json").read_text())
    rate = found["data"]["made"]["images"]["processor_on_pil"]["images_per_second"]["median"]
    decoded = sizes()["M-BEIR, all 16 tasks, both pools"][1]
    return (
        f"Measured (`{found['environment']['command']}`, {found['environment']['cpu']['name']}): the image processor "
        f"prepares {rate:.0f} images a second and core. Computed from it: M-BEIR's {decoded:,} images keep 16 such "
        f"cores busy for {duration(decoded / rate / 16)}, whatever the GPU.\n"
    )


def self_checks_markdown():
    columns, rows = paper_table("mbeir_local")
    clip, vista = (columns.index(name) for name in ("CLIP-SF_pretrained", "VISTA_pretrained"))
    lines = [[task, f"{rows[row][clip]:.2f}"] for row, task in SELF_CHECKS]
    return (
        table(["CLIP ViT-L/14, local pool", "R@5 in %"], *lines)
        + f"\nbge-base-en-v1.5, as text tower of VISTA, webqa_task1: {rows['WebQA t→t'][vista]:.2f} (2,239 of 2,455).\n"
    )


BLOCKS = {name: lambda name=name: paper_markdown(name) for name in ("mbeir_local", "mbeir_global", "mmeb", "covr")}
BLOCKS |= {"ablation": lambda: paper_markdown("ablation"), "pools": pools_markdown, "times": times_markdown}
BLOCKS |= {"decoding": decoding_markdown, "self_checks": self_checks_markdown}


def rendered():
    return MARKED.sub(lambda match: match[1] + BLOCKS[match[2]]() + match[3], PAGE.read_text(encoding="utf-8"))


def test_the_page_shows_the_papers_figures_and_what_is_computed():
    assert rendered() == PAGE.read_text(encoding="utf-8"), "run python -m tests.evaluation.test_benchmarks_page"
    assert set(re.findall(r"<!-- begin (\w+) -->", PAGE.read_text(encoding="utf-8"))) == set(BLOCKS)


def test_averages_are_the_papers_own():
    """Headline results as the paper prints them."""
    expected = {"mbeir_local": (30.18, 35.56, 28.51, 30.42), "mbeir_global": (21.18, 34.06, 14.92, 21.89)}
    for name, averages in expected.items():
        last = paper_markdown(name).splitlines()[-1].replace("*", "").split(" | ")[1:]
        last = [float(cell.strip(" |")) for cell in last]
        assert (last[0], last[3], last[4], last[6]) == pytest.approx(averages, abs=0.011)


def test_counts_add_up():
    assert 5_600_000 < sum(pool for _, _, pool, _ in POOLS) < 5_615_000 and len(POOLS) == 16


def commands():
    """Each `gcl …` line of the page's shell blocks, continued lines joined."""
    text = PAGE.read_text(encoding="utf-8")
    for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if "gcl" in words:
                yield words[words.index("gcl") + 1 :]


def _params():
    for words in commands():
        yield pytest.param(words, id=" ".join(words)[:60])


@pytest.mark.parametrize("words", list(_params()))
def test_commands_and_options_exist(words):
    command, names = typer.main.get_command(cli.app), list(words)
    while hasattr(command, "commands"):
        command = command.commands[names.pop(0)]
    options = {option for param in command.params for option in (*param.opts, *param.secondary_opts)}
    for word in names:
        if word.startswith("--"):
            assert word in options, f"{word} is no option of gcl {' '.join(words[:2])}"


def test_the_snippet_prints_the_rate(tmp_path, monkeypatch, capfd):
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "MODEL")
    tiny_processor("clip").save_pretrained(tmp_path / "MODEL")
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (32, 32), (number, 9, 9)).save(tmp_path / "photos" / f"{number}.jpg")
    monkeypatch.chdir(tmp_path)
    [snippet] = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    exec(snippet, {})
    assert re.search(r"3 of 3 \w+, [\d.,e+]+ \w+/s", capfd.readouterr().err)


if __name__ == "__main__":
    PAGE.write_text(rendered(), encoding="utf-8")
