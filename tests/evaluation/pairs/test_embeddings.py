from dataclasses import replace

import numpy as np
import pytest

from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings
from universal_gcl.evaluation.pairs.measure import embed_pairs, evaluate_embeddings


def test_a_saved_file_gives_the_same_result(make_embeddings, tmp_path):
    embeddings = make_embeddings(gap=0.5)
    embeddings.save(tmp_path / "pairs.safetensors")
    loaded = PairEmbeddings.load(tmp_path / "pairs.safetensors")
    assert loaded.ids == embeddings.ids and loaded.caption_counts == embeddings.caption_counts
    assert evaluate_embeddings(loaded) == evaluate_embeddings(embeddings)


def test_caption_of_names_the_caption_that_was_embedded(hash_model, make_pairs):
    pairs = make_pairs([4, 6, 5])
    embeddings = embed_pairs(hash_model, None, pairs)
    for candidate, owner in enumerate(embeddings.owners["t"]):
        text = pairs[owner]["captions"][embeddings.caption_of("t", candidate)]
        assert np.array_equal(embeddings.candidates["t"][candidate], hash_model.vector(None, text))
    assert embeddings.caption_of("it", 1) == 3 and embeddings.caption_of("i", 1) is None


def test_inconsistent_parts_are_refused(make_embeddings):
    good = make_embeddings(num_pairs=5)
    with pytest.raises(ValueError, match="2 ids occur more than once: 'a', 'b'"):
        replace(good, ids=["a", "a", "b", "b", "c"])
    with pytest.raises(ValueError, match="owners must name each of the 5 pairs"):
        replace(good, owners=good.owners | {"i": np.array([0, 1, 2, 3, 3])})
    with pytest.raises(ValueError, match="don't fit"):
        replace(good, queries=good.queries | {"t": good.queries["t"][:4]})
    spoilt = good.candidates["t"].copy()
    spoilt[7, 0] = np.nan  # three text candidates a pair: the third pair's second
    with pytest.raises(
        ValueError, match=r"the t candidate embedding of pair 'p2' holds NaN or infinite numbers \(1 of 15"
    ):
        replace(good, candidates=good.candidates | {"t": spoilt})
