"""MixBench (GR-CLIP, arXiv 2507.19054): a corpus in which each item appears once, as image, text or both.

All documents of a subset are one pool; the headline is nDCG@10, mean over queries. Every query has one relevant
document, for which the authors' nDCG (its ideal taken from the ten retrieved) is the standard one: 1 / log2(1 + rank).
The corpus is the published `mixed_corpus`. The authors' script can also deal modalities to the unmixed `corpus` anew
(`random.seed(42)`); that is another pool, and left out here.

Fused documents follow the model's fusion rule; GR-CLIP's own baseline is `normalized_sum`, and GR-CLIP itself
`normalized_sum+centring`. It subtracts the mean of query texts from queries and that of document texts from documents;
`centring` has one mean for all texts, that of the calibration captions.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from universal_gcl.evaluation.benchmark import RetrievalTask, evaluate_tasks
from universal_gcl.evaluation.mixbench.data import MODALITIES, Subset
from universal_gcl.evaluation.paper import markdown_table
from universal_gcl.retrieval.store import Store

KS = (1, 5, 10, 50)


def evaluate_mixbench(
    subsets: Sequence[Subset],
    embed: Callable[[str, Sequence], Store],
    out: str | Path,
    *,
    limit: int | None = None,
    device: str = "cpu",
) -> dict | None:
    """
    Embed, search and score. Called by all processes of a launch: they share the embedding.

    Args:
        subsets: as `evaluation.mixbench.data.read_subset` gives them.
        embed: `(name, rows)` → the store of the rows; `Session.embed`.
        out: folder for runs and records; see `evaluation.benchmark`.
        limit: only the first queries of each subset; the corpus stays whole.
        device: where to search.

    Returns:
        On process 0, None on the others; rates in 0..1:
        - `subsets`: name → metrics over all queries (`evaluation.scoring`) and `"queries"`, `"direction"`, `"corpus"`
          (modality → how many documents), `"by_target"` (modality of the relevant document → `{"queries", "ndcg@10",
          "hit@1", "hit@10"}`, None for a rate without queries);
        - `mean`: plain mean of the subsets' nDCG@10; `limit`; `skipped` as of `evaluate_tasks`.

    Raises:
        ValueError: as `evaluate_tasks` and `retrieval.embed.embed_rows`.
    """
    tasks, pools = [], {}
    for subset in subsets:
        queries = subset.queries if limit is None else subset.queries.first(limit)
        positives = {name: [subset.positives[name]] for name in queries.ids}
        tasks.append(RetrievalTask(subset.name, subset.direction, queries, positives, subset.name))
        pools[subset.name] = subset.corpus
    scored = evaluate_tasks(tasks, pools, embed, out, scopes=("local",), ks=KS, device=device)
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


def mixbench_table(results: Mapping[str, dict], *, markdown: bool = False) -> str:
    """nDCG@10 in percent: a line for each subset, over all queries and by the modality of the relevant document. For a
    file with `markdown`, else for a terminal."""
    header = ["nDCG@10", "all", *MODALITIES]
    lines = []
    for name, result in results.items():
        rates = [result["ndcg@10"], *(result["by_target"][modality]["ndcg@10"] for modality in MODALITIES)]
        lines.append([name, *("–" if rate is None else f"{100 * rate:.1f}" for rate in rates)])
    if markdown:
        return markdown_table(header, lines)
    width = max(len(line[0]) for line in [header, *lines])
    return "\n".join(line[0].ljust(width) + "".join(f"{cell:>12}" for cell in line[1:]) for line in [header, *lines])


def _by_target(subset, path):
    """Of the records of a run, by the modality of the relevant document."""
    modality_of = dict(zip(subset.corpus.ids, subset.corpus.modalities))
    ranks: dict[str, list[float]] = {name: [] for name in MODALITIES}
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        rank = record["ranks"][0] if record["ranks"] else math.inf
        ranks[modality_of[subset.positives[record["query"]]]].append(rank)

    def mean(values):
        return sum(values) / len(values) if values else None

    return {
        name: {
            "queries": len(of),
            "ndcg@10": mean([1 / math.log2(1 + rank) if rank <= 10 else 0.0 for rank in of]),
            "hit@1": mean([float(rank <= 1) for rank in of]),
            "hit@10": mean([float(rank <= 10) for rank in of]),
        }
        for name, of in ranks.items()
    }
