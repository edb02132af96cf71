import math

import pytest

from universal_gcl.evaluation.metrics import hit_rate_at_k, load_metric, mrr_at_k, ndcg_at_k, recall_at_k

# three queries by hand: relevant at rank 2; relevant at ranks 1 and 4; nothing relevant retrieved
RANKINGS = [[7, 3, 5, 1], [2, 9, 8, 4], [5, 6, 7, 8]]
RELEVANT = [[3], [2, 4], [1]]


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("a metric went to the network")

    monkeypatch.setattr("socket.create_connection", refuse)


@pytest.mark.parametrize(("k", "expected"), [(1, 1 / 3), (2, 2 / 3), (4, 2 / 3), (10, 2 / 3)])
def test_hit_rate_by_hand(k, expected):
    assert hit_rate_at_k(RANKINGS, RELEVANT, k) == pytest.approx(expected)
    assert load_metric("hit_rate").compute(predictions=RANKINGS, references=RELEVANT, k=k) == {
        f"hit@{k}": pytest.approx(expected)
    }


@pytest.mark.parametrize(
    ("k", "expected"),
    [
        (1, (0 + 1 + 0) / 3),
        # the ideal of the second query holds both relevant items, though one was not retrieved in time
        (2, (1 / math.log2(3) + 1 / (1 + 1 / math.log2(3)) + 0) / 3),
        (4, (1 / math.log2(3) + (1 + 1 / math.log2(5)) / (1 + 1 / math.log2(3)) + 0) / 3),
    ],
)
def test_ndcg_by_hand(k, expected):
    assert ndcg_at_k(RANKINGS, RELEVANT, k) == pytest.approx(expected)
    result = load_metric("ndcg").compute(predictions=RANKINGS, references=RELEVANT, k=k)
    assert result == {f"ndcg@{k}": pytest.approx(expected)}


@pytest.mark.parametrize(("k", "expected"), [(1, (0 + 1 / 2 + 0) / 3), (2, (1 + 1 / 2 + 0) / 3), (4, (1 + 1 + 0) / 3)])
def test_recall_by_hand(k, expected):
    assert recall_at_k(RANKINGS, RELEVANT, k) == pytest.approx(expected)
    result = load_metric("recall").compute(predictions=RANKINGS, references=RELEVANT, k=k)
    assert result == {f"recall@{k}": pytest.approx(expected)}


@pytest.mark.parametrize(("k", "expected"), [(1, (0 + 1 + 0) / 3), (2, (1 / 2 + 1 + 0) / 3), (4, (1 / 2 + 1 + 0) / 3)])
def test_mrr_by_hand(k, expected):
    assert mrr_at_k(RANKINGS, RELEVANT, k) == pytest.approx(expected)
    result = load_metric("mrr").compute(predictions=RANKINGS, references=RELEVANT, k=k)
    assert result == {f"mrr@{k}": pytest.approx(expected)}


@pytest.mark.parametrize("name", ["hit_rate", "ndcg", "recall", "mrr"])
def test_string_ids_give_the_same_as_numbers(name):
    metric = load_metric(name)
    as_text = [[[f"doc:{item}" for item in row] for row in table] for table in (RANKINGS, RELEVANT)]
    assert metric.compute(predictions=as_text[0], references=as_text[1]) == metric.compute(
        predictions=RANKINGS, references=RELEVANT
    )


@pytest.mark.parametrize("metric", [hit_rate_at_k, ndcg_at_k, recall_at_k, mrr_at_k])
def test_bad_input_is_refused(metric):
    with pytest.raises(ValueError, match="query 1 has no relevant item"):
        metric([[1], [2]], [[1], []], 1)
    with pytest.raises(ValueError, match="got 1 for 2 queries"):
        metric([[1]], [[1], [2]], 1)
    with pytest.raises(ValueError, match="got 0 for 0 queries"):
        metric([], [], 1)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        metric([[1]], [[1]], 0)


def test_ndcg_refuses_an_item_twice():
    with pytest.raises(ValueError, match="query 0: its ranking holds an item twice"):
        ndcg_at_k([[1, 1]], [[1]], 2)


def test_an_unknown_metric_is_an_error_that_lists_the_known_ones():
    with pytest.raises(ValueError, match="no metric 'bleu'; there are: hit_rate, mrr, ndcg, recall"):
        load_metric("bleu")
