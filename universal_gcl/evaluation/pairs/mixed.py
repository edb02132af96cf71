"""Mixed-modality search: text queries over a pool in which each item appears once, in one modality.

The setting of MixBench (GR-CLIP, arXiv 2507.19054): image, text and image+text in shares of about 1:1:1, nDCG@10.
Here the modality of each item is drawn with a seed, so numbers with different seeds are different draws of the pool.
"""

from collections.abc import Mapping

import numpy as np

from universal_gcl.evaluation.metrics import ndcg_at_k
from universal_gcl.retrieval.search import exact_top_k

TOP = 10


def draw_modalities(num_items: int, num_modalities: int, seed: int) -> np.ndarray:
    """(num_items,) int64: one modality number for each item, random, in shares that differ by one item at most."""
    drawn = np.empty(num_items, dtype=np.int64)
    drawn[np.random.default_rng(seed).permutation(num_items)] = np.arange(num_items) % num_modalities
    return drawn


def mixed_search(queries: np.ndarray, items: Mapping[str, np.ndarray], *, seed: int) -> dict:
    """nDCG@10 of queries over a pool with each item once, in a random modality.

    Args:
        queries: (N, D); item j is the only relevant one of query j.
        items: modality → (N, D), row j being item j in that modality.
        seed: of the draw.

    Returns:
        `{"ndcg@10": mean over queries, "ndcg@10_by_target": modality → mean over the queries whose item came in that
        modality (None where there is none), "items": modality → how many, "seed"}`.
    """
    drawn = draw_modalities(len(queries), len(items), seed)
    pool = np.empty_like(queries)
    for number, matrix in enumerate(items.values()):
        pool[drawn == number] = matrix[drawn == number]
    rankings = exact_top_k(queries, pool, min(TOP, len(pool)))[1].tolist()

    def ndcg(of: np.ndarray) -> float | None:
        return ndcg_at_k([rankings[j] for j in of], [[j] for j in of], TOP) if len(of) else None

    members = {name: np.flatnonzero(drawn == number).tolist() for number, name in enumerate(items)}
    return {
        f"ndcg@{TOP}": ndcg(range(len(queries))),
        f"ndcg@{TOP}_by_target": {name: ndcg(of) for name, of in members.items()},
        "items": {name: len(of) for name, of in members.items()},
        "seed": seed,
    }
