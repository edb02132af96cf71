"""Nine-way evaluation on image-caption pairs: every modality as query, every modality as target.

A direction `t→i` has the texts as queries and the images as targets. It is measured in two pools, as M-BEIR does: the
*local* pool holds the target modality only, the *global* pool all candidates of all modalities, the same for all.
A hit counts when a candidate of the query's own pair, in the target modality, is among the first k; in the global pool
its twins in the other modalities (and, for image queries, the query image itself) take places of their own.

What each caption is used for depends on the smallest number of captions in the set, so that all pairs take part in the
same way; further captions become text candidates.

| captions | text query | fused query       | text candidates | fused candidate    |
|----------|------------|-------------------|-----------------|--------------------|
| 1        | 0          | image + caption 0 | 0, …            | image + caption 0  |
| 2        | 0          | image + caption 0 | 1, …            | image + caption 1  |
| 3        | 0          | image + caption 1 | 2, …            | image + caption 2  |
| 4 or more| 0          | image + caption 1 | 2, …            | image + caption 3  |

- All text candidates of a pair are right answers. Equal captions in different pairs stay different candidates: only the
  pair's id decides what is right.
- Directions whose query and target share the image or a caption are shown but stay out of the headline. With two or
  more captions these are i→it, it→i and it→it; with one caption also t→it and it→t.
- Directions whose target is the query itself are left empty: i→i needs a second view of the image; with one caption
  also t→t and it→it.
- The headline is the mean hit@10 over the directions of HEADLINE that count: with two or more captions all five, with
  one caption t→i and i→t. Numbers from different `captions_per_pair` are not comparable.
"""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from universal_gcl.evaluation.metrics import hit_rate_at_k
from universal_gcl.evaluation.pairs.embeddings import MODALITIES, PairEmbeddings, caption_roles, check_ids
from universal_gcl.evaluation.pairs.gap import modality_gap, top_share
from universal_gcl.evaluation.pairs.mixed import mixed_search
from universal_gcl.retrieval.search import exact_top_k

DIRECTIONS = tuple(f"{query}→{target}" for query in MODALITIES for target in MODALITIES)
HEADLINE = ("t→i", "i→t", "t→it", "it→t", "t→t")
KS = (1, 5, 10)


def embed_pairs(
    model, processor, pairs, *, batch_size: int = 64, show_progress: bool = False, truncate_dim: int | None = None
) -> PairEmbeddings:
    """Embed all queries and candidates of the pairs, in one call of `model.encode`.

    Args:
        model: has `encode(rows, processor=…, batch_size=…, show_progress=…)` → (rows, D) unit-norm tensor or array.
        pairs: sequence of `{"id", "image", "captions"}`.
        truncate_dim: cut the embeddings to so many dimensions (Matryoshka), by `model.encode(…, truncate_dim=…)`.

    Raises:
        ValueError: no pairs, an id twice, a pair without an image, captions that are missing, empty or not strings,
            an image that cannot be read, NaN in the embeddings. The pair is named.
    """
    ids, images, captions = _checked(pairs)
    counts = Counter(len(texts) for texts in captions)
    roles = caption_roles(min(counts))
    rows: list[dict] = [{"image": image} for image in images]
    places: dict[tuple, int] = {}  # (pair, caption, with the image or not) → row

    def row_of(pair: int, caption: int, fused: bool) -> int:
        key = (pair, caption, fused)
        if key not in places:
            places[key] = len(rows)
            text = captions[pair][caption]
            rows.append({"image": images[pair], "text": text} if fused else {"text": text})
        return places[key]

    everyone = range(len(ids))
    candidates_t = [(pair, place) for pair in everyone for place in range(roles.first_text, len(captions[pair]))]
    queries = {
        "i": list(everyone),
        "t": [row_of(pair, roles.text_query, False) for pair in everyone],
        "it": [row_of(pair, roles.fused_query, True) for pair in everyone],
    }
    candidates = {
        "i": list(everyone),
        "t": [row_of(pair, place, False) for pair, place in candidates_t],
        "it": [row_of(pair, roles.fused_candidate, True) for pair in everyone],
    }
    owners = {"i": list(everyone), "t": [pair for pair, _ in candidates_t], "it": list(everyone)}
    options = {"batch_size": batch_size, "show_progress": show_progress}
    if truncate_dim is not None:
        options["truncate_dim"] = truncate_dim
    try:
        embeds = model.encode(rows, processor=processor, **options)
    except ValueError as error:
        hint = f"rows 0 to {len(ids) - 1} are the images of the pairs, in their order"
        raise ValueError(f"the pairs could not be embedded ({hint}): {error}") from error
    embeds = np.asarray(embeds.detach().float().cpu() if hasattr(embeds, "detach") else embeds, dtype=np.float32)
    if embeds.ndim != 2 or len(embeds) != len(rows):
        raise ValueError(f"model.encode returned shape {embeds.shape} for {len(rows)} rows; expected ({len(rows)}, D)")
    return PairEmbeddings(
        ids=ids,
        caption_counts=dict(sorted(counts.items())),
        queries={name: embeds[places_] for name, places_ in queries.items()},
        candidates={name: embeds[places_] for name, places_ in candidates.items()},
        owners={name: np.array(pairs_, dtype=np.int64) for name, pairs_ in owners.items()},
    )


