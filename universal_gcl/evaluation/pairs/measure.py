"""Nine-way evaluation on image-caption pairs: every modality as query, every modality as target.

In the direction `t→i` texts are the queries and images the targets. Each direction is measured in two pools, as in
M-BEIR. The *local* pool holds the candidates of the target modality only. The *global* pool holds all candidates of all
modalities and is the same for every direction. A query scores a hit if a candidate of its own pair, in the target
modality, is among the first k. In the global pool the pair's candidates of the other modalities take places of their
own, and so does the query image itself if the query is an image.

The smallest number of captions in the set decides what each caption is used for, so that all pairs take part in the
same way. Further captions become text candidates.

| captions | text query | fused query       | text candidates | fused candidate    |
|----------|------------|-------------------|-----------------|--------------------|
| 1        | 0          | image + caption 0 | 0, …            | image + caption 0  |
| 2        | 0          | image + caption 0 | 1, …            | image + caption 1  |
| 3        | 0          | image + caption 1 | 2, …            | image + caption 2  |
| 4 or more| 0          | image + caption 1 | 2, …            | image + caption 3  |

- All text candidates of a pair are right answers. Equal captions of different pairs are different candidates: only the
  pair's id decides what is right.
- Directions whose query and target share the image or a caption are shown but don't count in the headline. With two or
  more captions these are i→it, it→i and it→it; with one caption also t→it and it→t.
- Directions whose target would be the query itself are left empty: i→i needs a second view of the image. With one
  caption, t→t and it→it are empty too.
- The headline is the mean hit@10 over the directions of HEADLINE that count: all five with two or more captions, t→i
  and i→t with one. Don't compare numbers of different `captions_per_pair`.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from modeling_gcl.modalities import MODALITIES, direction
from universal_gcl.evaluation.metrics import hit_rate_at_k
from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings, caption_roles, check_ids
from universal_gcl.evaluation.pairs.gap import modality_gap, top_share
from universal_gcl.evaluation.pairs.mixed import mixed_search
from universal_gcl.retrieval.search import exact_top_k

HEADLINE = ("t→i", "i→t", "t→it", "it→t", "t→t")
KS = (1, 5, 10)


class RowEncoder(Protocol):
    """A model as this evaluation needs it, such as `GCLModel`."""

    def encode(
        self, rows: Sequence[dict], processor: Any = None, *, batch_size: int, show_progress: bool
    ) -> torch.Tensor | np.ndarray:
        """(len(rows), D) unit-norm embeddings."""


def embed_pairs(
    model: RowEncoder,
    processor: Any,
    pairs: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    show_progress: bool = False,
    truncate_dim: int | None = None,
) -> PairEmbeddings:
    """Embed all queries and candidates of the pairs, in one call of `model.encode`.

    Args:
        model: its `encode` also takes `truncate_dim`, if that is given here.
        processor: passed on to `model.encode`.
        pairs: each `{"id", "image", "captions"}`.
        batch_size: rows per forward pass.
        truncate_dim: cut the embeddings to this many dimensions (Matryoshka).

    Raises:
        ValueError: there are no pairs; an id occurs twice; a pair has no image; captions are missing, empty or not
            strings; an image can't be read; an embedding holds NaN. The message names the pair.
    """
    ids, images, captions = _checked(pairs)
    counts = Counter(len(texts) for texts in captions)
    roles = caption_roles(min(counts))
    rows: list[dict] = [{"image": image} for image in images]
    places: dict[tuple[int, int, bool], int] = {}  # (pair, caption, whether fused) → row

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
    options: dict[str, Any] = {"batch_size": batch_size, "show_progress": show_progress}
    if truncate_dim is not None:
        options["truncate_dim"] = truncate_dim
    try:
        encoded = model.encode(rows, processor=processor, **options)
    except ValueError as error:
        hint = f"rows 0 to {len(ids) - 1} are the images of the pairs, in the order of the pairs"
        raise ValueError(f"the pairs could not be embedded ({hint}): {error}") from error
    tensor = encoded.detach().float().cpu() if isinstance(encoded, torch.Tensor) else encoded
    embeds = np.asarray(tensor, dtype=np.float32)
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
    model: RowEncoder,
    processor: Any,
    pairs: Iterable[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Any]:
    """Call `embed_pairs`, then `evaluate_embeddings`. These two describe the arguments, the result and the errors."""
    embeddings = embed_pairs(model, processor, pairs, batch_size=batch_size, show_progress=show_progress)
    return evaluate_embeddings(embeddings, seed=seed)


def evaluate_embeddings(embeddings: PairEmbeddings, *, seed: int = 0) -> dict[str, Any]:
    """Compute the nine-way table, mixed-modality search and the modality gap from embeddings.

    Args:
        seed: seed of the modality that is drawn for each item in mixed-modality search. Nothing else is random.

    Returns:
        A dict that can be written as JSON; all rates lie in 0..1:
        - `protocol`: "pairs"; `num_pairs`; `seed`;
        - `captions_per_pair`: the smallest number of captions, which decides the roles of captions; `caption_counts`:
          number of captions → pairs that have it; `candidates`: modality → number of candidates;
        - `nine_way`: direction → `{"local", "global", "headline", "note"}`; `local` and `global` are
          `{"hit@1", "hit@5", "hit@10"}`, or None if the direction is left empty;
        - `headline`: `{"local", "global", "mean"}`, the mean hit@10 over `headline_directions`;
        - `mixed`: see `mixed_search`; `{"ndcg@10": None, "seed", "note"}` with one caption per pair;
        - `gap`: `cosine` and `distance` between the means of the candidates ("i,t", "i,it", "t,it"); the share of each
          modality in the top 10 of the global pool, over all queries (`top10_share`) and by the query's modality
          (`top10_share_by_query`); compare these shares with `pool_share`, the modality's share of the pool.
    """
    nine_way, rankings = _nine_way(embeddings)
    counted = [name for name in HEADLINE if nine_way[name]["headline"]]
    headline = {
        pool: float(np.mean([nine_way[name][pool]["hit@10"] for name in counted])) for pool in ("local", "global")
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


def direction_note(query: str, target: str, captions_per_pair: int) -> tuple[bool, str | None]:
    """Whether a direction can be measured with this many captions, and a note on it; no note means that it counts."""
    roles = caption_roles(captions_per_pair)
    inputs = {"i": {"image"}, "t": {str(roles.text_query)}, "it": {"image", str(roles.fused_query)}}[query]
    answers = {"i": {"image"}, "t": {str(roles.first_text)}, "it": {"image", str(roles.fused_candidate)}}[target]
    if inputs == answers:
        needed = "view of the image" if query == "i" else "caption"
        return False, f"left empty: the target would be the query itself; needs a second {needed}"
    if inputs & answers:
        return True, f"query and target share the {'image' if 'image' in inputs & answers else 'caption'}"
    return True, None


def _nine_way(embeddings: PairEmbeddings) -> tuple[dict, dict[str, np.ndarray]]:
    """The table, and for each query modality the first ≤10 of the global pool, (N, ≤10)."""
    pool = np.concatenate([embeddings.candidates[name] for name in MODALITIES])
    sizes = [len(embeddings.candidates[name]) for name in MODALITIES]
    first = dict(zip(MODALITIES, np.cumsum([0, *sizes[:-1]]).tolist(), strict=True))
    right = {name: _by_owner(embeddings.owners[name], len(embeddings.ids)) for name in MODALITIES}
    tops = {name: _top(embeddings.queries[name], pool) for name in MODALITIES}
    table = {}
    for query in MODALITIES:
        for target in MODALITIES:
            measured, note = direction_note(query, target, embeddings.captions_per_pair)
            local_top = _top(embeddings.queries[query], embeddings.candidates[target]) if measured else None
            name = direction(query, target)
            table[name] = {
                "local": None if local_top is None else _hits(local_top, right[target], 0),
                "global": _hits(tops[query], right[target], first[target]) if measured else None,
                "headline": name in HEADLINE and note is None,
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
    """hit@k of rankings in a pool that holds the candidates of the target modality from index `first` on."""
    rankings = (top - first).tolist()
    return {f"hit@{k}": hit_rate_at_k(rankings, right, k) for k in KS}


def _mixed(embeddings: PairEmbeddings, seed: int) -> dict:
    if embeddings.captions_per_pair < 2:
        return {"ndcg@10": None, "seed": seed, "note": "left empty: the text query would be in the pool itself"}
    items = {}
    for name in MODALITIES:
        # the first candidate of each pair: an item appears once, even if the pair has several texts
        _, firsts = np.unique(embeddings.owners[name], return_index=True)
        items[name] = embeddings.candidates[name][firsts]
    return mixed_search(embeddings.queries["t"], items, seed=seed)


def _checked(pairs: Iterable[Mapping[str, Any]]) -> tuple[list[str], list[Any], list[list[str]]]:
    ids: list[str] = []
    images: list[Any] = []
    captions: list[list[str]] = []
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
