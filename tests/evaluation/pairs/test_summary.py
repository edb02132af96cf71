import json

import numpy as np
import pytest

from universal_gcl.evaluation.pairs.measure import evaluate_embeddings
from universal_gcl.evaluation.pairs.summary import summarize


def write_results(path, result):
    path.write_text(json.dumps({"after": result}))
    return path


def test_mean_and_sample_deviation_over_seeds(make_embeddings, tmp_path):
    results = [evaluate_embeddings(make_embeddings(seed=seed, noise=1.0)) for seed in range(3)]
    files = [write_results(tmp_path / f"{seed}.json", result) for seed, result in enumerate(results)]
    markdown = summarize({"three seeds": files, "one": files[:1]}, tmp_path / "out")
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    values = [100 * result["headline"]["global"] for result in results]
    assert summary["three seeds"]["headline global"]["mean"] == pytest.approx(np.mean(values))
    assert summary["three seeds"]["headline global"]["std"] == pytest.approx(np.std(values, ddof=1))
    assert summary["one"]["headline global"]["std"] is None
    hits = [100 * result["nine_way"]["t→it"]["local"]["hit@10"] for result in results]
    assert summary["three seeds"]["t→it local"]["mean"] == pytest.approx(np.mean(hits))
    assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}" in markdown
    assert (tmp_path / "out" / "summary.md").read_text() == markdown + "\n"
    assert (tmp_path / "out" / "summary.png").stat().st_size > 1000


def test_runs_that_cannot_be_compared_are_refused(make_embeddings, tmp_path):
    a = write_results(tmp_path / "a.json", evaluate_embeddings(make_embeddings(num_pairs=20)))
    b = write_results(tmp_path / "b.json", evaluate_embeddings(make_embeddings(num_pairs=30)))
    with pytest.raises(ValueError):
        summarize({"a": [a], "b": [b]}, tmp_path / "out")
    with pytest.raises(ValueError, match="holds no result under 'after'"):
        summarize({"a": [write_results(tmp_path / "c.json", None)]}, tmp_path / "out")


def test_costs_are_told_where_runs_tell_them(make_embeddings, tmp_path):
    result = evaluate_embeddings(make_embeddings())
    costs = {"parameters": {"total": {"trained": 1234567}}, "train_runtime": 90.0, "peak_memory": 3 * 2**30}
    told, untold = tmp_path / "told.json", write_results(tmp_path / "untold.json", result)
    told.write_text(json.dumps({"after": result} | costs))
    assert "cost" not in summarize({"stage 1": [untold]}, tmp_path / "out")
    markdown = summarize({"stage 1": [untold], "full": [told, told]}, tmp_path / "out")
    assert "| stage 1 | – | – | – |" in markdown and "| full | 1,234,567 | 1.5 ± 0.0 | 3.0 ± 0.0 |" in markdown
