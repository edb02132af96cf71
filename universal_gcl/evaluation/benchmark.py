"""Retrieval over pools: M-BEIR, MixBench and composed retrieval share it.

A task's queries search its *local* pool and the *global* one, all pools joined. What is written under the run's folder:
- `embeddings/`: a store for each pool and each task's queries (see `retrieval.store`); the global pool is searched in
  the local ones, so that nothing is embedded twice;
- `runs/TASK.SCOPE.safetensors`: the best candidates of each query (`retrieval.run.Run`);
- `records/TASK.SCOPE.jsonl`: for each query, the ranks of its positives (`evaluation.scoring`).
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from universal_gcl.evaluation.scoring import score_run, write_records
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.run import search
from universal_gcl.retrieval.store import Store

SCOPES = ("local", "global")
DEPTH = 100  # candidates kept for each query


@dataclass(frozen=True)
class RetrievalTask:
    """
    Attributes:
        name: of files and tables, e.g. `"cirr_task7"`.
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
    embed: Callable[[str, Sequence], Store],
    out: str | Path,
    *,
    scopes: Sequence[str] = SCOPES,
    ks: Sequence[int] = (1, 5, 10, 50),
    device: str = "cpu",
) -> dict | None:
    """
    Embed, search and score. Called by all processes of a launch: they share the embedding.

    Args:
        pools: name → sequence of `(id, row)`; for the global scope, all pools of the benchmark, whose ids differ.
        embed: `(name, rows)` → the store of the rows; `Session.embed`.
        out: folder for runs and records.
        scopes: `"local"`, `"global"` or both.
        ks: cut-offs of the metrics, at most DEPTH.
        device: where to search.

    Returns:
        On process 0, None on the others; rates in 0..1:
        - `tasks`: name → `{"direction", "queries", "pool", SCOPE: {"candidates", "positives_outside", metrics…}}`;
          `positives_outside` counts the positives that the scope's pool does not hold (OVEN and InfoSeek of M-BEIR
          share positives): they can't be found, and lower recall and nDCG;
        - `candidates`: pool → how many; `skipped`: store → `{id: why}` of rows without embedding, where there are any.

    Raises:
        ValueError: a pool that is not there, a query without positives, ids that two pools share.
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

    everything = set().union(*(store.ids for store in pool_stores.values())) if "global" in scopes else set()
    members = {name: set(pool_stores[name].ids) for name in {task.pool for task in tasks}}
    results = {}
    for task in tasks:
        result = {"direction": task.direction, "queries": len(task.queries), "pool": task.pool}
        for scope in scopes:
            searched = [pool_stores[task.pool]] if scope == "local" else list(pool_stores.values())
            run = search(query_stores[task.name], searched, DEPTH, device=device)
            metrics, records = score_run(run, task.positives, ks)
            path = out / "runs" / f"{task.name}.{scope}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            run.save(path)
            write_records(out / "records" / f"{task.name}.{scope}.jsonl", records)
            inside = members[task.pool] if scope == "local" else everything
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
