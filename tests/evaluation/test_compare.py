"""Runs of a benchmark side by side: the table, what is refused, and the pictures."""

import json
import math

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.support.planted import PlantedModel
from universal_gcl.evaluation.benchmark import RetrievalTask, evaluate_tasks
from universal_gcl.evaluation.benchmark_plots import RANK_BINS, direction_bars, first_rank_shares, rank_histogram
from universal_gcl.evaluation.benchmark_report import comparison_markdown, comparison_table, mean_by_direction
from universal_gcl.evaluation.commands.compare import compare, compare_variants
from universal_gcl.evaluation.protocols import protocol_of, read_run, read_runs
from universal_gcl.retrieval.embed import embed_rows

POOLS = {"a": ["a1", "a2", "a3"], "b": ["b1", "b2"]}
# angles in the plane: the good model has what q1 and q2 look for, a1 and b2, nearest to them, the bad one farthest away
GOOD = {"q1": 0, "q2": 90, "a1": 5, "a2": 30, "a3": 50, "b1": 20, "b2": 88}
BAD = {"q1": 0, "q2": 90, "a1": 60, "a2": 30, "a3": 50, "b1": 20, "b2": 1}
PAPER_METRIC = {"fashioniq_task7": "hit@10"}


def angle(degrees):
    return math.cos(math.radians(degrees)), math.sin(math.radians(degrees))


def measured(folder, angles, **settings):
    """A run as a benchmark's command writes it: q1 looks for a1 in a, q2 for b2 in b."""
    model = PlantedModel({name: angle(at) for name, at in angles.items()})
    rows = {name: [(row, {"text": row}) for row in names] for name, names in POOLS.items()}
    tasks = [
        RetrievalTask("fashioniq_task7", "it→i", [("q1", {"text": "q1"})], {"q1": ["a1"]}, "a"),
        RetrievalTask("cirr_task7", "it→i", [("q2", {"text": "q2"})], {"q2": ["b2"]}, "b"),
        RetrievalTask("oven_task6", "it→t", [("q2", {"text": "q2"})], {"q2": ["b2"]}, "b"),
    ]
    result = evaluate_tasks(tasks, rows, lambda name, r: embed_rows(model, None, r, folder / "e" / name), folder)
    for name, task in result["tasks"].items():
        for scope in ("local", "global"):
            task[scope]["paper_metric"] = "hit@50" if scope == "global" else PAPER_METRIC.get(name, "hit@5")
            task[scope][task[scope]["paper_metric"]] = task[scope]["hit@1"]  # all five candidates are in the first 5
    (folder / "results.json").write_text(
        json.dumps({"protocol": "mbeir", "limit": None} | settings | {"result": result})
    )
    return folder


@pytest.fixture
def runs(tmp_path):
    return {name: measured(tmp_path / name, angles) for name, angles in {"bad": BAD, "good": GOOD}.items()}


def read(runs):
    """The content of their results.json."""
    return {name: read_run(folder) for name, folder in runs.items()}


def measured_of(runs):
    """As tables and pictures take them."""
    return {name: protocol_of(run).measured(run) for name, run in runs.items()}


def table(runs):
    return comparison_table(measured_of(runs))


def test_table_by_hand(runs):
    lines = [line.split() for line in table(read(runs)).splitlines()]
    # the bad model has a2 before a1 for q1, and b1 before b2 for q2
    assert lines[1:5] == [
        ["local", "fashioniq_task7", "it→i", "hit@10", "0.0", "100.0", "+100.0"],
        ["local", "cirr_task7", "it→i", "hit@5", "0.0", "100.0", "+100.0"],
        ["local", "oven_task6", "it→t", "hit@5", "0.0", "100.0", "+100.0"],
        ["local", "mean", "hit@5,", "hit@10", "0.0", "100.0", "+100.0"],
    ]
    assert lines[8][:3] == ["global", "mean", "hit@50"] and len(lines) == 10
    markdown = comparison_markdown(measured_of(read(runs)))
    assert "| local | cirr_task7 | it→i | hit@5 | 0.0 | 100.0 (+100.0) |" in markdown
    assert "| global | it→t | 0.0 | 100.0 (+100.0) |" in markdown  # means by direction, as one has two tasks
    assert {line.count("|") for line in markdown.splitlines() if line.startswith("|")} == {5, 7}


