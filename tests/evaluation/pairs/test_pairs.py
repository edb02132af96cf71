import json

import numpy as np
import pytest
import torch

from modeling_gcl.modalities import ALL_DIRECTIONS
from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings
from universal_gcl.evaluation.pairs.measure import (
    HEADLINE,
    direction_note,
    embed_pairs,
    evaluate_embeddings,
    evaluate_pairs,
)

# the protocol, written out: number of captions → text query, fused query, first text candidate, fused candidate
ROLES = {1: (0, 0, 0, 0), 2: (0, 0, 1, 1), 3: (0, 1, 2, 2), 4: (0, 1, 2, 3), 5: (0, 1, 2, 3)}


def slow_nine_way(model, pairs, roles):
    """Every query against every candidate, one at a time, with nothing shared with the module under test."""
    text_query, fused_query, first_text, fused_candidate = roles
    queries, candidates = [], []
    for owner, pair in enumerate(pairs):
        image, captions = pair["image"], pair["captions"]
        queries.append(("i", owner, model.vector(image, None)))
        queries.append(("t", owner, model.vector(None, captions[text_query])))
        queries.append(("it", owner, model.vector(image, captions[fused_query])))
        candidates.append(("i", owner, model.vector(image, None)))
        candidates += [("t", owner, model.vector(None, caption)) for caption in captions[first_text:]]
        candidates.append(("it", owner, model.vector(image, captions[fused_candidate])))
    table = {}
    for query_modality in ("i", "t", "it"):
        for target in ("i", "t", "it"):
            for pool in ("local", "global"):
                hits = {1: [], 5: [], 10: []}
                for _, owner, query in (entry for entry in queries if entry[0] == query_modality):
                    allowed = [entry for entry in candidates if pool == "global" or entry[0] == target]
                    ranked = sorted(allowed, key=lambda entry: -float(np.dot(query.astype(float), entry[2])))
                    right = [name == target and whose == owner for name, whose, _ in ranked]
                    for k, found in hits.items():
                        found.append(any(right[:k]))
                table[f"{query_modality}→{target}", pool] = {f"hit@{k}": np.mean(h) for k, h in hits.items()}
    return table


@pytest.mark.parametrize("captions", [1, 2, 3, 4, 5])
def test_equals_the_slow_protocol(hash_model, make_pairs, captions):
    pairs = make_pairs([captions] * 25)
    result = evaluate_pairs(hash_model, None, pairs)
    slow = slow_nine_way(hash_model, pairs, ROLES[captions])
    measured = 0
    for direction in ALL_DIRECTIONS:
        for pool in ("local", "global"):
            if result["nine_way"][direction][pool] is not None:
                assert result["nine_way"][direction][pool] == pytest.approx(slow[direction, pool]), (direction, pool)
                measured += 1
    assert measured == (12 if captions == 1 else 16)
    counted = ("t→i", "i→t") if captions == 1 else HEADLINE
    assert result["headline_directions"] == list(counted)
    for pool in ("local", "global"):
        assert result["headline"][pool] == pytest.approx(np.mean([slow[d, pool]["hit@10"] for d in counted]))
    assert result["headline"]["mean"] == pytest.approx((result["headline"]["local"] + result["headline"]["global"]) / 2)
    assert 0.1 < result["headline"]["global"] < result["headline"]["local"] < 1  # a case that can tell


def test_the_number_of_captions_may_vary_and_the_smallest_decides(hash_model, make_pairs):
    pairs = make_pairs([2, 5, 3, 2, 4, 7] * 5)
    result = evaluate_pairs(hash_model, None, pairs)
    slow = slow_nine_way(hash_model, pairs, ROLES[2])
    assert result["captions_per_pair"] == 2
    assert result["caption_counts"] == {"2": 10, "3": 5, "4": 5, "5": 5, "7": 5}
    assert result["candidates"] == {"i": 30, "t": (1 + 4 + 2 + 1 + 3 + 6) * 5, "it": 30}
    for direction in HEADLINE:
        assert result["nine_way"][direction]["global"] == pytest.approx(slow[direction, "global"])


def test_no_headline_direction_shares_an_input_between_query_and_target():
    def note(name, captions):
        return direction_note(*name.split("→"), captions)

    sharing = {captions: {d for d in ALL_DIRECTIONS if note(d, captions)[1]} for captions in ROLES}
    always = {"i→i", "i→it", "it→i", "it→it"}
    assert sharing == {1: always | {"t→t", "t→it", "it→t"}, 2: always, 3: always, 4: always, 5: always}
    empty = {captions: {d for d in ALL_DIRECTIONS if not note(d, captions)[0]} for captions in ROLES}
    assert empty == {1: {"i→i", "t→t", "it→it"}, 2: {"i→i"}, 3: {"i→i"}, 4: {"i→i"}, 5: {"i→i"}}
    assert note("i→i", 5)[1] == "left empty: the target would be the query itself; needs a second view of the image"
    assert "second caption" in note("t→t", 1)[1]
    assert note("t→it", 1)[1] == "query and target share the caption"
    assert note("it→it", 2)[1] == "query and target share the image"


