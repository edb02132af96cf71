"""Score a run against its positives. This needs no model, only `Run.load` and a file of positives."""

import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from universal_gcl.evaluation.metrics import hit_rate_at_k, mrr_at_k, ndcg_at_k, recall_at_k
from universal_gcl.retrieval.run import Run
from universal_gcl.retrieval.store import write_whole

AT_K = {"hit": hit_rate_at_k, "recall": recall_at_k, "ndcg": ndcg_at_k}


def score_run(
    run: Run, positives: Mapping[str, Collection[str]], ks: Sequence[int] = (1, 5, 10, 50)
) -> tuple[dict[str, float], list[dict]]:
    """
    Score the rankings of a run.

    Args:
        run: its depth, the number of candidates for each query, must reach the largest k, unless each ranking holds the
            whole pool.
        positives: query id → ids of its relevant candidates, at least one, for all queries that count. A query that is
            missing from the run, because it could not be embedded, is a miss.
        ks: cut-offs.

    Returns:
        - metric → mean over the queries, in 0..1: `hit@k`, `recall@k` and `ndcg@k` for each k, and `mrr@d` at depth d;
        - one record for each query, in the order of `positives`: `{"query", "positives", "ranks"}` with the number of
          positives and the ranks of those that were found, from 1 on, ascending. All metrics follow from these.

    Raises:
        ValueError: a query of the run is not in `positives` or has none there, or k exceeds the depth of the run.
    """
    depth, pool = run.candidates.shape[1], sum(part["rows"] - part["skipped"] for part in run.manifest["pools"])
    if max(ks) > depth and depth < pool:
        raise ValueError(
            f"the run holds {depth} candidates for each query: hit@{max(ks)} needs more; search with a larger depth"
        )
    numbers = {name: number for number, name in enumerate(run.query_ids)}
    unknown = [name for name in run.query_ids if name not in positives]
    if unknown:
        raise ValueError(f"{len(unknown)} queries of the run have no positives, e.g. {unknown[0]!r}")
    rankings = [run.ranking(numbers[name]) if name in numbers else [] for name in positives]
    references = list(positives.values())
    metrics = {f"{name}@{k}": at_k(rankings, references, k) for name, at_k in AT_K.items() for k in ks}
    metrics[f"mrr@{depth}"] = mrr_at_k(rankings, references, depth)
    records = []
    for name, ranking, relevant in zip(positives, rankings, references, strict=True):
        wanted = set(relevant)
        ranks = [rank for rank, candidate in enumerate(ranking, start=1) if candidate in wanted]
        records.append({"query": name, "positives": len(wanted), "ranks": ranks})
    return metrics, records


def write_records(path: str | Path, records: Sequence[dict]) -> None:
    """Write one JSON object per line. An interrupted write leaves no partial file."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_whole(Path(path), lambda file: file.write(text.encode()))
