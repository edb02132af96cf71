"""`gcl evaluate mmeb` with a tiny model, and its table."""

import json
import sys

import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub.errors import RepositoryNotFoundError

from tests.support.backbones import random_image
from universal_gcl import cli
from universal_gcl.evaluation.mmeb.report import mmeb_table
from universal_gcl.evaluation.mmeb.sets import PAPER_DIRECTIONS


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gcl", "evaluate", "mmeb", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def root(tmp_path):
    """Two sets of version 1, each query's right candidate being its own image."""
    root = tmp_path / "MMEB-eval"
    for name in ("CIRR", "GQA"):
        rows = []
        for n in range(6):
            path = root / "images" / name / f"{n}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            random_image(n).save(path)
            order = [n, *(other for other in range(6) if other != n)]
            texts, paths = [""] * 6, [f"{name}/{other}.png" for other in order]
            rows.append(
                {"qry_text": "<|image_1|>", "qry_img_path": f"{name}/{n}.png", "tgt_text": texts, "tgt_img_path": paths}
            )
        (root / name).mkdir()
        pq.write_table(pa.Table.from_pylist(rows), root / name / "test-00000-of-00001.parquet")
    return root


def test_prints_and_writes_what_it_measured(clip_folder, root, tmp_path, monkeypatch, capsys):
    arguments = (clip_folder, "--root", root, "--subsets", "GQA, CIRR", "--out", tmp_path / "out")
    assert run(monkeypatch, *arguments, "--limit", 4) == 0
    printed = capsys.readouterr().out
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (written["protocol"], written["version"], written["limit"]) == ("mmeb", 1, 4)
    assert (written["subsets"], written["root"], written["hub"]) == (["GQA", "CIRR"], str(root), None)
    result = written["result"]
    # an image finds itself
    assert {name: (one["precision@1"], one["queries"]) for name, one in result["sets"].items()} == {
        "GQA": (1.0, 4), "CIRR": (1.0, 4),
    }  # fmt: skip
    assert result["sets"]["GQA"]["query_kinds"] == {"i": 4} and (tmp_path / "out" / "records" / "GQA.jsonl").is_file()
    assert mmeb_table(result) in printed and "first 4 queries" in printed
    assert (tmp_path / "out" / "table.md").read_text() == mmeb_table(result, markdown=True) + "\n"


def test_from_the_hub(clip_folder, root, tmp_path, monkeypatch):
    asked = []

    def snapshot(repository, **options):
        asked.append((repository, options))
        return str(root)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    out = ("--out", tmp_path / "out")
    assert run(monkeypatch, clip_folder, "--hub", "TIGER-Lab/MMEB-eval@abc", "--subsets", "CIRR", *out) == 0
    patterns = {"repo_type": "dataset", "revision": "abc", "allow_patterns": ["CIRR/*", "images.zip"]}
    assert asked == [("TIGER-Lab/MMEB-eval", patterns)]
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert (written["hub"], written["hub_commit"]) == ("TIGER-Lab/MMEB-eval@abc", "MMEB-eval")

    def absent(repository, **options):
        raise OSError("no such repository")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", absent)
    message = run(monkeypatch, clip_folder, "--hub", "nobody/nothing", *out)
    assert message.startswith("error: nobody/nothing can't be downloaded from the Hub as a data set")
    assert issubclass(RepositoryNotFoundError, OSError)


def test_what_cannot_be_asked_for(clip_folder, root, tmp_path, monkeypatch):
    out = ("--out", tmp_path / "out")
    for given in ((), ("--root", root, "--hub", "a/b")):
        assert run(monkeypatch, clip_folder, *given, *out) == "error: give either --root or --hub"
    assert "GQB" in run(monkeypatch, clip_folder, "--root", root, "--subsets", "GQB", *out)
    assert "has no set VisDial" in run(monkeypatch, clip_folder, "--root", root, *out)
    one = ("--root", root, "--subsets", "GQA", *out)
    assert "needs version 2" in run(monkeypatch, clip_folder, *one, "--no-instructions")
    assert "is of version 1" in run(monkeypatch, clip_folder, *one, "--version", 2)


def make_result(sets, **changes):
    one = {"missing_queries": 0, "missing_candidates": 0}
    result = {"version": 1, "limit": None, "sets": {name: one | {"precision@1": rate} for name, rate in sets.items()}}
    return result | {"averages": {"all": 0.25}} | changes


def test_the_paper_stands_beside_ours():
    averages = {"retrieval": 0.5, "all": 0.5, "paper": 0.25}
    result = make_result({name: 0.25 for name in PAPER_DIRECTIONS} | {"GQA": 1.0}, averages=averages)
    lines = mmeb_table(result).splitlines()
    cells = [line.split() for line in lines]
    assert cells[0] == ["VISTA"] * 4 + ["CLIP-SF"] * 3
    assert cells[1] == ["CL+", "CL+", "GCL+", "CL+", "GCL+"]
    assert cells[2][-4:] == ["pretrained", "Pairwise", "Pairwise", "ours"]
    assert cells[3] == "t→i VisDial 10.1 17.3 17.2 16.6 22.5 27.2 31.1 25.0".split()
    assert cells[14] == "it→it OVEN 54.3 45.4 53.6 57.3 46.1 4.7 53.8 25.0".split()
    assert cells[15] == ["VQA", "GQA", *"–" * 7, "100.0"]
    assert cells[-1][:4] == ["average", "of", "the", "paper's"] and cells[-1][-1] == "25.0"
    assert (cells[-1][5], cells[-1][9]) == ("40.3", "39.3")  # means of the pretrained models' columns
    assert max(map(len, lines)) <= 100 and len({len(line) for line in lines[2:]}) == 1


def test_without_the_papers_columns():
    for result in (make_result({"OVEN": 0.5}, version=2), make_result({"GQA": 0.5})):
        first, set_line, *_ = mmeb_table(result).splitlines()
        assert first.split() == ["precision@1", "in", "%", "ours"] and set_line.split()[-2:-1] != ["–"]
    missing = make_result({"GQA": 0.5})
    missing["sets"]["GQA"]["missing_queries"] = 3
    assert "3 queries and candidates could not be read" in mmeb_table(missing)
