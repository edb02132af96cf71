"""Pools, tasks and scores, with planted embeddings and figures worked out by hand."""

import json
import math

import numpy as np
import pytest

from tests.support.planted import PlantedModel
from universal_gcl.evaluation.benchmark import RetrievalTask, evaluate_tasks
from universal_gcl.evaluation.scoring import score_run
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.retrieval.run import Run

# by their cosine to q1 the candidates rank a1 b1 a2 b2 a3, to q2 the other way round
ANGLES = {"q1": 0, "q2": 90, "a1": 10, "b1": 20, "a2": 30, "b2": 40, "a3": 50}
POOLS = {"a": ["a1", "a2", "a3"], "b": ["b1", "b2"]}


def rows(names):
    return [(name, {"text": name}) for name in names]


@pytest.fixture
def embed(tmp_path):
    vectors = {name: (math.cos(math.radians(at)), math.sin(math.radians(at))) for name, at in ANGLES.items()}
    model = PlantedModel(vectors)

    def embed(name, rows):
        model.calls.append(name)
        return embed_rows(model, None, rows, tmp_path / "embeddings" / name, on_error="skip")

    embed.calls = model.calls
    return embed


def evaluate(embed, out, positives, pool="a", queries=("q1", "q2"), **options):
    task = RetrievalTask("made", "t→t", rows(queries), positives, pool)
    return evaluate_tasks([task], {name: rows(names) for name, names in POOLS.items()}, embed, out, **options)


def test_local_and_global_by_hand(embed, tmp_path):
    result = evaluate(embed, tmp_path, {"q1": ["a2"], "q2": ["a2", "b2"]}, ks=(1, 2, 3))
    task = result["tasks"]["made"]
    # q1 finds a2 second of a1 a2 a3; q2 finds it second of a3 a2 a1, and b2 is not in this pool
    local = task["local"]
    assert (local["candidates"], local["positives_outside"]) == (3, 1)
    assert (local["hit@1"], local["hit@2"], local["mrr@3"]) == (0, 1, 0.5)
    assert local["recall@2"] == pytest.approx((1 + 1 / 2) / 2)
    # of all: q1 finds a1 b1 a2, q2 finds a3 b2 a2
    world = task["global"]
    assert (world["candidates"], world["positives_outside"]) == (5, 0)
    assert (world["hit@1"], world["hit@2"], world["hit@3"]) == (0, 0.5, 1)
    ideal = 1 + 1 / math.log2(3)
    expected = (1 / math.log2(4) + (1 / math.log2(3) + 1 / math.log2(4)) / ideal) / 2
    assert world["ndcg@3"] == pytest.approx(expected)
    assert world["mrr@5"] == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert result["candidates"] == {"a": 3, "b": 2} and result["skipped"] == {}
    records = [json.loads(line) for line in (tmp_path / "records" / "made.global.jsonl").read_text().splitlines()]
    assert records == [{"query": "q1", "positives": 1, "ranks": [3]}, {"query": "q2", "positives": 2, "ranks": [2, 3]}]
    assert embed.calls == ["candidates/a", "candidates/b", "queries/made"]


def test_a_run_is_scored_again_without_the_model(embed, tmp_path):
    positives = {"q1": ["a2"], "q2": ["b2"]}
    result = evaluate(embed, tmp_path, positives, ks=(1, 2))
    run = Run.load(tmp_path / "runs" / "made.global.safetensors")
    metrics, _ = score_run(run, positives, (1, 2))
    assert metrics.items() <= result["tasks"]["made"]["global"].items()


def test_local_scope_embeds_its_own_pool_only(embed, tmp_path):
    result = evaluate(embed, tmp_path, {"q1": ["b1"], "q2": ["b1"]}, pool="b", scopes=("local",), ks=(1,))
    assert embed.calls == ["candidates/b", "queries/made"] and "global" not in result["tasks"]["made"]


def test_a_query_without_embedding_is_a_miss_and_is_named(embed, tmp_path):
    positives = {"q1": ["a1"], "gone": ["a1"]}
    result = evaluate(embed, tmp_path, positives, queries=("q1", "gone"), ks=(1,), scopes=("local",))
    local = result["tasks"]["made"]["local"]
    assert (local["hit@1"], local["recall@1"], local["ndcg@1"], local["mrr@3"]) == (0.5, 0.5, 0.5, 0.5)
    assert list(result["skipped"]["queries/made"]) == ["gone"]


def test_bad_tasks_are_refused(embed, tmp_path):
    with pytest.raises(ValueError, match="task made: there is no pool 'c', only a, b"):
        evaluate(embed, tmp_path, {"q1": ["a1"], "q2": ["a1"]}, pool="c")
    with pytest.raises(ValueError, match="1 queries of the run have no positives, e.g. 'q2'"):
        evaluate(embed, tmp_path, {"q1": ["a1"]})
    with pytest.raises(ValueError, match="query 1 has no relevant item"):
        evaluate(embed, tmp_path, {"q1": ["a1"], "q2": []})


def test_a_shallow_run_is_not_scored_deeper():
    manifest = {"pools": [{"rows": 9, "skipped": 0}]}
    run = Run(["q"], ["a", "b"], np.array([[0, 1]]), np.ones((1, 2), np.float32), manifest)
    with pytest.raises(ValueError, match="the run holds 2 candidates for each query: hit@5 needs more"):
        score_run(run, {"q": ["a"]}, (1, 5))
