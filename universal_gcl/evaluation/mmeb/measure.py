"""MMEB's image sets (arXiv 2410.05160), by the rules of VLM2Vec's evaluation; `evaluation.mmeb.data` says what is
embedded.

A query is scored against its own candidates only. It is right if its first candidate has the highest inner product; if
several have it, the first of them wins. The mean over queries is precision@1, which version 2 calls hit@1 and the GCL
paper Recall@1. A query or a right candidate without an embedding is a miss.

The candidates of a query are ranked by `retrieval.search.exact_top_k`, as everywhere. They don't go through
`benchmark.evaluate_tasks`, which searches one pool for all queries of a task.

The run's folder gets `embeddings/queries/SET` and `embeddings/candidates/SET` (`retrieval.store`), and
`records/SET.jsonl` with one line per query; null stands for a missing value:
- `query`: the number of its row; `candidates`: how many candidates it has;
- `predicted`: the place of the best candidate among them;
- `rank`: the rank of the first candidate, from 1 on; equal scores share the best rank;
- `margin`: the score of the first candidate minus the best score of the others.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from universal_gcl.evaluation.benchmark import Embed
from universal_gcl.evaluation.mmeb.data import checked_files, read_set
from universal_gcl.evaluation.mmeb.sets import CATEGORIES, CATEGORY_OF, PAPER_DIRECTIONS
from universal_gcl.evaluation.scoring import write_records
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.search import exact_top_k
from universal_gcl.retrieval.store import Store


def evaluate_mmeb(
    root: str | Path,
    embed: Embed,
    out: str | Path,
    *,
    sets: Sequence[str] = tuple(PAPER_DIRECTIONS),
    version: int = 1,
    image_root: str | Path | None = None,
    instructions: bool = True,
    limit: int | None = None,
) -> dict | None:
    """
    Embed and score sets, one after the other. All processes of a launch must call this, because they share the
    embedding.

    Args:
        root, version, image_root, instructions, limit: as for `evaluation.mmeb.data.read_set`.
        embed: `(name, rows)` → the store of the rows; `Session.embed`.
        out: folder for the records.
        sets: names from `evaluation.mmeb.sets.chosen_sets`.

    Returns:
        On process 0, None on the others:
        - `version`, `instructions`, `limit`;
        - `sets`: name → `{"category", "precision@1", "queries", "candidates" (of all queries), "distinct_candidates",
          "query_kinds" and "candidate_kinds" ("i", "t", "it" → number of queries or distinct candidates; an image with
          an instruction is fused), "missing_queries", "missing_candidates" (without an embedding)}`;
        - `averages`: plain means of the sets' precision@1, in 0..1: of each category, of "all" chosen sets, and of the
          "paper"'s 12 if all of them were chosen;
        - `skipped`: store → `{id: why}` of rows without an embedding, for stores that have such rows.

    Raises:
        ValueError: see `read_set` and `retrieval.embed.embed_rows`. The message names the set. The files of all sets
            are checked before anything is embedded.
    """
    for name in sets:
        checked_files(Path(root), name, version)
    is_main = Processes().rank == 0
    results, skipped = {}, {}
    for name in sets:
        data = read_set(root, name, version=version, image_root=image_root, instructions=instructions, limit=limit)
        try:
            queries = embed(f"queries/{name}", data.query_rows())
            candidates = embed(f"candidates/{name}", data.candidate_rows())
        except ValueError as error:
            raise type(error)(f"MMEB's set {name}: {error}") from error
        if not is_main:
            continue
        records = score_queries(queries, candidates, data.own)
        write_records(Path(out) / "records" / f"{name}.jsonl", records)
        results[name] = {
            "category": CATEGORY_OF[name],
            "precision@1": sum(record["predicted"] == 0 for record in records) / len(records),
            "queries": len(queries),
            "candidates": sum(map(len, data.own)),
            "distinct_candidates": len(candidates),
            "query_kinds": dict(Counter(item.kind for item in data.queries)),
            "candidate_kinds": dict(Counter(item.kind for item in data.candidates)),
            "missing_queries": int((queries.rows < 0).sum()),
            "missing_candidates": int((candidates.rows < 0).sum()),
        }
        for store_name, store in ((f"queries/{name}", queries), (f"candidates/{name}", candidates)):
            if store.skipped:
                skipped[store_name] = store.skipped
    if not is_main:
        return None
    return {
        "version": version,
        "instructions": instructions,
        "limit": limit,
        "sets": results,
        "averages": _averages({name: result["precision@1"] for name, result in results.items()}),
        "skipped": skipped,
    }


def score_queries(queries: Store, candidates: Store, own: Sequence[np.ndarray]) -> list[dict]:
    """
    Rank each query's own candidates.

    Args:
        queries: store of Q rows.
        candidates: store of M rows.
        own: for each query the (n,) places of its candidates, the right one first.

    Returns:
        one record for each query, as the docstring of this module describes it.
    """
    vectors = candidates.vectors[:]
    records = []
    for number, (row, places) in enumerate(zip(queries.rows.tolist(), own)):
        record: dict = {"query": number, "predicted": None, "rank": None, "margin": None, "candidates": len(places)}
        records.append(record)
        found = candidates.rows[places]
        present = np.flatnonzero(found >= 0)
        if row < 0 or not len(present):
            continue
        query, embeds = queries.vectors[[row]], vectors[found[present]]
        scores, order = (result[0].numpy() for result in exact_top_k(query, embeds, len(present)))
        record["predicted"] = int(present[order[0]])  # the first of equal ones
        if present[0] != 0:
            continue
        right = int(np.flatnonzero(order == 0)[0])  # the position of the first candidate in the ranking
        record["rank"] = 1 + int((scores > scores[right]).sum())
        others = order[order != 0]
        if len(others):
            # in float64 the products and sums of float16 numbers are exact
            gain = embeds[0].astype(np.float64) - embeds[others[0]].astype(np.float64)
            record["margin"] = float(gain @ query[0].astype(np.float64))
    return records


def _averages(precision: dict[str, float]) -> dict[str, float]:
    groups = {**CATEGORIES, "all": tuple(precision)}
    if set(PAPER_DIRECTIONS) <= set(precision):
        groups["paper"] = tuple(PAPER_DIRECTIONS)
    asked = {group: [precision[name] for name in names if name in precision] for group, names in groups.items()}
    return {group: float(np.mean(values)) for group, values in asked.items() if values}
