"""docs/performance.md: its figures are those of results/benchmarks, and what is missing says so."""

import re

import pytest
from PIL import Image

from benchmarks import report
from benchmarks.goals import GOALS, Goal
from benchmarks.measurement import summarise

PAGE = "a\n<!-- begin {} -->\nold\n<!-- end {} -->\nb\n"


def series(seconds, bytes=1e6):
    return [{"seconds": s, "bytes": bytes, "gemm_rates": [1e9, 1e9], "dropped": 0} for s in seconds]


def environment():
    return {
        "command": "python -m benchmarks.loss", "git": {"sha": "0123456789", "dirty": False}, "gpus": [], "threads": 2,
        "cpu": {"name": "A processor", "cores": 2, "capability": "AVX2", "bfloat16": {"avx512_bf16": False}},
        "python": "3.11", "packages": {"torch": "2.13.0", "datasets": "5"},
    }  # fmt: skip


def loss_result():
    sizes = {}
    for n, factor in (("1024", 1), ("4096", 16)):
        tiles, autograd = series([factor * s for s in (0.1, 0.2, 0.3)]), series([factor * s for s in (0.5, 0.6, 0.9)])
        references = {"tiles": tiles}
        flops = 0.16e9 * factor
        rows = {"tiles": summarise(tiles, references, flops), "autograd": summarise(autograd, references, flops)}
        sizes[n] = rows | {"open_clip_three_times": summarise([{"dropped": 4}], references)}
    gates = {"tiles": {"loss": 0, "gradient": 0, "flops_by_n2d": 36.5}}
    return {
        "environment": environment(),
        "device": "cpu",
        "dim": 512,
        "not_installed": ["x"],
        "gates": gates,
        "sizes": sizes,
    }


def test_the_page_is_up_to_date():
    """`python -m benchmarks.report` was run after the last benchmark."""
    page = report.PAGE.read_text()
    assert report.render(page, report.load(report.RESULTS)) == page
    assert set(re.findall(r"<!-- begin (\w+) -->", page)) == set(report.BLOCKS)


def test_only_marked_blocks_change_and_unknown_ones_are_named():
    made = report.render(PAGE.format("loss", "loss"), {})
    assert made == PAGE.format("loss", "loss").replace("old\n", report.NOT_MEASURED)
    assert report.render(made, {}) == made
    with pytest.raises(ValueError, match="unknown block 'lost'.*there are answers, "):
        report.render(PAGE.format("lost", "lost"), {})


def test_the_table_shows_medians_ratios_and_what_was_not_steady():
    made = report.render(PAGE.format("loss", "loss"), {"loss": loss_result()})
    assert "| N = | 1,024 | 4,096 |" in made
    assert "| tiles | 200 ms, 1 MB, **1.00** | 3.2 s, 1 MB, **1.00** |" in made
    assert "| autograd, one line | 600 ms, 1 MB, **3.00** | 9.6 s, 1 MB, **3.00** |" in made  # of 5, 3, 3
    assert "| open_clip × 3 | unsteady | unsteady |" in made
    assert "at commit 0123456: A processor, 2 cores, 2 threads" in made and "bfloat16 by emulation" in made
    assert "torch 2.13.0" in made and "datasets" not in made and "not installed: x" in made


def test_gpus_are_not_timed_until_they_are():
    assert "Not timed on GPUs yet" in report.render(PAGE.format("gpu", "gpu"), {})
    timed = loss_result() | {"device": "cuda", "dim": 768}
    timed["environment"]["gpus"] = ["A GPU"]
    made = report.render(PAGE.format("gpu", "gpu"), {"loss-cuda-768": timed})
    assert "D = 768:" in made and "| tiles | 200 ms" in made and ": A GPU, " in made and "Not timed" not in made


def test_goals_are_judged_by_the_median_and_missing_ones_are_not():
    made = report.render(PAGE.format("goals", "goals"), {"loss": loss_result()})
    lines = {line.split(" | ")[0].strip("| "): line for line in made.splitlines() if line.startswith("|")}
    assert len(lines) == len(GOALS) + 2
    assert (
        "| 1.25 (0.62–1.88) | reached |" in lines["time relative to matrix products of 36 N²D flops, 4,096 pairs, fp32"]
    )
    assert "| 3.00 (3.00–5.00) × faster | reached |" in lines["against autograd in one line, 4,096 pairs, fp32"]
    assert "| 1.014 | reached |" in lines["counted flops relative to 36 N²D, 4,096 pairs"]
    assert "| – | not measured |" in lines["a step with GradCache relative to the plain step"]
    slower = Goal("", "", None, at_least=1.3, aim=1.1, lower_is_better=True)
    assert [slower.verdict(x) for x in (1.0, 1.1, 1.2, 1.31)] == ["aim reached", "aim reached", "reached", "missed"]
    quicker = Goal("", "", None, at_least=1.5, aim=2, lower_is_better=False)
    assert [quicker.verdict(x) for x in (2.5, 1.6, 1.4)] == ["aim reached", "reached", "missed"]


def test_the_picture_is_drawn(tmp_path):
    report.draw(loss_result(), tmp_path / "loss.png")
    assert Image.open(tmp_path / "loss.png").size[0] > 1000
