"""embed_rows writes the embeddings that `encode` returns, one for each content, also after kills and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from modeling_gcl import GCLModel, ImageError
from tests.retrieval.embed_worker import CountingModel, make_rows
from tests.support.backbones import random_image, tiny_encoder, tiny_processor
from universal_gcl.retrieval.contents import distinct_contents
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.retrieval.fingerprint import model_fingerprint, same_model
from universal_gcl.retrieval.store import Store, Vectors

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "retrieval" / "embed_worker.py"


def make_model(seed=0):
    model = GCLModel.from_encoder(tiny_encoder("clip", seed), fusion="normalized_sum")
    return model.eval(), tiny_processor("clip")


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return make_rows(tmp_path_factory.mktemp("images"))


def files_of(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_embeddings_are_those_of_encode(model, rows, tmp_path):
    store = embed_rows(*model, rows, tmp_path / "store", shard_rows=7, batch_size=3)
    expected = model[0].encode([row for _, row in rows], model[1])
    assert store.ids == [name for name, _ in rows] and len(store) == len(rows)
    assert np.abs(store.embeddings() - expected.numpy()).max() < 1e-3  # float16 of a unit vector
    assert np.abs(store.embeddings([5, 2]) - expected[[5, 2]].numpy()).max() < 1e-3
    assert store.vectors.dtype == np.float16 and len(store.manifest["shards"]) > 3
    loaded = np.concatenate([np.load(path, mmap_mode="r") for path in store.vectors.paths])
    assert np.array_equal(loaded, store.vectors[:])
    assert not store.skipped and store.manifest["skipped"] == 0


def test_equal_contents_are_embedded_once(model, tmp_path):
    image = tmp_path / "a.png"
    random_image(0).save(image)
    (tmp_path / "copy.png").write_bytes(image.read_bytes())
    rows = [
        ("text", {"text": "a red dog"}), ("path", {"image": str(image)}), ("same text", "a red dog"),
        ("Path of a copy", tmp_path / "copy.png"), ("bytes", image.read_bytes()), ("pixels", random_image(0)),
        ("fused", {"image": image, "text": "a red dog"}), ("fused again", {"text": "a red dog", "image": image}),
        ("with instruction", {"text": "red dog", "instruction": "a"}), ("array", np.array(random_image(0))),
        ("twice", {"image": [image, image]}), ("datasets", {"image": {"bytes": image.read_bytes(), "path": None}}),
        ("as a frame", {"video": [image]}), ("text of a path", {"text": str(image)}),
    ]  # fmt: skip
    counting = CountingModel.wrap(model[0])
    store = embed_rows(counting, model[1], rows, tmp_path / "store", shard_rows=3)
    same = [("text", "same text", "with instruction"), ("path", "Path of a copy", "bytes", "datasets")]
    same += [("pixels", "array"), ("fused", "fused again"), ("twice",), ("as a frame",), ("text of a path",)]
    vector = dict(zip(store.ids, store.rows.tolist()))
    found = [{vector[name] for name in names} for names in same]
    assert all(len(one) == 1 for one in found) and set().union(*found) == set(range(len(same)))
    assert len(store.vectors) == len(same) == sum(counting.counts)


@pytest.mark.parametrize("seed", range(3))
def test_unique_contents_are_those_of_the_smallest_ids(seed):
    rng = np.random.default_rng(seed)
    contents = (rng.integers(0, 2, (200, 16)) * (np.arange(16) < 5)).astype(np.uint8)
    ids = [str(number) for number in rng.permutation(200)]
    first, place = distinct_contents(contents, ids)
    seen = {}
    for number in sorted(range(200), key=lambda number: ids[number]):
        if contents[number].any():
            seen.setdefault(bytes(contents[number]), number)
    assert first.tolist() == list(seen.values())
    for number, content in enumerate(map(bytes, contents)):
        assert place[number] == (list(seen).index(content) if content in seen else -1)


def test_a_second_call_embeds_nothing_and_workers_change_nothing(model, rows, tmp_path):
    embed_rows(*model, rows, tmp_path / "one", shard_rows=5)
    counting = CountingModel.wrap(model[0])
    embed_rows(counting, model[1], rows, tmp_path / "one", shard_rows=5)
    assert not counting.counts
    embed_rows(*model, rows, tmp_path / "four", shard_rows=5, num_workers=4)
    assert files_of(tmp_path / "four") == files_of(tmp_path / "one")


def test_after_kills_the_result_is_the_same_and_nothing_whole_is_embedded_twice(model, rows, tmp_path):
    """Runs are killed by SIGKILL, at random and between writing and renaming, until one finishes. All record what they
    embedded."""
    whole = embed_rows(*model, rows, tmp_path / "whole", shard_rows=2)
    images = Path(rows[0][1]["image"]).parent
    run = subprocess.run(
        [sys.executable, WORKER, tmp_path / "killed", tmp_path / "log", images, "killed"],
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    complete = list(map(int, run.stdout.split()))  # shards after each kill
    assert len(complete) > 4 and complete == sorted(complete) and 0 < complete[2] < len(whole.manifest["shards"])
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    embedded = sum(map(int, (tmp_path / "log").read_text().split()))
    # each kill can lose one shard, which has two rows
    assert len(whole.vectors) < embedded <= len(whole.vectors) + 2 * len(complete)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("model", "holds embeddings of another model: .*weights"),
        ("options", "was embedded with options .*'truncate_dim': None.*not .*'truncate_dim': 8"),
        ("shard_rows", "was embedded with shard_rows 5, not 6"),
        ("number", "of other rows: the number of rows differ"),
        ("order", "of other rows: the ids or their order differ"),
        ("contents", "of other rows: the contents differ"),
    ],
)
@pytest.mark.parametrize("complete", [True, False])
def test_what_does_not_belong_together_is_refused(change, message, complete, model, rows, tmp_path):
    rows = [row for row in rows if "text" in row[1]]
    embed_rows(*model, rows, tmp_path, shard_rows=5)
    if not complete:
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        (tmp_path / "manifest.json").write_text(json.dumps(manifest | {"complete": False}))
    before = files_of(tmp_path)
    other, options = model, {"shard_rows": 5}
    if change == "model":
        other = make_model(seed=1)
    elif change == "options":
        options["truncate_dim"] = 8
    elif change == "shard_rows":
        options["shard_rows"] = 6
    elif change == "number":
        rows = rows[:-1]
    elif change == "order":
        rows = [(name, row) for name, row in zip([name for name, _ in reversed(rows)], [row for _, row in rows])]
    else:
        rows = [*rows[:-1], (rows[-1][0], {"text": "another"})]
    with pytest.raises(ValueError, match=message):
        embed_rows(*other, rows, tmp_path, **options)
    assert files_of(tmp_path) == before


def test_the_fingerprint_follows_what_changes_embeddings(model, tmp_path):
    gcl, processor = model
    gcl.save_pretrained(tmp_path)
    base = model_fingerprint(gcl, processor)
    processor(text=["a dog", "a"], return_tensors="pt", padding="longest")  # changes the state of the tokenizer
    processor.tokenizer("a red dog runs", truncation=True, max_length=3)
    loaded = GCLModel.from_pretrained(tmp_path).eval()
    again = model_fingerprint(loaded, processor)
    assert same_model(base, again) and again["name"] == str(tmp_path)
    loaded.config.fusion = "sum"
    assert model_fingerprint(loaded, processor)["config"] != base["config"]
    loaded.encoder.logit_scale.data += 1e-6
    assert model_fingerprint(loaded, processor)["weights"] != base["weights"]
    half = GCLModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model_fingerprint(half, processor)["weights"] != base["weights"]
    other = tiny_processor("clip")
    other.max_text_length = 5
    assert model_fingerprint(gcl, other)["processor"] != base["processor"]
    other = tiny_processor("clip")
    other.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert model_fingerprint(gcl, other)["processor"] != base["processor"]


def damaged_rows(folder):
    good, bad = folder / "good.png", folder / "bad.png"
    random_image(1).save(good)
    bad.write_bytes(good.read_bytes()[:200])
    return [
        ("missing", {"image": str(folder / "none.png"), "text": "a dog"}), ("good", {"image": str(good)}),
        ("bad", {"image": str(bad)}), ("empty", {"text": " "}), ("text", "a cat"), ("bad again", bad),
    ]  # fmt: skip


def test_rows_that_cannot_be_read_are_skipped_and_named(model, tmp_path, caplog):
    rows = damaged_rows(tmp_path)
    store = embed_rows(*model, rows, tmp_path / "store", on_error="skip", shard_rows=2)
    assert store.rows.tolist() == [-1, 0, -1, -1, 1, -1] and len(store.vectors) == 2  # "good" before "text"
    assert list(store.skipped) == ["missing", "bad", "empty", "bad again"] and store.manifest["skipped"] == 4
    assert "none.png: no such file" in store.skipped["missing"]
    assert "bad.png" in store.skipped["bad"] and store.skipped["bad again"] == store.skipped["bad"]
    assert "neither an image nor a text" in store.skipped["empty"]
    assert "4 of 6 rows were skipped; the first, 'missing'" in caplog.text
    expected = model[0].encode([rows[1][1], rows[4][1]], model[1]).numpy()
    assert np.abs(store.embeddings([1, 4]) - expected).max() < 1e-3
    with pytest.raises(ValueError, match="row 'bad' has no embedding: .*bad.png"):
        store.embeddings([4, 2])
    with pytest.raises(ImageError, match="row 'missing': .*no such file"):
        embed_rows(*model, rows, tmp_path / "store", shard_rows=2)
    # a shard in which nothing could be read
    store = embed_rows(*model, [("t", "a"), ("b", tmp_path / "bad.png")], tmp_path / "b", on_error="skip", shard_rows=1)
    assert store.manifest["shards"] == [0, 1] and store.rows.tolist() == [0, -1]


@pytest.mark.parametrize(
    ("which", "message"),
    [
        ([0], "row 'missing': .*none.png: no such file"),
        ([1, 2], "row 'bad': .*bad.png: not a readable image"),
        ([3], "row 'empty': .*neither an image nor a text"),
        ([], "there are no rows"),
        ([1, 4, 4, 1, 1], "2 ids occur more than once: 'good', 'text'; give each row its own id"),
    ],
)
def test_bad_rows_are_named(which, message, model, tmp_path):
    rows = damaged_rows(tmp_path)
    with pytest.raises(ValueError, match=message):
        embed_rows(*model, [rows[n] for n in which], tmp_path / "store")
    with pytest.raises((FileNotFoundError, ValueError), match="holds no embeddings|not complete"):
        Store(tmp_path / "store")


def test_other_bad_input_is_named(model, tmp_path):
    for rows, message in (
        ([7], "row 0 must be a pair"),
        ([("a", "x"), (3, "y")], "row 1: the id must be a str that is not empty, got 3"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_rows(*model, rows, tmp_path)
    with pytest.raises(ValueError, match="none of the 1 rows can be embedded; the first, 'a': .*neither"):
        embed_rows(*model, [("a", "")], tmp_path, on_error="skip")
    with pytest.raises(ValueError, match="on_error='ignore' is unknown"):
        embed_rows(*model, [("a", "x")], tmp_path, on_error="ignore")
    with pytest.raises(ValueError, match="shard_rows must be at least 1"):
        embed_rows(*model, [("a", "x")], tmp_path, shard_rows=0)


def test_broken_embeddings_are_refused(tmp_path):
    gcl, processor = make_model()
    gcl.encoder.text_projection.weight.data[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="row 'b' holds NaN or infinite"):
        embed_rows(gcl, processor, [("i", random_image(0)), ("b", "a dog")], tmp_path)
    assert not list(tmp_path.glob("*.npy"))
    mended = [("i", random_image(0)), ("b", "a red dog")]
    assert (
        len(embed_rows(*make_model(), mended, tmp_path, truncate_dim=8)) == 2
    )  # nothing was embedded before, so everything may change


@pytest.mark.parametrize("name", ["manifest.json", "ids.json", "rows.npy", "vectors-00000.npy"])
def test_damaged_files_are_named(name, model, rows, tmp_path):
    embed_rows(*model, rows, tmp_path)
    path = tmp_path / name
    whole = path.read_bytes()
    for content in (whole[:-20], b"", b"version https://git-lfs.github.com/spec/v1"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} is damaged .*delete their folder and embed the same rows again"):
            store = Store(tmp_path)
            assert store.ids and store.embeddings() is not None
    (tmp_path / "manifest.json").write_text('{"name": "of another program"}')
    with pytest.raises(ValueError, match="its manifest.json is not one of embeddings"):
        embed_rows(*model, rows, tmp_path)


def test_rows_are_read_lazily(model, tmp_path):
    class Rows:
        """Makes a row when it is read, and counts how many rows are alive."""

        def __len__(self):
            return 100

        def __getitem__(self, number):
            asked.append(number)
            return f"row {number}", {"text": f"a dog {'one ' * (number % 5)}{number}"}

    asked = []
    store = embed_rows(*model, Rows(), tmp_path, shard_rows=10)
    assert len(store) == 100 and sorted(asked[:100]) == list(range(100)) and len(asked) == 100 + len(store.vectors)


def test_vectors_are_sliced_like_an_array(tmp_path):
    whole = np.random.default_rng(0).normal(size=(23, 4)).astype(np.float16)
    paths = [tmp_path / f"{n}.npy" for n in range(4)]
    for path, part in zip(paths, (whole[:7], whole[7:7], whole[7:20], whole[20:])):
        np.save(path, part)
    vectors = Vectors(paths, 4)
    assert vectors.shape == whole.shape and len(vectors) == 23
    for index in (slice(None), slice(3, 21), slice(18, 50), slice(5, 5), slice(None, None, -2), [22, 0, 7, 7, -1], 9):
        assert np.array_equal(vectors[index], whole[index]), index
    with pytest.raises(IndexError):
        vectors[[23]]


def test_a_log_gets_lines_with_rate_and_time_left(monkeypatch, capsys, model, rows, tmp_path):
    monkeypatch.setattr("universal_gcl.retrieval.progress._SECONDS_BETWEEN_LINES", 0.0)
    embed_rows(*model, rows, tmp_path, shard_rows=5, show_progress=True)
    lines = capsys.readouterr().err.splitlines()
    assert any(line.startswith("embed: 5 of ") and "rows/s" in line and line.endswith(" left") for line in lines)
    assert all("\r" not in line for line in lines)