def evaluate_pairs(
    model, processor, pairs, *, batch_size: int = 64, seed: int = 0, show_progress: bool = False
) -> dict:
    """`embed_pairs`, then `evaluate_embeddings`; see there for the arguments, the result and the errors."""
    embeddings = embed_pairs(model, processor, pairs, batch_size=batch_size, show_progress=show_progress)
    return evaluate_embeddings(embeddings, seed=seed)


def evaluate_embeddings(embeddings: PairEmbeddings, *, seed: int = 0) -> dict:
    """The nine-way table, mixed-modality search and the modality gap, from embeddings alone.

    Args:
        seed: of the modality drawn for each item in mixed-modality search. Nothing else is random.

    Returns:
        A dict that can be written as JSON; all rates in 0..1:
        - `protocol` "pairs", `num_pairs`, `captions_per_pair` (the smallest number, which the protocol follows),
          `caption_counts` (number of captions → pairs that have it), `candidates` (modality → how many), `seed`;
        - `nine_way`: direction → `{"local", "global", "headline", "note"}`; `local` and `global` are
          `{"hit@1", "hit@5", "hit@10"}`, or None where the direction is left empty;
        - `headline`: `{"local", "global", "mean"}`, mean hit@10 over `headline_directions`;
        - `mixed`: see `mixed_search`; `{"ndcg@10": None, "seed", "note"}` with one caption a pair;
        - `gap`: `cosine` and `distance` of the candidates' means ("i,t", "i,it", "t,it"); the share of each modality
          in the top 10 of the global pool over all queries (`top10_share`) and by query modality
          (`top10_share_by_query`), to be read against `pool_share`, its share of the pool.
    """
    nine_way, rankings = _nine_way(embeddings)
    counted = [direction for direction in HEADLINE if nine_way[direction]["headline"]]
    headline = {
        pool: float(np.mean([nine_way[direction][pool]["hit@10"] for direction in counted]))
        for pool in ("local", "global")
    }
    headline["mean"] = (headline["local"] + headline["global"]) / 2
    sizes = {name: len(matrix) for name, matrix in embeddings.candidates.items()}
    return {
        "protocol": "pairs",
        "num_pairs": len(embeddings.ids),
        "captions_per_pair": embeddings.captions_per_pair,
        "caption_counts": {str(count): pairs for count, pairs in embeddings.caption_counts.items()},
        "candidates": sizes,
        "seed": seed,
        "nine_way": nine_way,
        "headline": headline,
        "headline_directions": counted,
        "mixed": _mixed(embeddings, seed),
        "gap": {
            **modality_gap(embeddings.candidates),
            "top10_share": top_share(np.concatenate(list(rankings.values())), sizes),
            "top10_share_by_query": {name: top_share(ranking, sizes) for name, ranking in rankings.items()},
            "pool_share": {name: size / sum(sizes.values()) for name, size in sizes.items()},
        },
    }


