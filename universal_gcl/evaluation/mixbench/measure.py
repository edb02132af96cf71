"""MixBench (GR-CLIP, arXiv 2507.19054): a corpus in which each item appears once, as image, text or both.

All documents of a subset are one pool. The headline is nDCG@10, the mean over queries. Every query has one relevant
document, for which the authors' nDCG (its ideal taken from the ten retrieved) is the standard one: 1 / log2(1 + rank).
The corpus is the published `mixed_corpus`. The authors' script can also assign modalities to the unmixed `corpus` anew
(`random.seed(42)`); the result is another pool, which is not measured here.

Fused documents follow the model's fusion rule. GR-CLIP's own baseline is the variant `normalized_sum`, and GR-CLIP
itself `normalized_sum+centring`. GR-CLIP subtracts the mean of query texts from queries and the mean of document texts
from documents; `centring` has one mean for all texts, that of the calibration captions.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from modeling_gcl.modalities import IN_DATA
from universal_gcl.evaluation.benchmark import Embed, RetrievalTask, evaluate_tasks
from universal_gcl.evaluation.mixbench.data import Subset
from universal_gcl.evaluation.mixbench.subsets import COLUMNS


def evaluate_mixbench(
    subsets: Sequence[Subset],
    embed: Embed,
    out: str | Path,
    *,
    limit: int | None = None,
    device: str = "cpu",
) -> dict | None:
    """
    Embed, search and score. All processes of a launch must call this, because they share the embedding.

    Args:
        subsets: subsets from `evaluation.mixbench.data.read_subset`.
        embed: `(name, rows)` → the store of the rows; `Session.embed`.
        out: folder for runs and records; see `evaluation.benchmark`.
        limit: only this many first queries of each subset; the corpus stays whole.
        device: where to search.

    Returns:
        On process 0, None on the others; rates in 0..1:
        - `subsets`: name → metrics over all queries (`evaluation.scoring`) and `"queries"`, `"direction"`, `"corpus"`
          (modality → number of documents), `"by_target"` (modality of the relevant document → `{"queries", "ndcg@10",
          "hit@1", "hit@10"}`, None for a rate without queries); modalities are spelled as in data sets;
        - `mean`: plain mean of the subsets' nDCG@10; `limit`; `skipped` as in `evaluate_tasks`.

    Raises:
        ValueError: see `evaluate_tasks` and `retrieval.embed.embed_rows`.
    """
    tasks, pools = [], {}
    for subset in subsets:
        queries = subset.queries if limit is None else subset.queries.first(limit)
        positives = {name: [subset.positives[name]] for name in queries.ids}
        tasks.append(RetrievalTask(subset.name, subset.direction, queries, positives, subset.name))
        pools[subset.name] = subset.corpus
    scored = evaluate_tasks(tasks, pools, embed, out, scopes=("local",), device=device)
    if scored is None:
        return None
    results = {}
    for subset in subsets:
        task = scored["tasks"][subset.name]
        results[subset.name] = {
            "direction": task["direction"],
            "queries": task["queries"],
            "corpus": subset.corpus_counts,
            **task["local"],
            "by_target": _by_target(subset, Path(out) / "records" / f"{subset.name}.local.jsonl"),
        }
    mean = sum(result["ndcg@10"] for result in results.values()) / len(results)
    return {"subsets": results, "mean": {"ndcg@10": mean}, "limit": limit, "skipped": scored["skipped"]}


def _by_target(subset: Subset, path: Path) -> dict[str, dict]:
    """The figures of a run by the modality of the relevant document, from its records."""
    modality_of = dict(zip(subset.corpus.ids, subset.corpus.modalities))
    ranks: dict[str, list[float]] = {modality: [] for modality in COLUMNS}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        rank = record["ranks"][0] if record["ranks"] else math.inf
        ranks[modality_of[subset.positives[record["query"]]]].append(rank)

    def mean(values: list[float]) -> float | None:
        return sum(values) / len(values) if values else None

    return {
        IN_DATA[modality]: {
            "queries": len(of),
            "ndcg@10": mean([1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in of]),
            "hit@1": mean([float(rank <= 1) for rank in of]),
            "hit@10": mean([float(rank <= 10) for rank in of]),
        }
        for modality, of in ranks.items()
    }
