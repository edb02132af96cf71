"""Retrieval over pools: the part that M-BEIR, MixBench and WebVid-CoVR share.

The queries of a task search its *local* pool and the *global* pool, which is all pools joined. The run's folder gets:
- `embeddings/`: one store for each pool and for each task's queries (see `retrieval.store`); the global pool is
  searched in the stores of the local ones, so nothing is embedded twice;
- `runs/TASK.SCOPE.safetensors`: the best candidates of each query (`retrieval.run.Run`);
- `records/TASK.SCOPE.jsonl`: the ranks of each query's positives (`evaluation.scoring`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from universal_gcl.evaluation.scoring import score_run, write_records
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.run import Run, search
from universal_gcl.retrieval.store import Store

SCOPES = ("local", "global")
DEPTH = 100  # candidates kept for each query
KS = (1, 5, 10, 50)

Embed = Callable[[str, Sequence], Store]  # (name, rows) → the store of the rows; `Session.embed`


@dataclass(frozen=True)
class RetrievalTask:
    """
    Attributes:
        name: the name in files and tables, e.g. `"cirr_task7"`.
        direction: e.g. `"it→i"`.
        queries: sequence of `(id, row)`, as `retrieval.embed.embed_rows` takes it.
        positives: query id → ids of its relevant candidates, for each query.
        pool: the name of its local pool.
    """

    name: str
    direction: str
    queries: Sequence
    positives: Mapping[str, Collection[str]]
    pool: str


def evaluate_tasks(
    tasks: Sequence[RetrievalTask],
    pools: Mapping[str, Sequence],
    embed: Embed,
    out: str | Path,
    *,
    scopes: Sequence[str] = SCOPES,
    ks: Sequence[int] = KS,
    device: str = "cpu",
) -> dict | None:
    """
    Embed, search and score. All processes of a launch must call this, because they share the embedding.

    Args:
        pools: name → sequence of `(id, row)`. The global scope needs all pools of the benchmark. No id may be in two
            pools.
        embed: `(name, rows)` → the store of the rows; `Session.embed`.
        out: folder for runs and records.
        scopes: `"local"`, `"global"` or both.
        ks: cut-offs of the metrics, at most DEPTH.
        device: where to search.

    Returns:
        On process 0, None on the others; rates in 0..1:
        - `tasks`: name → `{"direction", "queries", "pool", SCOPE: {"candidates", "positives_outside", metrics…}}`;
          `positives_outside` counts the positives that are not in the scope's pool (OVEN and InfoSeek of M-BEIR share
          positives): they can't be found, and lower recall and nDCG;
        - `candidates`: pool → number of candidates; `skipped`: store → `{id: why}` of rows without an embedding, for
          stores that have such rows.

    Raises:
        ValueError: a task names a pool that is absent, a query has no positives, or two pools share an id.
    """
    tasks, out = list(tasks), Path(out)
    for task in tasks:
        if task.pool not in pools:
            raise ValueError(f"task {task.name}: there is no pool {task.pool!r}, only {', '.join(pools)}")
    wanted = list(pools) if "global" in scopes else list(dict.fromkeys(task.pool for task in tasks))
    pool_stores = {name: embed(f"candidates/{name}", pools[name]) for name in wanted}
    query_stores = {task.name: embed(f"queries/{task.name}", task.queries) for task in tasks}
    if Processes().rank != 0:
        return None

    all_ids = set().union(*(store.ids for store in pool_stores.values())) if "global" in scopes else set()
    ids_of = {name: set(pool_stores[name].ids) for name in {task.pool for task in tasks}}
    results = {}
    for task in tasks:
        result: dict = {"direction": task.direction, "queries": len(task.queries), "pool": task.pool}
        for scope in scopes:
            searched = [pool_stores[task.pool]] if scope == "local" else list(pool_stores.values())
            run = search(query_stores[task.name], searched, DEPTH, device=device)
            metrics = save_and_score(run, task.positives, out, f"{task.name}.{scope}", ks)
            inside = ids_of[task.pool] if scope == "local" else all_ids
            outside = sum(name not in inside for positives in task.positives.values() for name in set(positives))
            counts = {"candidates": sum(map(len, searched)), "positives_outside": outside}
            result[scope] = counts | metrics
        results[task.name] = result
    stores = {f"candidates/{name}": store for name, store in pool_stores.items()}
    stores |= {f"queries/{name}": store for name, store in query_stores.items()}
    return {
        "tasks": results,
        "candidates": {name: len(store) for name, store in pool_stores.items()},
        "skipped": {name: store.skipped for name, store in stores.items() if store.skipped},
    }


def save_and_score(
    run: Run,
    positives: Mapping[str, Collection[str]],
    out: Path,
    name: str,
    ks: Sequence[int] = KS,
    *,
    about: Mapping[str, dict] | None = None,
) -> dict[str, float]:
    """Write a run to `out/runs/NAME.safetensors`, score it, and write the records to `out/records/NAME.jsonl`.

    Args:
        run, positives, ks: as for `evaluation.scoring.score_run`, which also describes the errors.
        about: query id → further fields of its record.

    Returns:
        metric → mean over the queries, in 0..1.
    """
    metrics, records = score_run(run, positives, ks)
    path = out / "runs" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    run.save(path)
    if about is not None:
        records = [record | about[record["query"]] for record in records]
    write_records(out / "records" / f"{name}.jsonl", records)
    return metrics