def direction_note(direction: str, captions_per_pair: int) -> tuple[bool, str | None]:
    """Whether a direction can be measured with that many captions, and what to say about it (None: it counts)."""
    roles = caption_roles(captions_per_pair)
    query, target = direction.split("→")
    inputs = {"i": {"image"}, "t": {roles.text_query}, "it": {"image", roles.fused_query}}[query]
    answers = {"i": {"image"}, "t": {roles.first_text}, "it": {"image", roles.fused_candidate}}[target]
    if inputs == answers:
        needed = "view of the image" if query == "i" else "caption"
        return False, f"left empty: the target would be the query itself; needs a second {needed}"
    if inputs & answers:
        return True, f"query and target share the {'image' if 'image' in inputs & answers else 'caption'}"
    return True, None


def _nine_way(embeddings: PairEmbeddings) -> tuple[dict, dict[str, np.ndarray]]:
    """The table, and for each query modality the (N, ≤10) top of the global pool."""
    pool = np.concatenate([embeddings.candidates[name] for name in MODALITIES])
    sizes = [len(embeddings.candidates[name]) for name in MODALITIES]
    first = dict(zip(MODALITIES, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    right = {name: _by_owner(embeddings.owners[name], len(embeddings.ids)) for name in MODALITIES}
    tops = {name: _top(embeddings.queries[name], pool) for name in MODALITIES}
    table = {}
    for direction in DIRECTIONS:
        query, target = direction.split("→")
        measured, note = direction_note(direction, embeddings.captions_per_pair)
        local_top = _top(embeddings.queries[query], embeddings.candidates[target]) if measured else None
        table[direction] = {
            "local": _hits(local_top, right[target], 0) if measured else None,
            "global": _hits(tops[query], right[target], first[target]) if measured else None,
            "headline": direction in HEADLINE and note is None,
            "note": note,
        }
    return table, tops


def _top(queries: np.ndarray, candidates: np.ndarray) -> np.ndarray:
    return exact_top_k(queries, candidates, min(max(KS), len(candidates)))[1].numpy()


def _by_owner(owners: np.ndarray, num_pairs: int) -> list[list[int]]:
    right: list[list[int]] = [[] for _ in range(num_pairs)]
    for candidate, owner in enumerate(owners.tolist()):
        right[owner].append(candidate)
    return right


def _hits(top: np.ndarray, right: list[list[int]], first: int) -> dict[str, float]:
    """hit@k of rankings whose pool holds the target modality from index `first` on."""
    rankings = (top - first).tolist()
    return {f"hit@{k}": hit_rate_at_k(rankings, right, k) for k in KS}


def _mixed(embeddings: PairEmbeddings, seed: int) -> dict:
    if embeddings.captions_per_pair < 2:
        return {"ndcg@10": None, "seed": seed, "note": "left empty: the text query would be in the pool itself"}
    items = {}
    for name in MODALITIES:
        # each pair's first candidate: an item appears once, also in the modality that has several
        _, firsts = np.unique(embeddings.owners[name], return_index=True)
        items[name] = embeddings.candidates[name][firsts]
    return mixed_search(embeddings.queries["t"], items, seed=seed)


def _checked(pairs: Iterable[dict]) -> tuple[list[str], list, list[list[str]]]:
    ids, images, captions = [], [], []
    for number, pair in enumerate(pairs):
        missing = [key for key in ("id", "image", "captions") if pair.get(key) is None]
        if missing:
            raise ValueError(f"pair {number} (id {pair.get('id')!r}) has no {', '.join(missing)}")
        texts = pair["captions"]
        if isinstance(texts, str) or not len(texts):
            raise ValueError(f"pair {number} (id {pair['id']!r}): captions must be a list of at least one string")
        for place, text in enumerate(texts):
            if not isinstance(text, str) or not text.strip():
                raise ValueError(f"pair {number} (id {pair['id']!r}): caption {place} is {text!r}, not a text")
        ids.append(str(pair["id"]))
        images.append(pair["image"])
        captions.append(list(texts))
    if not ids:
        raise ValueError("there are no pairs to evaluate")
    check_ids(ids)
    return ids, images, captions
