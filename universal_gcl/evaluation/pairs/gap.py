"""The modality gap: how far apart the modalities lie, and which of them fills the first places of a mixed pool.

Liang et al., "Mind the Gap" (arXiv 2203.02053), define the gap as the distance between the mean embeddings. The GCL
paper (arXiv 2509.25638) reports the cosine of the means.
"""

from collections.abc import Mapping
from itertools import combinations

import numpy as np


def modality_gap(embeddings: Mapping[str, np.ndarray]) -> dict[str, dict[str, float | None]]:
    """Cosine and Euclidean distance between the mean embeddings of the modalities.

    Args:
        embeddings: modality → (N, D) unit-norm embeddings; N may differ between modalities.

    Returns:
        `{"cosine": {"i,t": …}, "distance": {"i,t": …}}`, one entry for each pair of modalities in the given order.
        Distances lie in 0..2. The cosine is None if one of the means is exactly zero.
    """
    means = {name: np.asarray(matrix, dtype=np.float64).mean(axis=0) for name, matrix in embeddings.items()}
    gap: dict[str, dict[str, float | None]] = {"cosine": {}, "distance": {}}
    for a, b in combinations(means, 2):
        norms = np.linalg.norm(means[a]) * np.linalg.norm(means[b])
        gap["cosine"][f"{a},{b}"] = float(means[a] @ means[b] / norms) if norms > 0 else None
        gap["distance"][f"{a},{b}"] = float(np.linalg.norm(means[a] - means[b]))
    return gap


def top_share(rankings: np.ndarray, sizes: Mapping[str, int]) -> dict[str, float]:
    """The share of each modality in the retrieved items.

    Args:
        rankings: (Q, k) indices into a pool that holds the modalities one after the other.
        sizes: modality → its number of candidates, in the order of the pool.

    Returns:
        modality → share in 0..1; the shares sum to 1.
    """
    ends = np.cumsum(list(sizes.values()))
    counts = np.bincount(np.searchsorted(ends, np.ravel(rankings), side="right"), minlength=len(ends))
    return {name: float(count / np.size(rankings)) for name, count in zip(sizes, counts, strict=True)}