def test_a_model_with_a_gap_fails_only_in_the_global_pool(make_embeddings):
    result = evaluate_embeddings(make_embeddings(num_pairs=100, width=256, gap=1.0, noise=0.3))
    assert result["nine_way"]["t→i"]["local"]["hit@1"] > 0.9
    assert result["nine_way"]["t→i"]["global"]["hit@10"] < 0.05
    assert result["gap"]["top10_share_by_query"]["t"]["t"] > 0.95
    assert result["gap"]["pool_share"] == {"i": 0.2, "t": 0.6, "it": 0.2}
    shares = result["gap"]["top10_share"]
    by_query = result["gap"]["top10_share_by_query"]
    assert {name: np.mean([by_query[q][name] for q in by_query]) for name in shares} == pytest.approx(shares)


def test_hits_in_the_global_pool_count_the_target_modality_only():
    """Two pairs on a circle, by hand."""

    def at(*angles):
        return np.array([[np.cos(a), np.sin(a)] for a in np.deg2rad(angles)], dtype=np.float32)

    images, pair = at(20, 10), np.arange(2)
    embeddings = PairEmbeddings(
        ids=["a", "b"],
        caption_counts={2: 2},
        queries={"i": images, "t": at(0, 180), "it": at(0, 180)},
        candidates={"i": images, "t": at(30, 181), "it": at(90, 182)},
        owners={"i": pair, "t": pair, "it": pair},
    )
    nine_way = evaluate_embeddings(embeddings)["nine_way"]
    # text query a, at 0°, ranks i_b i_a t_a it_a …; text query b, at 180°, ranks t_b it_b it_a t_a i_a i_b
    assert nine_way["t→i"]["local"] == {"hit@1": 0.0, "hit@5": 1.0, "hit@10": 1.0}
    assert nine_way["t→i"]["global"] == {"hit@1": 0.0, "hit@5": 0.5, "hit@10": 1.0}
    assert nine_way["t→t"]["global"] == {"hit@1": 0.5, "hit@5": 1.0, "hit@10": 1.0}


def test_encode_is_called_once_and_each_content_is_embedded_once(hash_model, make_pairs):
    embed_pairs(hash_model, None, make_pairs([5] * 6))
    assert hash_model.calls == [6 * (1 + 4 + 2)]  # image; captions 0, 2, 3, 4; image with captions 1 and 3


def test_takes_tensors_and_gives_json(hash_model, make_pairs):
    class TensorModel:
        def encode(self, rows, **options):
            assert options == {"processor": "P", "batch_size": 7, "show_progress": True}
            return torch.from_numpy(hash_model.encode(rows)).to(torch.float16).requires_grad_()

    result = evaluate_pairs(TensorModel(), "P", make_pairs([4] * 12), batch_size=7, seed=3, show_progress=True)
    assert json.loads(json.dumps(result)) == result
    assert (result["protocol"], result["num_pairs"], result["seed"]) == ("pairs", 12, 3)
    assert result["mixed"]["seed"] == 3 and 0 < result["mixed"]["ndcg@10"] <= 1


def test_one_caption_leaves_mixed_search_empty(hash_model, make_pairs):
    mixed = evaluate_pairs(hash_model, None, make_pairs([1] * 12))["mixed"]
    assert mixed["ndcg@10"] is None and "left empty" in mixed["note"]


def test_bad_pairs_are_named(hash_model, make_pairs):
    def spoilt(**changes):
        pairs = make_pairs([4] * 3)
        pairs[1].update(changes)
        return pairs

    for pairs, message in [
        ([], "no pairs to evaluate"),
        (spoilt(id="p0"), "1 ids occur more than once: 'p0'"),
        (spoilt(captions=[]), r"pair 1 \(id 'p1'\): captions must be a list of at least one string"),
        (spoilt(captions="a dog"), r"pair 1 \(id 'p1'\): captions must be a list"),
        (spoilt(captions=["1 a", None]), r"pair 1 \(id 'p1'\): caption 1 is None"),
        (spoilt(captions=["1 a", "  "]), r"pair 1 \(id 'p1'\): caption 1 is '  '"),
        (spoilt(image=None), r"pair 1 \(id 'p1'\) has no image"),
    ]:
        with pytest.raises(ValueError, match=message):
            embed_pairs(hash_model, None, pairs)
    assert hash_model.calls == []  # all found before the model ran


def test_nan_and_wrong_shapes_from_the_model_are_named(hash_model, make_pairs):
    class Broken:
        def __init__(self, change):
            self.change = change

        def encode(self, rows, **_):
            return self.change(hash_model.encode(rows))

    def nan_in_row_2(embeds):
        embeds[2] = np.nan
        return embeds

    with pytest.raises(ValueError, match="the i query embedding of pair 'p2' holds NaN"):
        embed_pairs(Broken(nan_in_row_2), None, make_pairs([4] * 5))
    with pytest.raises(ValueError, match=r"returned shape \(34, 16\) for 35 rows"):
        embed_pairs(Broken(lambda embeds: embeds[:-1]), None, make_pairs([5] * 5))

    def refuse(embeds):
        raise ValueError("row 3: broken.jpg: not a readable image")

    with pytest.raises(ValueError, match="rows 0 to 4 are the images of the pairs.*row 3: broken.jpg"):
        embed_pairs(Broken(refuse), None, make_pairs([5] * 5))
