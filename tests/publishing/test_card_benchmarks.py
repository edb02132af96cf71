"""Results of `gcl evaluate` on a card: of this very model, with the paper's figures beside, as the Hub reads them."""

import json
import logging
import sys
from dataclasses import replace

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.mbeir_folders import made_benchmark, write_original
from tests.support.training_runs import write_parquet
from universal_gcl import cli
from universal_gcl.evaluation.paper import paper_table
from universal_gcl.publishing.benchmarks import benchmark_markdown, eval_result_files, model_index
from universal_gcl.publishing.hub_folder import files_for, read_facts, rewrite_card, write_hub_folder
from universal_gcl.publishing.model_folder import save_model_folder

RECIPE = "model:\n  encoder: towers\n"
ENVIRONMENT = {"gpus": [], "cpu": {"name": "a CPU"}, "image_backend": "pil", "date": "2026-01-31"}


def run(*arguments):
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", ["gcl", *map(str, arguments)])
        cli.main()
    return stop.value.code


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A model, and what `gcl evaluate` wrote about it."""
    root = tmp_path_factory.mktemp("measured")
    model = GCLModel.from_encoder(tiny_encoder("clip"))
    save_model_folder(root / "model", model, tiny_processor("clip"))
    write_original(root / "M-BEIR", made_benchmark())
    pairs = write_parquet(root / "pairs.parquet", 6)
    assert run("evaluate", "mbeir", root / "model", "--root", root / "M-BEIR", "--out", root / "mbeir") == 0
    assert run("evaluate", "pairs", root / "model", pairs, "--out", root / "pairs") == 0
    return root


@pytest.fixture
def folder(measured, facts, tmp_path):
    save_model_folder(tmp_path / "model", GCLModel.from_pretrained(measured / "model"), tiny_processor("clip"))
    results = {"before": facts.results_before, "after": facts.results_after}
    local = replace(facts, model_name=str(tmp_path / "model"), title="model")
    return write_hub_folder(tmp_path / "model", facts=local, recipe_text=RECIPE, results=results)


def test_the_command_adds_benchmarks_and_keeps_them(measured, folder):
    results = [word for name in ("mbeir", "pairs") for word in ("--results", measured / name / "results.json")]
    assert run("card", folder, "--id", "org/tiny", "--licence", "mit", *results) == 0
    text = (folder / "README.md").read_text()
    written = json.loads((measured / "mbeir" / "results.json").read_text())["result"]
    columns, paper = paper_table("mbeir_global")
    cirr = f"{100 * written['tasks']['cirr_task7']['global']['hit@50']:.2f}"
    beside = " | ".join(f"{figure:.2f}" for figure in paper["CIRR it→i"])
    assert f"| CIRR it→i | @50 | {cirr} | {beside} |" in text
    assert all(column.replace("_", " ") in text for column in columns)
    assert "### Nine directions on pairs.parquet" in text and "# tiny\n" in text
    assert str(measured) not in text + (folder / "benchmarks" / "mbeir.json").read_text()

    card = ModelCard(text)
    assert card.data.license == "mit"
    index = {(result.dataset_config, result.metric_name): result for result in card.data.eval_results}
    cirr_index = index["cirr_task7", "hit@50 it→i, global pool"]
    assert cirr_index.dataset_type == "TIGER-Lab/M-BEIR" and f"{cirr_index.metric_value:.2f}" == cirr
    entries = {}
    for pool in ("local", "global"):
        stored = yaml.safe_load((folder / ".eval_results" / f"gcl_mbeir_{pool}.yaml").read_text())
        entries[pool] = {entry.task_id: entry for entry in huggingface_hub.parse_eval_result_entries(stored)}
        assert len(entries[pool]) == 16
    entry = entries["global"]["mbeir_cirr_task7"]
    assert (entry.dataset_id, f"{entry.value:.2f}") == ("TIGER-Lab/M-BEIR", cirr)
    assert entry.source_url == "https://huggingface.co/org/tiny" and "hit@50 in %" in entry.notes

    assert run("card", folder) == 0
    assert (folder / "README.md").read_text() == text
    facts = read_facts(folder)
    assert facts.licence == "mit" and [each["protocol"] for each in facts.benchmarks] == ["mbeir", "pairs"]
    pushed = files_for(folder, "org/other")
    assert '"org/other"' in pushed["README.md"] and "org/tiny" not in pushed["README.md"]
    assert "https://huggingface.co/org/other" in pushed[".eval_results/gcl_mbeir_local.yaml"]


def test_a_new_model_in_the_folder_has_no_benchmarks(measured, folder, facts):
    rewrite_card(folder, results=[measured / "mbeir"])
    write_hub_folder(folder, facts=facts, recipe_text=RECIPE, results={"before": None, "after": facts.results_after})
    assert not (folder / "benchmarks").exists() and not list(folder.glob(".eval_results/*"))
    assert "M-BEIR" not in (folder / "README.md").read_text()


def change(values):
    return lambda written: written | values


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (change({"limit": 5}), "a smoke run on the first 5 queries"),
        (change({"protocol": "mteb"}), "holds no result of pairs, mbeir"),
        (change({"train_runtime": 1.0}), "was written by a training run"),
        (change({"result": {"tasks": {}}}), "lacks a part"),
        (
            lambda written: {name: value for name, value in written.items() if name != "fingerprint"},
            "not name the model",
        ),
        (lambda written: written | {"fingerprint": written["fingerprint"] | {"weights": "0" * 32}}, "of another model"),
    ],
)
def test_results_that_no_card_shows_are_refused(spoil, message, measured, folder, tmp_path):
    written = json.loads((measured / "mbeir" / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps(spoil(written)))
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=f"results.json.*{message}"):
        rewrite_card(folder, results=[tmp_path / "results.json"])
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_weights_that_changed_since_are_seen(measured, folder):
    rewrite_card(folder, results=[measured / "mbeir"])
    with pytest.raises(ValueError, match="is a second result of mbeir"):
        rewrite_card(folder, results=[measured / "mbeir"] * 2)
    model = GCLModel.from_pretrained(folder)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"benchmarks/mbeir\.json has results of another model"):
        rewrite_card(folder)


def test_a_card_changed_by_hand_is_kept(folder):
    text = (folder / "README.md").read_text().replace("## Use", "Made for my dog.\n\n## Use")
    (folder / "README.md").write_text(text)
    with pytest.raises(ValueError, match="README.md was changed by hand: move it away"):
        rewrite_card(folder)
    assert files_for(folder, "org/tiny")["README.md"] == text.replace(f'"{folder}"', '"org/tiny"')
    (folder / "README.md").unlink()
    rewrite_card(folder)
    assert "my dog" not in (folder / "README.md").read_text()
    (folder / "card.json").unlink()
    with pytest.raises(ValueError, match="holds no card.json"):
        rewrite_card(folder)
    assert files_for(folder, "org/tiny") == {}


def made(protocol, result, **settings):
    return {"protocol": protocol, "command": f"gcl evaluate {protocol}", "environment": ENVIRONMENT, "result": result,
            "truncate_dim": None, "limit": None} | settings  # fmt: skip


def mmeb():
    counts = {"queries": 9, "candidates": 90, "distinct_candidates": 80, "missing_queries": 0, "missing_candidates": 0}
    sets = {"CIRR": {"precision@1": 0.25, "category": "retrieval", **counts}}
    result = {"sets": sets, "averages": {"all": 0.25}, "version": 1, "instructions": True, "limit": None}
    return made("mmeb", result, version=1, instructions=True, hub="TIGER-Lab/MMEB-eval@abc", hub_commit="abc")


def mixbench(name="MSCOCO", **settings):
    by_target = {modality: {"ndcg@10": 0.5} for modality in ("image,text", "image", "text")}
    of = {"ndcg@10": 0.4, "by_target": by_target, "queries": 9, "candidates": 9, "corpus": {}, "direction": "t→mixed"}
    result = {"subsets": {name: of}, "mean": {"ndcg@10": 0.4}, "limit": None, "skipped": {name: {"a": "gone"}}}
    return made("mixbench", result, hub=None, hub_commit=None, **settings)


def covr():
    figures = {f"hit@{k}": k / 100 for k in (1, 5, 10, 50)}
    result = {
        "mean": figures, "weighted": None, "rows": 2556, "gallery": 2500, "coverage": {"videos": (9, 10)},
        "frames": 15, "source": {"squash": None},
    }  # fmt: skip
    return made("covr", result)


def test_each_benchmark_has_its_table():
    theirs = " | ".join(f"{figure:.1f}" for figure in paper_table("mmeb")[1]["CIRR it→i"])
    assert f"| it→i  CIRR | {theirs} | 25.0 |" in benchmark_markdown(mmeb())
    assert "| MSCOCO | 40.0 | 50.0 | 50.0 | 50.0 |" in benchmark_markdown(mixbench())
    assert "1 rows could not be read" in benchmark_markdown(mixbench())
    theirs = " | ".join(f"{figure:.2f}" for figure in paper_table("covr")[1]["R@10"])
    table = benchmark_markdown(covr())
    assert f"| R@10 | 10.00 | {theirs} |" in table and "videos: 9 of 10" in table
    assert "cut to 8 dimensions" in benchmark_markdown(mixbench(truncate_dim=8))
    for run in (mmeb(), mixbench(), covr()):
        text = benchmark_markdown(run)
        bars = {line.count("|") for line in text.splitlines() if line.startswith("|")}
        assert len(bars) == 1 and "on a CPU, images by pil" in text


def test_what_the_hub_has_no_data_set_for_is_no_evaluation_result():
    files = eval_result_files([mmeb(), mixbench(), covr()], None)
    assert list(files) == [".eval_results/gcl_mmeb.yaml", ".eval_results/gcl_mixbench.yaml"]
    assert yaml.safe_load(files[".eval_results/gcl_mmeb.yaml"]) == [
        {
            "dataset": {"id": "TIGER-Lab/MMEB-eval", "task_id": "CIRR", "revision": "abc"}, "value": 25.0,
            "date": "2026-01-31", "notes": "precision@1 in %, it→i, own pool",
        }
    ]  # fmt: skip
    assert len(yaml.safe_load(files[".eval_results/gcl_mixbench.yaml"])) == 1  # not its parts by modality
    assert eval_result_files([mixbench("my_photos")], None) == {}
    assert {result.dataset_type for result in model_index([covr(), mixbench("my_photos")])} == {
        "webvid-covr", "data-in-mixbench-s-layout",
    }  # fmt: skip


def test_a_hub_library_without_evaluation_results_says_what_is_left_out(monkeypatch, caplog):
    lacks = "EvalResultEntry"
    load = huggingface_hub.__getattr__  # the library loads its names when they are asked for
    monkeypatch.delitem(vars(huggingface_hub), lacks, raising=False)
    monkeypatch.setattr(huggingface_hub, "__getattr__", lambda name: load("" if name == lacks else name))
    with caplog.at_level(logging.WARNING):
        assert eval_result_files([mmeb()], None) == {}
    assert ".eval_results/ is left out" in caplog.text
