import math

import numpy as np
import pytest

from universal_gcl.evaluation.pairs.mixed import draw_modalities, mixed_search


@pytest.mark.parametrize("count", [1, 2, 9, 100, 1000])
def test_the_draw_is_balanced_random_and_repeatable(count):
    drawn = draw_modalities(count, 3, seed=5)
    sizes = np.bincount(drawn, minlength=3)
    assert drawn.shape == (count,) and sizes.max() - sizes.min() <= 1
    assert np.array_equal(drawn, draw_modalities(count, 3, seed=5))
    if count >= 100:
        assert not np.array_equal(drawn, draw_modalities(count, 3, seed=6))
        assert not np.array_equal(drawn, np.arange(count) % 3)


def test_equals_a_slow_loop():
    rng = np.random.default_rng(0)
    content = rng.normal(size=(60, 12))
    items = {name: (content + rng.normal(size=(60, 12))).astype(np.float32) for name in ("i", "t", "it")}
    queries = (content + rng.normal(size=(60, 12))).astype(np.float32)
    drawn = draw_modalities(60, 3, seed=1)
    pool = [list(items.values())[drawn[j]][j] for j in range(60)]
    gains = []
    for j, query in enumerate(queries):
        scores = [float(np.dot(query.astype(float), item.astype(float))) for item in pool]
        rank = 1 + sum(score > scores[j] for score in scores)
        gains.append(1 / math.log2(1 + rank) if rank <= 10 else 0.0)
    result = mixed_search(queries, items, seed=1)
    assert result["ndcg@10"] == pytest.approx(np.mean(gains))
    for number, name in enumerate(items):
        assert result["ndcg@10_by_target"][name] == pytest.approx(np.mean(np.array(gains)[drawn == number]))
    assert result["items"] == {"i": 20, "t": 20, "it": 20} and result["seed"] == 1
    assert 0.2 < result["ndcg@10"] < 0.9


def test_each_item_is_in_the_pool_once():
    # were another modality's copy of the item in the pool too, an item drawn as an image could be found through it
    queries = np.eye(12, dtype=np.float32)
    items = {"i": -queries, "t": queries, "it": queries}
    result = mixed_search(queries, items, seed=0)
    assert result["ndcg@10_by_target"] == {"i": 0.0, "t": 1.0, "it": 1.0}
    assert result["ndcg@10"] == pytest.approx(2 / 3)


def test_a_modality_without_items_is_left_empty():
    result = mixed_search(np.eye(2, dtype=np.float32), {name: np.eye(2, dtype=np.float32) for name in "abc"}, seed=0)
    assert result["ndcg@10"] == 1.0 and result["ndcg@10_by_target"] == {"a": 1.0, "b": 1.0, "c": None}
