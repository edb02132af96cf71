"""Rows are read from files and made from captioned images; `gcl embed` and `gcl search` work on both."""

import json
import shutil
import sys

import pytest

from modeling_gcl import GCLModel
from tests.support.backbones import random_image, tiny_encoder, tiny_processor
from universal_gcl import cli
from universal_gcl.retrieval.run import Run
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.pairs import load_pairs
from universal_gcl.sources.rows import PairRows, read_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model, captioned images (the second with two captions), and rows of queries."""
    folder = tmp_path_factory.mktemp("data")
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(folder / "model")
    tiny_processor("clip").save_pretrained(folder / "model")
    (folder / "photos").mkdir()
    lines = []
    for number, captions in enumerate((["a red dog"], ["the bird flies", "a blue bird"], ["one house"])):
        random_image(number).save(folder / "photos" / f"{number}.png")
        lines.append({"image": f"{number}.png", "captions": captions})
    write(folder / "photos" / "metadata.jsonl", lines)
    queries = [
        {"id": "q2", "text": "the bird flies"}, {"id": "q1", "image": "photos/2.png", "text": None},
        {"id": "q0", "image": ["photos/0.png"], "text": "red dog", "instruction": "a"},
        {"id": "q3", "video": ["photos/0.png", "photos/1.png"]},
    ]  # fmt: skip
    write(folder / "queries.jsonl", queries)
    return folder


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gcl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_rows_of_captioned_images(folder):
    pairs = load_pairs(SourceArguments(str(folder / "photos")))
    images, texts, fused = (PairRows(pairs, modality) for modality in ("i", "t", "it"))
    assert [name for name, _ in images] == ["0.png", "1.png", "2.png"]
    assert list(texts) == [
        ("0.png#0", {"text": "a red dog"}), ("1.png#0", {"text": "the bird flies"}),
        ("1.png#1", {"text": "a blue bird"}), ("2.png#0", {"text": "one house"}),
    ]  # fmt: skip
    assert [name for name, _ in fused] == [f"{name}+image" for name, _ in texts]
    assert fused[2][1] == {"text": "a blue bird", "image": images[1][1]["image"]} and fused[-1][0] == "2.png#0+image"
    with pytest.raises(IndexError):
        texts[4]
    with pytest.raises(ValueError, match="the modality 'ti' is unknown: choose one of i, t, it"):
        PairRows(pairs, "ti")


def test_rows_of_a_file(folder):
    rows = dict(read_rows(folder / "queries.jsonl"))
    assert list(rows) == ["q2", "q1", "q0", "q3"] and rows["q2"] == {"text": "the bird flies"}
    assert rows["q1"] == {"image": str(folder / "photos" / "2.png")}
    assert rows["q3"] == {"video": [str(folder / "photos" / f"{n}.png") for n in (0, 1)]}
    elsewhere = write(folder / "photos" / "elsewhere.jsonl", [{"id": 7, "image": "photos/2.png"}])
    assert read_rows(elsewhere, folder) == [("7", rows["q1"])]
    elsewhere.unlink()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "b", "text"', "line 2: not valid JSON"),
        ("[1]", "line 2: expected an object"),
        ('{"id": "b", "txt": "x"}', "line 2: unknown key 'txt'; use id, text"),
        ('{"text": "x"}', "line 2: the id is empty"),
        ('{"id": "a", "text": "x"}', "line 2: the id 'a' is already used in .*line 1"),
        ('{"id": "b", "image": "../x.png"}', "line 2: .*lies outside"),
        ('{"id": "b", "text": 3}', "line 2, id 'b': text must be a str"),
        ('{"id": "b", "text": " "}', "line 2, id 'b': has neither an image nor a text"),
    ],
)
def test_bad_lines_are_named(line, message, tmp_path):
    (tmp_path / "rows.jsonl").write_text(f'{{"id": "a", "text": "x"}}\n{line}\n')
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        read_rows(tmp_path / "rows.jsonl")


def test_a_file_without_rows_is_refused(tmp_path):
    (tmp_path / "rows.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="rows.jsonl has no rows"):
        read_rows(tmp_path / "rows.jsonl")


def test_embed_and_search(folder, tmp_path, monkeypatch, capsys):
    assert run(monkeypatch, "embed", folder / "model", folder / "queries.jsonl", tmp_path / "queries") == 0
    assert (
        "queries: 4 rows, 4 embeddings of 24 dimensions; 0 rows share the embedding of another row, 0 were skipped\n"
        in (capsys.readouterr().out)
    )
    pools = [tmp_path / modality for modality in ("i", "t", "it")]
    for pool in pools:
        assert run(monkeypatch, "embed", folder / "model", folder / "photos", pool, "--modality", pool.name) == 0
    options = ("--k", 20, "--out", tmp_path / "new" / "run.safetensors", "--trec", tmp_path / "run.txt")
    assert run(monkeypatch, "search", tmp_path / "queries", *pools, *options) == 0
    assert "the best 11 of 11 rows for each of 4 queries" in capsys.readouterr().out
    found = Run.load(tmp_path / "new" / "run.safetensors")
    best = {query: found.ranking(number)[0] for number, query in enumerate(found.query_ids)}
    assert best == best | {"q0": "0.png#0+image", "q1": "2.png", "q2": "1.png#0"}
    assert (found.scores[:3, 0] > 0.999).all()
    assert (tmp_path / "run.txt").read_text().startswith("q2 Q0 1.png#0 1 ")


def test_bad_input_is_a_message(folder, tmp_path, monkeypatch, capsys):
    model = folder / "model"
    assert "For captioned images, set --modality to i, t or it" in run(
        monkeypatch, "embed", model, folder / "photos", tmp_path / "out"
    )
    rows = [{"id": "good", "text": "a dog"}, {"id": "bad", "image": "none.png"}]
    rows = write(tmp_path / "rows.jsonl", rows)
    assert "error: row 'bad': " in run(monkeypatch, "embed", model, rows, tmp_path / "out")
    assert run(monkeypatch, "embed", model, rows, tmp_path / "out", "--skip-unreadable") == 0
    assert (
        "1 embeddings of 24 dimensions; 0 rows share the embedding of another row, 1 were skipped (for the reasons see "
        in capsys.readouterr().out
    )
    missing = run(monkeypatch, "search", tmp_path / "out", tmp_path / "none", "--out", tmp_path / "run")
    assert "none holds no embeddings" in missing and not (tmp_path / "run").exists()


def test_a_broken_model_is_a_message(folder, tmp_path, monkeypatch):
    model = GCLModel.from_pretrained(folder / "model")
    model.encoder.text_projection.weight.data[0, 0] = float("nan")
    shutil.copytree(folder / "model", tmp_path / "model")
    model.save_pretrained(tmp_path / "model")
    rows = write(tmp_path / "rows.jsonl", [{"id": "a", "text": "a dog"}])
    message = run(monkeypatch, "embed", tmp_path / "model", rows, tmp_path / "out")
    assert message.startswith("error: the embedding of row 'a' holds NaN") and not list(tmp_path.rglob("*.npy"))


@pytest.mark.parametrize("broken", [False, True])
def test_a_process_of_a_launch_leaves_at_once(broken, folder, tmp_path, monkeypatch, capsys):
    """The launcher then ends the other processes, see tests/distributed/test_failures.py."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("os._exit", sys.exit)
    if broken:
        monkeypatch.setattr("universal_gcl.sources.rows.read_rows", lambda *args: 1 / 0)
    assert run(monkeypatch, "embed", folder / "model", tmp_path / "none.jsonl", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "error: rank 0: " in error and ("none.jsonl" in error) != broken
    assert ("ZeroDivisionError" in error and "Traceback" in error) == broken
