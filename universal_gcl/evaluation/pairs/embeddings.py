"""The embeddings of a set of pairs. Scores and pictures need nothing else, not even the model."""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from modeling_gcl.modalities import MODALITIES


@dataclass(frozen=True)
class CaptionRoles:
    """Which caption, counted from 0, has which role; see the table in `universal_gcl.evaluation.pairs.measure`."""

    text_query: int
    fused_query: int
    first_text: int
    fused_candidate: int


def caption_roles(captions_per_pair: int) -> CaptionRoles:
    """The roles if every pair has at least this many captions."""
    return CaptionRoles(
        text_query=0,
        fused_query=1 if captions_per_pair > 2 else 0,
        first_text=min(captions_per_pair - 1, 2),
        fused_candidate=min(captions_per_pair - 1, 3),
    )


@dataclass
class PairEmbeddings:
    """Queries and candidates of N pairs, by modality `"i"`, `"t"`, `"it"`; float32, unit norm.

    Attributes:
        ids: the ids of the N pairs, each once.
        caption_counts: number of captions → how many pairs have that number.
        queries: modality → (N, D); row j is the query of pair j.
        candidates: modality → (C, D), in the order of the pairs. C = N for images and fused, C >= N for texts.
        owners: modality → (C,) int64, the number of the pair that each candidate belongs to.

    Raises:
        ValueError: an id occurs twice, shapes don't fit, a pair has no candidate, or an embedding holds NaN or infinite
            numbers. The message names the pair.
    """

    ids: list[str]
    caption_counts: dict[int, int]
    queries: dict[str, np.ndarray]
    candidates: dict[str, np.ndarray]
    owners: dict[str, np.ndarray]

    def __post_init__(self) -> None:
        check_ids(self.ids)
        width = self.queries["i"].shape[-1]
        for name in MODALITIES:
            queries, candidates, owners = self.queries[name], self.candidates[name], self.owners[name]
            if queries.shape != (len(self.ids), width) or candidates.shape != (len(owners), width):
                raise ValueError(
                    f"{name}: {len(self.ids)} pairs, {len(owners)} owners and {width} dimensions don't fit queries of "
                    f"shape {queries.shape} and candidates of shape {candidates.shape}"
                )
            if not np.array_equal(np.unique(owners), np.arange(len(self.ids))) or (np.diff(owners) < 0).any():
                raise ValueError(f"{name}: owners must name each of the {len(self.ids)} pairs, in ascending order")
            for role, matrix, pairs in (("query", queries, range(len(queries))), ("candidate", candidates, owners)):
                broken = np.flatnonzero(~np.isfinite(matrix).all(axis=1))
                if len(broken):
                    raise ValueError(
                        f"the {name} {role} embedding of pair {self.ids[pairs[broken[0]]]!r} holds NaN or infinite "
                        f"numbers ({len(broken)} of {len(matrix)} do): the model has diverged or its weights are broken"
                    )

    @property
    def captions_per_pair(self) -> int:
        """The smallest number of captions that a pair has. It decides the roles of captions for all pairs."""
        return min(self.caption_counts)

    def caption_of(self, modality: str, candidate: int) -> int | None:
        """The number of the caption that a candidate holds, within its pair; None for an image."""
        if modality == "i":
            return None
        roles = caption_roles(self.captions_per_pair)
        if modality == "it":
            return roles.fused_candidate
        return roles.first_text + candidate - int(np.searchsorted(self.owners["t"], self.owners["t"][candidate]))

    def save(self, path: str | Path) -> None:
        """Write everything to one safetensors file."""
        tensors = {
            f"{part}.{name}": np.ascontiguousarray(matrix)
            for part in ("queries", "candidates", "owners")
            for name, matrix in getattr(self, part).items()
        }
        counts = {str(count): pairs for count, pairs in self.caption_counts.items()}
        save_file(tensors, path, metadata={"ids": json.dumps(self.ids), "caption_counts": json.dumps(counts)})

    @classmethod
    def load(cls, path: str | Path) -> "PairEmbeddings":
        """Read what `save` wrote."""
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            parts = {
                part: {name: file.get_tensor(f"{part}.{name}") for name in MODALITIES}
                for part in ("queries", "candidates", "owners")
            }
        counts = {int(count): pairs for count, pairs in json.loads(metadata["caption_counts"]).items()}
        return cls(ids=json.loads(metadata["ids"]), caption_counts=counts, **parts)


def check_ids(ids: list[str]) -> None:
    """Raise a ValueError that names the ids that occur more than once."""
    twice = sorted(name for name, count in Counter(ids).items() if count > 1)
    if twice:
        named = ", ".join(map(repr, twice[:5])) + (", …" if len(twice) > 5 else "")
        raise ValueError(f"{len(twice)} ids occur more than once: {named}; give each pair its own id")
