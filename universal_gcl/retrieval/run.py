"""Search over stores. The result is a `Run`, a file from which metrics can be computed without the model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save

from universal_gcl.retrieval.quantised import saved_codes
from universal_gcl.retrieval.screening import screened_top_k, worth_screening
from universal_gcl.retrieval.store import Store, write_whole

FORMAT = 1


@dataclass
class Run:
    """
    The k best candidates of each of Q queries.

    Attributes:
        query_ids: the ids of the queries.
        candidate_ids: the ids of all candidates that were found, without repetitions.
        candidates: (Q, k) int64, indices into `candidate_ids`, the best candidate first.
        scores: (Q, k) float32, the inner products. Candidates with equal scores are sorted by id, as strings.
        manifest: what was searched. It has `k`; for `queries` and each of `pools` the fingerprint of the model, the
            options, and hashes and counts of the rows; and `missing_queries`, the number of queries without an
            embedding.
    """

    query_ids: list[str]
    candidate_ids: list[str]
    candidates: np.ndarray
    scores: np.ndarray
    manifest: dict

    def ranking(self, query: int) -> list[str]:
        """The ids of the candidates of the query with this number, the best first."""
        return [self.candidate_ids[place] for place in self.candidates[query].tolist()]

    def save(self, path: str | Path) -> None:
        """Write the run to one safetensors file."""
        tensors: dict[str, np.ndarray] = {
            "candidates": self.candidates.astype(np.int64),
            "scores": self.scores.astype(np.float32),
        }
        # the size of the header is limited, so the ids are tensors
        tensors |= {"query_ids": _as_bytes(self.query_ids), "candidate_ids": _as_bytes(self.candidate_ids)}
        metadata = {"format": str(FORMAT), "manifest": json.dumps(self.manifest)}
        write_whole(Path(path), lambda file: file.write(save(tensors, metadata=metadata)))

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """Read a run that `save` wrote.

        Raises:
            ValueError: the file is not a run, or was written by another version.
        """
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT) or "manifest" not in metadata:
                raise ValueError(
                    f"{path} is not the result of a search, or was written by another version of this library"
                )
            names = {name: json.loads(file.get_tensor(name).tobytes()) for name in ("query_ids", "candidate_ids")}
            arrays = {name: file.get_tensor(name) for name in ("candidates", "scores")}
        return cls(**names, **arrays, manifest=json.loads(metadata["manifest"]))

    def save_trec(self, path: str | Path, tag: str = "gcl") -> None:
        """Write the run in the text format of trec_eval: `query Q0 candidate rank score tag`.

        Raises:
            ValueError: an id has white space in it, which the format does not allow.
        """
        for name in (*self.query_ids, *self.candidate_ids):
            if len(name.split()) != 1:
                raise ValueError(f"the id {name!r} holds white space, which trec_eval can't read: change the id")

        def write(file: BinaryIO) -> None:
            for query, name in enumerate(self.query_ids):
                for rank, (candidate, score) in enumerate(zip(self.ranking(query), self.scores[query]), start=1):
                    file.write(f"{name} Q0 {candidate} {rank} {score:.9g} {tag}\n".encode())

        write_whole(Path(path), write)


def search(queries: Store, pools: Store | Sequence[Store], k: int, *, device: str = "cpu") -> Run:
    """
    Find the `k` best candidates of each query, exactly, by the scores of `exact_top_k`.

    Candidates with equal scores are sorted by id, as strings. So the result depends neither on the order of the rows
    nor on that of the pools.

    Args:
        queries: the store of the queries. Rows without an embedding are left out.
        pools: one store, or several that are searched as one. Their vectors are read in parts. Rows without an
            embedding can't be found. The int8 form of a large pool is kept in its folder (see `retrieval.quantised`).
        k: number of candidates for each query. If the pools have fewer, all are returned.
        device: the device to compute on.

    Raises:
        ValueError: the stores have different models or options (the message names both), an id is in several pools, or
            k is below 1.
    """
    pools = [pools] if isinstance(pools, Store) else list(pools)
    if not pools:
        raise ValueError("there is no pool to search")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for pool in pools:
        queries.check_model(pool)
    _check_ids_differ(pools)
    vectors = torch.from_numpy(queries.vectors[:].astype(np.float32)).to(device)
    found, start = [], 0
    for pool in pools:
        scores, rows = _search_one(vectors, pool, k)
        found.append((scores, np.where(rows < 0, -1, rows + start)))
        start += len(pool)
    scores, rows = (np.concatenate(parts, axis=1) for parts in zip(*found))
    if len(pools) > 1:
        scores, rows = _best(scores, rows, _id_ranks(pools, rows), k)
    width = min(k, sum(int((pool.rows >= 0).sum()) for pool in pools))

    present = np.flatnonzero(queries.rows >= 0)
    vector_of = queries.rows[present]
    used, candidates = np.unique(rows[vector_of, :width], return_inverse=True)
    ids = _ids_at(pools, used)
    return Run(
        query_ids=[queries.ids[number] for number in present],
        candidate_ids=ids,
        candidates=candidates.reshape(len(present), width),
        scores=scores[vector_of, :width],
        manifest={
            "k": width,
            "queries": _described(queries),
            "pools": [_described(pool) for pool in pools],
            "missing_queries": len(queries) - len(present),
        },
    )


def _search_one(queries: torch.Tensor, pool: Store, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Scores (Q, m) float32 and rows (Q, m) of the pool: the best k of each query, padded with -inf and -1."""
    num_best = min(k, len(pool.vectors))
    codes = saved_codes(pool) if worth_screening(len(pool.vectors), num_best) else None
    found = screened_top_k(queries, pool.vectors, num_best, codes=codes)
    scores, vectors = (part.cpu().numpy() for part in found)
    by_vector = np.lexsort((pool.id_ranks, pool.rows))  # the rows of one vector are neighbours, sorted by id
    starts = np.searchsorted(pool.rows[by_vector], np.arange(len(pool.vectors) + 1))
    counts = np.minimum(np.diff(starts), k)[vectors]  # (Q, k'): how many rows share the vector
    query = np.repeat(np.arange(len(vectors)), counts.sum(axis=1))
    flat = counts.ravel()
    within = np.arange(flat.sum()) - np.repeat(np.cumsum(flat) - flat, flat)
    rows = by_vector[np.repeat(starts[vectors.ravel()], flat) + within]
    place = np.arange(len(query)) - np.repeat(np.cumsum(counts.sum(axis=1)) - counts.sum(axis=1), counts.sum(axis=1))
    table = np.full((len(vectors), int(counts.sum(axis=1).max())), -1)
    table[query, place] = rows
    values = np.full(table.shape, -np.inf, dtype=np.float32)
    values[query, place] = np.repeat(scores.ravel(), flat)
    return _best(values, table, pool.id_ranks[table], k)


