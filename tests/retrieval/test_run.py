"""Search over stores gives the same result as sorting all rows, and a run can be saved and loaded."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.retrieval.run import Run, search
from universal_gcl.retrieval.store import FORMAT, Store, write_json

MODEL = {"weights": "w", "config": "c", "processor": "p", "name": "tests", "revision": None}


def write_store(folder, ids, rows, vectors, shards=1, **changes):
    folder.mkdir(parents=True)
    parts = np.array_split(vectors.astype(np.float16), shards)
    for number, part in enumerate(parts):
        np.save(folder / f"vectors-{number:05}.npy", part)
    np.save(folder / "rows.npy", np.asarray(rows))
    write_json(folder / "ids.json", ids)
    skipped = {name: "damaged" for name, row in zip(ids, rows) if row < 0}
    write_json(folder / "skipped.json", skipped)
    manifest = {
        "format": FORMAT, "complete": True, "model": MODEL, "options": {}, "dim": vectors.shape[1], "rows": len(ids),
        "vectors": len(vectors), "skipped": len(skipped), "ids": "-", "contents": "-",
        "shards": [len(part) for part in parts],
    }  # fmt: skip
    write_json(folder / "manifest.json", manifest | changes)
    return Store(folder)


def make_store(folder, rng, num_rows, prefix, **options):
    """A store with vectors of -1, 0 and 1, so that most scores are tied. Some rows share a vector, some have none."""
    num_vectors = int(rng.integers(1, num_rows + 1))
    rows = np.concatenate([np.arange(num_vectors), rng.integers(-1, num_vectors, num_rows - num_vectors)])
    rng.shuffle(rows)
    ids = [f"{rng.integers(0, 3)}{prefix}{number}" for number in rng.permutation(num_rows)]
    firsts = {}
    for _, row in sorted(zip(ids, rows.tolist())):
        if row >= 0:
            firsts.setdefault(row, len(firsts))
    rows = np.array([firsts.get(row, -1) for row in rows.tolist()])
    vectors = rng.integers(-1, 2, (num_vectors, 3)).astype(np.float16)
    return write_store(folder, ids, rows, vectors, int(rng.integers(1, 4)), **options)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), num_pools=st.integers(1, 3), k=st.integers(1, 30))
def test_equals_a_full_sort_of_all_rows(seed, num_pools, k, tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("stores"), np.random.default_rng(seed)
    queries = make_store(folder / "queries", rng, int(rng.integers(1, 9)), "q")
    pools = [make_store(folder / str(n), rng, int(rng.integers(1, 12)), f"p{n}-") for n in range(num_pools)]
    run = search(queries, pools if num_pools > 1 else pools[0], k)
    everything = [
        (pool.ids[number], pool.vectors[int(row)].astype(np.float32))
        for pool in pools
        for number, row in enumerate(pool.rows)
        if row >= 0
    ]
    present = [number for number, row in enumerate(queries.rows) if row >= 0]
    assert run.query_ids == [queries.ids[number] for number in present]
    for place, number in enumerate(present):
        query = queries.embeddings([number])[0]
        scores = [float(query @ vector) for _, vector in everything]
        order = sorted(range(len(everything)), key=lambda n: (-scores[n], everything[n][0]))[:k]
        assert run.ranking(place) == [everything[n][0] for n in order]
        assert run.scores[place].tolist() == [scores[n] for n in order]
    assert run.manifest["missing_queries"] == len(queries) - len(present)
    run.save(folder / "run.safetensors")
    loaded = Run.load(folder / "run.safetensors")
    assert [loaded.ranking(n) for n in range(len(present))] == [run.ranking(n) for n in range(len(present))]
    assert np.array_equal(loaded.scores, run.scores) and loaded.manifest == run.manifest
    assert (loaded.query_ids, loaded.candidate_ids) == (run.query_ids, run.candidate_ids)


def test_from_rows_to_a_run(tmp_path):
    model, processor = GCLModel.from_encoder(tiny_encoder("clip")).eval(), tiny_processor("clip")
    texts = ["a red dog", "the blue bird flies", "one house", "a red dog", "two"]
    pool = embed_rows(model, processor, [(f"d{n}", text) for n, text in enumerate(texts)], tmp_path / "pool")
    queries = embed_rows(model, processor, [("q", "a red dog")], tmp_path / "queries")
    run = search(queries, pool, 3)
    assert run.ranking(0)[:2] == ["d0", "d3"] and run.scores[0, 0] == run.scores[0, 1] == pytest.approx(1, abs=1e-3)
    assert run.manifest["pools"][0]["model"] == run.manifest["queries"]["model"] == pool.manifest["model"]
    run.save_trec(tmp_path / "run.txt")
    lines = [line.split() for line in (tmp_path / "run.txt").read_text().splitlines()]
    assert [line[:4] for line in lines] == [["q", "Q0", name, str(n + 1)] for n, name in enumerate(run.ranking(0))]
    assert [np.float32(line[4]) for line in lines] == run.scores[0].tolist()


def test_a_result_does_not_depend_on_the_order_of_rows(tmp_path):
    """All scores are equal here, and k is smaller than the number of candidates."""
    model, processor = GCLModel.from_encoder(tiny_encoder("clip")).eval(), tiny_processor("clip")
    norm = model.encoder.text_model.final_layer_norm
    norm.weight.data.zero_()
    norm.bias.data.fill_(1)  # now all texts have the same embedding, bit for bit
    rows = [(f"{n % 4}-{n}", {"text": " ".join(["dog"] * (1 + n % 6))}) for n in range(30)]
    queries = embed_rows(model, processor, [("q", "a red dog")], tmp_path / "queries")
    shuffled = [rows[n] for n in np.random.default_rng(0).permutation(len(rows))]
    pools = [embed_rows(model, processor, part, tmp_path / str(n)) for n, part in enumerate((rows, shuffled))]
    halves = [embed_rows(model, processor, part, tmp_path / f"h{n}") for n, part in enumerate((rows[:9], rows[9:]))]
    assert len(pools[0].vectors) == 6
    assert len(set(search(queries, pools[0], 30).scores[0])) == 1
    for k in (1, 7, 16, 29):
        runs = [search(queries, pool, k) for pool in (*pools, halves, halves[::-1])]
        assert all(run.ranking(0) == runs[0].ranking(0) for run in runs)
        assert all(np.array_equal(run.scores, runs[0].scores) for run in runs)
        assert runs[0].ranking(0) == sorted(name for name, _ in rows)[:k]


def test_what_does_not_belong_together_is_refused(tmp_path):
    vectors = np.eye(3)
    queries = write_store(tmp_path / "queries", ["a", "b", "c"], [0, 1, 2], vectors)
    others = {
        "model": ({"model": MODEL | {"weights": "other", "revision": "0123456789"}}, "different models.*weights other"),
        "options": ({"options": {"truncate_dim": 3}}, "different options: {} and {'truncate_dim': 3}"),
    }  # fmt: skip
    for name, (change, message) in others.items():
        pool = write_store(tmp_path / name, ["x", "y", "z"], [0, 1, 2], vectors, **change)
        with pytest.raises(ValueError, match=message):
            search(queries, pool, 1)
    renamed = {"model": MODEL | {"name": "elsewhere", "revision": "1"}}  # the same weights
    assert search(queries, write_store(tmp_path / "r", ["x"], [0], vectors[:1], **renamed), 1).ranking(2) == ["x"]
    with pytest.raises(ValueError, match="3 ids are in several pools, e.g. 'a'"):
        search(queries, [queries, queries], 1)
    with pytest.raises(ValueError, match="k must be at least 1"):
        search(queries, queries, 0)
    with pytest.raises(ValueError, match="no pool"):
        search(queries, [], 1)
    spaced = write_store(tmp_path / "spaced", ["a b"], [0], vectors[:1])
    with pytest.raises(ValueError, match="'a b' holds white space"):
        search(queries, spaced, 1).save_trec(tmp_path / "run.txt")
    assert not (tmp_path / "run.txt").exists()


def test_other_files_are_no_runs(tmp_path):
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(ValueError, match="is not the result of a search"):
        Run.load(tmp_path / "x.safetensors")