def test_means_weigh_tasks_equally_and_many_runs_fit(runs):
    one, other = read(runs).values()
    for name, value in (("fashioniq_task7", 0.2), ("cirr_task7", 0.6), ("oven_task6", 0.5)):
        other["result"]["tasks"][name]["global"]["hit@50"] = value
    means = mean_by_direction(measured_of({"other": other})["other"].figures)
    assert means["global"] == {"it→i": pytest.approx(40), "it→t": pytest.approx(50)}
    last = table({"x": one, "y": other, "z": one}).splitlines()[-2].split()
    assert last == ["global", "mean", "hit@50", "0.0", "43.3", "+43.3", "0.0", "+0.0"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run: run.update(limit=5), "limit differs, none and 5"),
        (lambda run: run.update(instructions=True), "instructions differs, none and True"),
        (lambda run: run["result"]["tasks"].pop("oven_task6"), r"the choice of tasks differs, 3 \(fashioniq_task7"),
        (lambda run: run["result"]["tasks"]["cirr_task7"].update(queries=2), "cirr_task7: queries differs, 1 and 2"),
        (lambda run: run["result"]["tasks"]["cirr_task7"]["global"].update(candidates=9), "candidates differs, 5"),
        (lambda run: run["result"]["tasks"]["cirr_task7"].pop("global"), "pools differs, 2 .local, global. and 1"),
        (lambda run: run["result"]["skipped"].update({"candidates/a": {"a1": "x"}}), "skipped rows of candidates/a"),
    ],
)  # fmt: skip
def test_incomparable_runs_are_refused(runs, change, message):
    one, other = read(runs).values()
    change(other)
    with pytest.raises(ValueError, match=f"A and B are not comparable: .*{message}"):
        table({"A": one, "B": other})


def test_runs_of_different_benchmarks_are_refused(runs, tmp_path):
    (tmp_path / "results.json").write_text('{"protocol": "mixbench", "result": {"subsets": {"OVEN": {}}}}')
    with pytest.raises(ValueError, match="bad and other are not comparable: protocol differs, mbeir and mixbench"):
        read_runs(runs | {"other": tmp_path})


def test_smoke_runs_and_skipped_rows_say_so(runs):
    both = read(runs)
    for run in both.values():
        run["limit"] = 3
        run["result"]["skipped"] = {"candidates/a": {"a9": "no such file"}}
    assert "A smoke run (--limit 3)" in table(both)
    assert "1 rows were skipped" in comparison_markdown(measured_of(both))


