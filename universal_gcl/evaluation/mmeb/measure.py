"""MMEB's image sets (arXiv 2410.05160), by the rules of VLM2Vec's evaluation: see `evaluation.mmeb.data` for what is
embedded.

A query is scored against its own candidates only; it is right if the first has the highest inner product, where the
first of equal ones wins. The mean is precision@1, which version 2 calls hit@1 and the GCL paper Recall@1. A query or a
right candidate without an embedding is a miss.

What is written under the run's folder: `embeddings/queries/SET` and `embeddings/candidates/SET` (`retrieval.store`),
and `records/SET.jsonl`, one line a query: `query`: the number of its row; `predicted`: the place of the best candidate;
`rank` of the first candidate, from 1 on; `margin`: its score less the best other's; `candidates`: how many there were.
null stands for what there is not.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from universal_gcl.evaluation.mmeb.data import checked_files, read_set
from universal_gcl.evaluation.mmeb.sets import CATEGORIES, CATEGORY_OF, PAPER_DIRECTIONS
from universal_gcl.evaluation.scoring import write_records
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.store import Store


def evaluate_mmeb(
    root: str | Path,
    embed: Callable[[str, Sequence], Store],
    out: str | Path,
    *,
    sets: Sequence[str] = tuple(PAPER_DIRECTIONS),
    version: int = 1,
    image_root: str | Path | None = None,
    instructions: bool = True,
    limit: int | None = None,
) -> dict | None:
    """
    Embed and score sets, one after the other. Called by all processes of a launch: they share the embedding.

    Args:
        root, version, image_root, instructions, limit: as for `evaluation.mmeb.data.read_set`.
        embed: `(name, rows)` → the store of the rows; `Session.embed`.
        out: folder for the records.
        sets: names, as `evaluation.mmeb.sets.chosen_sets` gives them.

    Returns:
        On process 0, None on the others:
        - `version`, `instructions`, `limit`;
        - `sets`: name → `{"category", "precision@1", "queries", "candidates" (of all queries), "distinct_candidates",
          "query_kinds" and "candidate_kinds" ("i", "t", "it" → how many queries, how many distinct candidates: an image
          with an instruction is fused), "missing_queries", "missing_candidates" (without an embedding)}`;
        - `averages`: plain means of the sets' precision@1, in 0..1: of each category, of "all" that were asked for, and
          of the "paper"'s 12 if all of them were;
        - `skipped`: store → `{id: why}` of rows without embedding, where there are any.

    Raises:
        ValueError: as `read_set` and `retrieval.embed.embed_rows`; the set is named. What files are missing or
            cut off is said before anything is embedded.
    """
    for name in sets:
        checked_files(Path(root), name, version)
    options = {"version": version, "image_root": image_root, "instructions": instructions, "limit": limit}
    is_main = Processes().rank == 0
    results, skipped = {}, {}
    for name in sets:
        data = read_set(root, name, **options)
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
    Args:
        queries: store of Q rows.
        candidates: store of M rows.
        own: for each query the (n,) places of its candidates, the first being the right one.

    Returns:
        one record for each query, as the module's docstring says.

    In float64 the sums of float16 products of unit vectors are exact: scores are equal where embeddings are, and in any
    order of the dimensions.
    """
    vectors = candidates.vectors[:]
    records = []
    for number, (row, places) in enumerate(zip(queries.rows.tolist(), own)):
        record = {"query": number, "predicted": None, "rank": None, "margin": None, "candidates": len(places)}
        records.append(record)
        found = candidates.rows[places]
        if row < 0 or (found < 0).all():
            continue
        query = queries.vectors[[row]][0].astype(np.float64)
        scores = np.where(found < 0, -np.inf, vectors[found].astype(np.float64) @ query)
        record["predicted"] = int(scores.argmax())  # the first of equal ones
        if found[0] < 0:
            continue
        record["rank"] = 1 + int((scores > scores[0]).sum())
        others = scores[1:][found[1:] >= 0]
        record["margin"] = float(scores[0] - others.max()) if len(others) else None
    return records


def _averages(precision: dict[str, float]) -> dict[str, float]:
    groups = {**CATEGORIES, "all": tuple(precision)}
    if set(PAPER_DIRECTIONS) <= set(precision):
        groups["paper"] = tuple(PAPER_DIRECTIONS)
    asked = {group: [precision[name] for name in names if name in precision] for group, names in groups.items()}
    return {group: float(np.mean(values)) for group, values in asked.items() if values}
