"""Search over stores, and its result as a file that can be scored again without the model."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.numpy import save

from universal_gcl.retrieval.quantised import quantised
from universal_gcl.retrieval.screening import screened_top_k, worth_screening
from universal_gcl.retrieval.store import Store, write_whole

FORMAT = 1


@dataclass
class Run:
    """
    The k best candidates of each query.

    Attributes:
        query_ids: Q ids.
        candidate_ids: ids of the candidates that were found, each once.
        candidates: (Q, k) int64, places in `candidate_ids`, best first.
        scores: (Q, k) float32 inner products; equal ones come in the order of ids, as strings.
        manifest: what was searched: `k`; of `queries` and each of `pools` the model's fingerprint, options and the
            hashes and counts of its rows; `missing_queries`, the number of queries without an embedding.
    """

    query_ids: list[str]
    candidate_ids: list[str]
    candidates: np.ndarray
    scores: np.ndarray
    manifest: dict

    def ranking(self, query: int) -> list[str]:
        """Ids of a query's candidates, best first; the query by its number."""
        return [self.candidate_ids[place] for place in self.candidates[query].tolist()]

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, whole or not at all."""
        tensors = {"candidates": self.candidates.astype(np.int64), "scores": self.scores.astype(np.float32)}
        # the header of safetensors is bounded, millions of ids are not
        tensors |= {name: _as_bytes(getattr(self, name)) for name in ("query_ids", "candidate_ids")}
        metadata = {"format": str(FORMAT), "manifest": json.dumps(self.manifest)}
        write_whole(Path(path), lambda file: file.write(save(tensors, metadata=metadata)))

    @classmethod
    def load(cls, path: str | Path) -> "Run":
        """Read what `save` wrote.

        Raises:
            ValueError: the file is something else, or of another version.
        """
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != str(FORMAT) or "manifest" not in metadata:
                raise ValueError(f"{path} is no result of a search, or of another version of this library")
            names = {name: json.loads(file.get_tensor(name).tobytes()) for name in ("query_ids", "candidate_ids")}
            arrays = {name: file.get_tensor(name) for name in ("candidates", "scores")}
        return cls(**names, **arrays, manifest=json.loads(metadata["manifest"]))

    def save_trec(self, path: str | Path, tag: str = "gcl") -> None:
        """Write the text format of trec_eval: `query Q0 candidate rank score tag`.

        Raises:
            ValueError: an id holds white space, which the format can't express.
        """
        for name in (*self.query_ids, *self.candidate_ids):
            if len(name.split()) != 1:
                raise ValueError(f"the id {name!r} holds white space, which trec_eval can't read")

        def write(file):
            for query, name in enumerate(self.query_ids):
                for rank, (candidate, score) in enumerate(zip(self.ranking(query), self.scores[query]), start=1):
                    file.write(f"{name} Q0 {candidate} {rank} {score:.9g} {tag}\n".encode())

        write_whole(Path(path), write)


def search(queries: Store, pools: Store | Sequence[Store], k: int, *, device: str = "cpu") -> Run:
    """
    The `k` best candidates of each query, exactly, by the scores of `exact_top_k`; equal ones by id, in the order of
    strings, so that the result depends neither on the order of rows nor on that of pools.

    Args:
        queries: those of its rows that have an embedding are searched for.
        pools: one store, or several that are searched as one; their vectors are streamed. Rows without an embedding
            can't be found. A large pool's int8 form is kept beside its vectors: see `retrieval.quantised`.
        k: how many candidates for each query; all, if there are fewer.
        device: where to compute.

    Raises:
        ValueError: stores of different models or options (both are named), an id in several pools, k below 1.
    """
    pools = [pools] if isinstance(pools, Store) else list(pools)
    if not pools:
        raise ValueError("there is no pool to search")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    for pool in pools:
        queries.check_model(pool)
    _refuse_shared_ids(pools)
    vectors = torch.from_numpy(queries.vectors[:].astype(np.float32)).to(device)
    scores, rows, start = [], [], 0
    for pool in pools:
        found = _search_one(vectors, pool, k)
        scores.append(found[0])
        rows.append(np.where(found[1] < 0, -1, found[1] + start))
        start += len(pool)
    scores, rows = np.concatenate(scores, axis=1), np.concatenate(rows, axis=1)
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
            "queries": _about(queries),
            "pools": [_about(pool) for pool in pools],
            "missing_queries": len(queries) - len(present),
        },
    )


def _search_one(queries, pool, k):
    """(Q, m) float32 scores and rows of the pool: the best k of each query, and -inf and -1 where there are no more."""
    num_best = min(k, len(pool.vectors))
    codes = quantised(pool) if worth_screening(len(pool.vectors), num_best) else None
    found = screened_top_k(queries, pool.vectors, num_best, quantised=codes)
    scores, vectors = (part.cpu().numpy() for part in found)
    by_vector = np.lexsort((pool.id_ranks, pool.rows))  # the rows of each vector lie together, by id
    starts = np.searchsorted(pool.rows[by_vector], np.arange(len(pool.vectors) + 1))
    counts = np.minimum(np.diff(starts), k)[vectors]  # (Q, k') of rows that share the vector
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


def _best(scores, rows, ranks, k):
    """The first k columns of both after sorting each line by falling score, equal ones by rank."""
    order = np.lexsort((ranks, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, axis=1), np.take_along_axis(rows, order, axis=1)


def _id_ranks(pools, rows):
    """The place of each row's id among those of all `rows`, which are numbered through all pools, -1 for none."""
    used, place = np.unique(rows, return_inverse=True)
    ids = [""] * int(used[0] < 0) + _ids_at(pools, used[used >= 0])
    ranks = np.empty(len(used), dtype=np.int64)
    ranks[sorted(range(len(used)), key=ids.__getitem__)] = np.arange(len(used))
    return ranks[place].reshape(rows.shape)


def _refuse_shared_ids(pools):
    seen: set[str] = set()
    for pool in pools if len(pools) > 1 else ():
        shared = seen.intersection(pool.ids)
        if shared:
            raise ValueError(f"{len(shared)} ids are in several pools, e.g. {min(shared)!r}; each must be in one only")
        seen.update(pool.ids)


def _ids_at(pools, numbers):
    """Ids of rows that are numbered through all pools; numbers ascend."""
    ids, start = [], 0
    for pool in pools:
        here = numbers[(numbers >= start) & (numbers < start + len(pool))] - start
        ids += [pool.ids[number] for number in here.tolist()]
        start += len(pool)
    return ids


def _about(store):
    kept = ("model", "options", "dim", "rows", "vectors", "skipped", "ids", "contents")
    return {name: store.manifest[name] for name in kept}


def _as_bytes(value):
    return np.frombuffer(json.dumps(value).encode(), dtype=np.uint8)