def test_what_is_no_run_is_named(tmp_path):
    (tmp_path / "results.json").write_text('{"protocol": "mbeir", "resu')
    with pytest.raises(ValueError, match="results.json: not JSON .*cut off"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text('{"protocol": "mteb", "result": {"a": 1}}')
    with pytest.raises(ValueError, match="holds no result of pairs, mbeir, .*; its protocol is 'mteb'"):
        read_run(tmp_path / "results.json")


def test_other_benchmarks_have_tables_and_bars(tmp_path):
    def pair(protocol, result, change):
        changed = json.loads(json.dumps(result))
        change(changed)
        return {name: {"protocol": protocol, "result": of} for name, of in (("A", result), ("B", changed))}

    one_set = {"category": "VQA", "precision@1": 0.5, "queries": 4, "candidates": 9, "distinct_candidates": 8}
    mmeb = {"version": 1, "instructions": True, "sets": {"OK-VQA": one_set}, "skipped": {}}
    mmeb = pair("mmeb", mmeb, lambda result: result["sets"]["OK-VQA"].update({"precision@1": 0.25}))
    assert table(mmeb).splitlines()[1].split() == [
        "own",
        "OK-VQA",
        "VQA",
        "precision@1",
        "50.0",
        "25.0",
        "-25.0",
    ]

    hits = {"hit@1": 0.5, "hit@5": 1.0, "mrr@9": 0.7, "meanR3": 0.8}
    covr = {"rows": 3, "gallery": 3, "coverage": {}, "frames": {}, "source": {"squash": None}, "weighted": None}
    covr = pair("covr", covr | {"mean": hits}, lambda result: result["mean"].update({"hit@1": 0.6}))
    assert [line.split()[-4:] for line in table(covr).splitlines()[1:3]] == [
        ["hit@1", "50.0", "60.0", "+10.0"], ["hit@5", "100.0", "100.0", "+0.0"],
    ]  # fmt: skip
    means = mean_by_direction(measured_of(covr)["B"].figures)
    assert means == {"gallery, mean of frames": {"hit@1": 60.0, "hit@5": 100.0}}

    subset = {"direction": "t→mixed", "queries": 9, "candidates": 9, "corpus": {}, "ndcg@10": 0.5}
    subset["by_target"] = {"image": {"ndcg@10": 0.1}, "text": {"ndcg@10": None}}
    mixed = pair("mixbench", {"subsets": {"OVEN": subset}, "skipped": {}}, lambda result: None)
    assert [line.split("  ")[0] for line in table(mixed).splitlines()[1:3]] == [
        "mixed",
        "mixed, image relevant",
    ]
    for name, runs in {"mmeb": mmeb, "covr": covr, "mixbench": mixed}.items():
        assert Image.open(direction_bars(measured_of(runs), tmp_path / f"{name}.png")).size[0] > 500
    with pytest.raises(ValueError, match="covr keeps no ranks"):
        rank_histogram(measured_of(covr), {}, tmp_path / "ranks.png")


def test_ranks_fall_into_their_bins():
    ranks = [1, 2, 3, 4, 5, 6, 10, 11, 20, 21, 50, 51, 100, None, 101, None]
    expected = np.array([1, 1, 1, 2, 2, 2, 2, 2, 3]) / 16
    assert len(RANK_BINS) == 9 and RANK_BINS[:4] == ("1", "2", "3", "4–5")
    np.testing.assert_allclose(first_rank_shares(ranks), expected)


def test_pictures_show_the_figures_and_the_ranks(runs, tmp_path, monkeypatch):
    drawn, savefig = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: (drawn.append(self), savefig(self, *a, **o)))
    results = measured_of(read(runs))
    direction_bars(results, tmp_path / "bars.png")
    rank_histogram(results, {name: folder / "records" for name, folder in runs.items()}, tmp_path / "ranks.png")
    bars, ranks = drawn
    assert [ax.get_title() for ax in bars.axes] == ["pool: local", "pool: global"]
    assert [tick.get_text() for tick in bars.axes[0].get_xticklabels()] == ["it→i", "it→t"]
    assert [patch.get_height() for patch in bars.axes[1].patches] == pytest.approx([0, 0, 100, 100])
    assert [text.get_text() for text in bars.legends[0].texts] == ["bad", "good"]
    titles = ["all directions (3 tasks)", "it→i (2 tasks)", "it→t (1 task)"]
    assert [ax.get_title() for ax in ranks.axes] == titles
    # the bad model ranks b2 b1 a2 a3 a1 for q1 and a1 a3 a2 b1 b2 for q2: what they look for is fifth, of the bin 4–5
    heights = np.array([patch.get_height() for patch in ranks.axes[0].patches]).reshape(2, 9)
    np.testing.assert_allclose(heights, [[0, 0, 0, 100, 0, 0, 0, 0, 0], [100, 0, 0, 0, 0, 0, 0, 0, 0]])
    for figure in drawn:  # no label of an axis overlaps the next one's
        for ax in figure.axes:
            figure.draw_without_rendering()
            boxes = [label.get_window_extent() for label in ax.get_xticklabels()]
            assert all(left.x1 < right.x0 for left, right in zip(boxes, boxes[1:]))


def test_records_of_another_run_are_refused(runs, tmp_path):
    results, folders = measured_of(read(runs)), {name: folder / "records" for name, folder in runs.items()}
    path = runs["good"] / "records" / "cirr_task7.global.jsonl"
    path.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match="records of 2 queries, results.json of 1"):
        rank_histogram(results, folders, tmp_path / "ranks.png")
    path.write_text('{"query": "q1", "ran')
    with pytest.raises(ValueError, match="cirr_task7.global.jsonl, line 1: not the record of a query"):
        rank_histogram(results, folders, tmp_path / "ranks.png")
    with pytest.raises(ValueError, match="8 runs are too many for one picture: there are 7 distinct colours"):
        direction_bars({str(n): results["good"] for n in range(8)}, tmp_path / "bars.png")


def test_the_command_writes_table_and_pictures(runs, tmp_path, capsys):
    compare([f"GCL={runs['good']}", str(runs["bad"] / "results.json")], tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"compare.md", "directions.png", "ranks.png"}
    assert "| GCL | after |" in (tmp_path / "out" / "compare.md").read_text()
    (runs["bad"] / "records" / "cirr_task7.global.jsonl").unlink()
    compare([str(folder) for folder in runs.values()], tmp_path / "again", ("x", "y"))
    printed = capsys.readouterr()
    assert "ranks.png is not drawn: 1 files of records are missing, e.g. " in printed.err and "hit@50" in printed.out
    assert not (tmp_path / "again" / "ranks.png").exists()


def test_several_variants_are_compared(runs, tmp_path, capsys):
    compare_variants(tmp_path, ["plain"])
    assert capsys.readouterr().out == ""
    compare_variants(tmp_path, ["bad", "good"])
    assert capsys.readouterr().out.splitlines()[0].split()[-2:] == ["bad", "good"]
    assert (tmp_path / "compare.md").is_file()