def _best(scores: np.ndarray, rows: np.ndarray, ranks: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Sort each line by score, the highest first, and equal scores by rank; return the first k columns of both."""
    order = np.lexsort((ranks, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _id_ranks(pools: Sequence[Store], rows: np.ndarray) -> np.ndarray:
    """The rank of each row's id among the ids of all `rows`. Rows are numbered through all pools; -1 is no row."""
    used, place = np.unique(rows, return_inverse=True)
    ids = [""] * int(used[0] < 0) + _ids_at(pools, used[used >= 0])
    ranks = np.empty(len(used), dtype=np.int64)
    ranks[sorted(range(len(used)), key=ids.__getitem__)] = np.arange(len(used))
    return ranks[place].reshape(rows.shape)


def _check_ids_differ(pools: Sequence[Store]) -> None:
    seen: set[str] = set()
    for pool in pools if len(pools) > 1 else ():
        shared = seen.intersection(pool.ids)
        if shared:
            raise ValueError(
                f"{len(shared)} ids are in several pools, e.g. {min(shared)!r}; each id may be in one pool only"
            )
        seen.update(pool.ids)


def _ids_at(pools: Sequence[Store], numbers: np.ndarray) -> list[str]:
    """The ids of rows that are numbered through all pools. `numbers` must be ascending."""
    ids, start = [], 0
    for pool in pools:
        here = numbers[(numbers >= start) & (numbers < start + len(pool))] - start
        ids += [pool.ids[number] for number in here.tolist()]
        start += len(pool)
    return ids


def _described(store: Store) -> dict:
    """The part of a store's manifest that goes into the manifest of a run."""
    kept = ("model", "options", "dim", "rows", "vectors", "skipped", "ids", "contents")
    return {name: store.manifest[name] for name in kept}


def _as_bytes(value: object) -> np.ndarray:
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
