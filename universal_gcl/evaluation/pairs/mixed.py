"""Mixed-modality search: text queries search a pool in which each item appears once, in one modality.

This is the setting of MixBench (GR-CLIP, arXiv 2507.19054): images, texts and image+text in shares of about 1:1:1,
measured by nDCG@10. Here the modality of each item is drawn at random, so another seed gives another pool.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from universal_gcl.evaluation.metrics import ndcg_at_k
from universal_gcl.retrieval.search import exact_top_k

TOP = 10


def draw_modalities(num_items: int, num_modalities: int, seed: int) -> np.ndarray:
    """Draw a modality number for each item, in shares that differ by at most one item. Returns (num_items,) int64."""
    drawn = np.empty(num_items, dtype=np.int64)
    drawn[np.random.default_rng(seed).permutation(num_items)] = np.arange(num_items) % num_modalities
    return drawn


def mixed_search(queries: np.ndarray, items: Mapping[str, np.ndarray], *, seed: int) -> dict:
    """nDCG@10 of queries in a pool that holds each item once, in a random modality.

    Args:
        queries: (N, D). Item j is the only relevant item of query j.
        items: modality → (N, D). Row j is item j in that modality.
        seed: seed of the draw.

    Returns:
        - `ndcg@10`: the mean over queries;
        - `ndcg@10_by_target`: modality → the mean over the queries whose item has that modality, None without any;
        - `items`: modality → number of items;
        - `seed`.
    """
    drawn = draw_modalities(len(queries), len(items), seed)
    pool = np.empty_like(queries)
    for number, matrix in enumerate(items.values()):
        pool[drawn == number] = matrix[drawn == number]
    rankings = exact_top_k(queries, pool, min(TOP, len(pool)))[1].tolist()

    def ndcg(chosen: Sequence[int]) -> float | None:
        return ndcg_at_k([rankings[j] for j in chosen], [[j] for j in chosen], TOP) if len(chosen) else None

    members = {name: np.flatnonzero(drawn == number).tolist() for number, name in enumerate(items)}
    return {
        f"ndcg@{TOP}": ndcg(range(len(queries))),
        f"ndcg@{TOP}_by_target": {name: ndcg(chosen) for name, chosen in members.items()},
        "items": {name: len(chosen) for name, chosen in members.items()},
        "seed": seed,
    }
