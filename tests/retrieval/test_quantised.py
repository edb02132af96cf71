"""The int8 codes of a store are computed once, belong to its vectors, and are complete or absent."""

import json
import os
import re
import shutil

import numpy as np
import pytest
import torch

from tests.retrieval.test_run import write_store
from universal_gcl.retrieval import quantised as module
from universal_gcl.retrieval import screening
from universal_gcl.retrieval.quantised import StreamedCodes, delete_codes, saved_codes
from universal_gcl.retrieval.run import search
from universal_gcl.retrieval.search import exact_top_k
from universal_gcl.retrieval.store import Store


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(screening, "_MIN_CANDIDATES", 0)
    monkeypatch.setattr(screening, "_MIN_SAMPLE", 64)
    monkeypatch.setattr(module, "_SAMPLE", 128)
    monkeypatch.setattr(module, "_ROWS_WRITTEN_AT_ONCE", 200)


@pytest.fixture
def made(monkeypatch):
    """A list with one entry for each part of a pool whose codes were computed."""
    calls, part = [], StreamedCodes.part
    monkeypatch.setattr(StreamedCodes, "part", lambda *args: calls.append(args) or part(*args))
    return calls


def unit(rng, n, dim=19):
    rows = rng.normal(size=(n, dim)) + 1
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16)


def make_pool(folder, seed=0, n=1501):
    vectors = unit(np.random.default_rng(seed), n)
    return write_store(folder, [f"{number:05}" for number in range(n)], np.arange(n), vectors, shards=4)


def make_queries(folder):
    vectors = unit(np.random.default_rng(9), 20)
    return write_store(folder, [f"q{number}" for number in range(20)], np.arange(20), vectors)


def assert_exact(run, queries, pool, k=5):
    vectors = torch.from_numpy(queries.vectors[:].astype(np.float32))
    scores, indices = exact_top_k(vectors, pool.vectors[:], k)
    assert [run.ranking(n) for n in range(20)] == [[pool.ids[place] for place in row] for row in indices.tolist()]
    assert np.array_equal(run.scores, scores.numpy())


def test_a_pool_is_quantised_by_its_first_search_only(tmp_path, made):
    queries, pool = make_queries(tmp_path / "q"), make_pool(tmp_path / "p")
    assert_exact(search(queries, pool, 5), queries, pool)
    assert len(made) == 8  # parts of 200
    assert_exact(search(queries, Store(pool.folder), 5), queries, pool)
    assert len(made) == 8
    names = {path.name for path in pool.folder.iterdir()}
    assert {"codes.npy", "codes.safetensors"} < names and not any("partial" in name for name in names)
    assert np.load(pool.folder / "codes.npy").shape == (1501, 24)
    assert not (queries.folder / "codes.npy").exists()
    delete_codes(pool.folder)
    assert {path.name for path in pool.folder.iterdir()} == names - {"codes.npy", "codes.safetensors"}
    assert_exact(search(queries, pool, 5), queries, pool)
    assert len(made) == 16


def test_what_is_kept_describes_the_vectors(tmp_path):
    pool = make_pool(tmp_path / "p")
    kept, vectors = saved_codes(pool), torch.from_numpy(pool.vectors[:]).double()
    codes, lengths = kept.part(0, len(pool))
    assert codes.abs().max() <= 127 and (codes[:, 19:] == 0).all()
    residual = vectors - kept.mean - kept.scale.double() * codes[:, :19]
    assert (
        residual.abs() <= 0.5001 * kept.scale
    ).float().mean() > 0.99  # the rest is clipped, as it is outside the range of the sample
    expected = torch.stack([codes.double().norm(dim=1), residual.norm(dim=1), vectors.norm(dim=1)])
    assert torch.allclose(lengths.double(), expected, rtol=1e-3)


def other_vectors(folder):
    """Replace the vectors by those of another pool of the same size, and keep the manifest."""
    make_pool(folder / "other", seed=1)
    for path in (folder / "other").glob("vectors-*.npy"):
        shutil.copy(path, folder / path.name)


def other_manifest(folder):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"contents": "others"}))


def truncated(folder):
    os.truncate(folder / "codes.npy", 9000)


def no_safetensors(folder):
    (folder / "codes.safetensors").write_bytes(b"not at all")


@pytest.mark.parametrize("damage", [other_vectors, other_manifest, truncated, no_safetensors])
def test_what_does_not_fit_is_made_anew(damage, tmp_path, made):
    queries, pool = make_queries(tmp_path / "q"), make_pool(tmp_path / "p")
    search(queries, pool, 5)
    before = len(made)
    damage(pool.folder)
    pool = Store(pool.folder)
    assert_exact(search(queries, pool, 5), queries, pool)
    assert len(made) == 2 * before
    search(queries, pool, 5)
    assert len(made) == 2 * before


def test_a_folder_that_cannot_be_written_is_searched_all_the_same(tmp_path, monkeypatch, caplog):
    queries, pool = make_queries(tmp_path / "q"), make_pool(tmp_path / "p")

    def refuse(*args):
        raise PermissionError(13, "Permission denied", str(pool.folder / "codes.npy"))

    monkeypatch.setattr(module, "write_whole", refuse)
    assert_exact(search(queries, pool, 5), queries, pool)
    assert re.search(
        r"p: the int8 codes can't be saved, so each search computes them \(.*Permission denied", caplog.text
    )


def test_nothing_half_written_is_left(tmp_path, monkeypatch):
    pool, part = make_pool(tmp_path / "p"), StreamedCodes.part

    def stop(self, start, stop):
        if start == 400:
            raise KeyboardInterrupt
        return part(self, start, stop)

    before = {path.name for path in pool.folder.iterdir()}
    monkeypatch.setattr(StreamedCodes, "part", stop)
    with pytest.raises(KeyboardInterrupt):
        saved_codes(pool)
    assert {path.name for path in pool.folder.iterdir()} == before
