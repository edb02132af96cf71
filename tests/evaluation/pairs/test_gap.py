import numpy as np
import pytest

from universal_gcl.evaluation.pairs.gap import modality_gap, top_share


def test_cosine_and_distance_of_the_means_by_hand():
    # means: i (0.8, 0), t (0, 0.6), it (0.4, 0.3)
    gap = modality_gap(
        {
            "i": np.array([[0.8, 0.6], [0.8, -0.6]], dtype=np.float32),
            "t": np.array([[0.8, 0.6], [-0.8, 0.6]], dtype=np.float32),
            "it": np.array([[0.4, 0.3]], dtype=np.float32),
        }
    )
    assert list(gap["cosine"]) == list(gap["distance"]) == ["i,t", "i,it", "t,it"]
    assert gap["cosine"] == pytest.approx({"i,t": 0.0, "i,it": 0.8, "t,it": 0.6}, abs=1e-6)
    assert gap["distance"] == pytest.approx({"i,t": 1.0, "i,it": 0.5, "t,it": 0.5}, abs=1e-6)


def test_the_cosine_of_a_zero_mean_is_left_empty():
    gap = modality_gap({"i": np.array([[1.0, 0.0], [-1.0, 0.0]]), "t": np.array([[0.0, 1.0]])})
    assert gap == {"cosine": {"i,t": None}, "distance": {"i,t": 1.0}}


def test_shares_of_the_retrieved_by_hand():
    # the pool: i 0-1, t 2-6, it 7
    rankings = np.array([[0, 2, 7], [1, 6, 5]])
    assert top_share(rankings, {"i": 2, "t": 5, "it": 1}) == pytest.approx({"i": 2 / 6, "t": 3 / 6, "it": 1 / 6})
    assert top_share(np.array([[0]]), {"i": 2, "t": 5, "it": 1}) == {"i": 1.0, "t": 0.0, "it": 0.0}
