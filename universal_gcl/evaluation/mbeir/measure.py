"""M-BEIR: 16 tasks, each of which searches its local pool and the global pool, which is all pools joined.

Notable features:
- The rules are UniIR's (98dc570): texts are cleaned; there are no instructions by default (the paper uses none); a
  missing modality of a row adds nothing to its embedding; nothing is excluded from a pool, not even the reference
  images of CIRR and FashionIQ.
- "Recall@k" is the hit rate, 1 if any positive is among the first k. On the local pool k is 5, and 10 for Fashion200K
  and FashionIQ; on the global pool k is 50, as in the paper's tables (`evaluation.mbeir.report`).
- OVEN and InfoSeek name positives in each other's pools: on the local pool these can't be found.
- All files are checked, and all images looked for, before anything is embedded.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from universal_gcl.evaluation.benchmark import SCOPES, Embed, RetrievalTask, evaluate_tasks
from universal_gcl.evaluation.mbeir.files import OriginalFiles
from universal_gcl.evaluation.mbeir.mirrors import Mirrors
from universal_gcl.evaluation.mbeir.report import average_of, paper_metric
from universal_gcl.evaluation.mbeir.rows import Rows, Scan, refuse_shared, scan
from universal_gcl.evaluation.mbeir.tasks import TASKS, MBEIRTask

_SHARING = ("5", "6")  # OVEN and InfoSeek
_NAMED = 3  # examples in a message


@dataclass
class MBEIR:
    """
    What `read_mbeir` read.

    Attributes:
        tasks: the tasks to evaluate.
        pools: name → rows; with the global scope, all of its pools.
        images, missing: how many rows have an image, and the image files that don't exist.
        empty: pool or task → ids of rows whose text is empty once it is cleaned. UniIR gives them the zero vector,
            which ranks behind every candidate with a positive similarity; here they have no embedding.
    """

    tasks: list[RetrievalTask]
    pools: dict[str, Rows]
    images: int
    missing: list[str]
    empty: dict[str, list[str]]


def open_source(root: str | Path | None = None, hub: str | None = None) -> OriginalFiles | Mirrors:
    """The files of M-BEIR, in either layout (`evaluation.mbeir.files`, `evaluation.mbeir.mirrors`).

    Raises:
        ValueError: both root and hub are given, or neither.
        FileNotFoundError: the folder has neither layout.
    """
    if (root is None) == (hub is None):
        raise ValueError("give either a folder (root) or the owner of the data sets on the Hub (hub)")
    if root is None:
        return Mirrors(hub=hub)
    if (Path(root) / "cand_pool").is_dir():
        return OriginalFiles(root)
    if any(Path(root).glob("mbeir_*/")):
        return Mirrors(root)
    raise FileNotFoundError(
        f"{root} holds neither cand_pool/ (the layout of TIGER-Lab/M-BEIR) nor folders mbeir_TASK/ (the layout of its "
        "mirrors)"
    )


def read_mbeir(
    source: OriginalFiles | Mirrors,
    tasks: Sequence[MBEIRTask],
    *,
    scopes: Sequence[str] = SCOPES,
    limit: int | None = None,
    instructions: bool = False,
) -> MBEIR:
    """
    Read all files that are needed, once. All pools take one core about two minutes, if the disk finds images quickly.

    Args:
        tasks: tasks from `evaluation.mbeir.tasks.choose_tasks`. The global scope always needs the pools of all 16
            tasks. For tasks that are not M-BEIR's, it needs the pools of the chosen tasks.
        limit: only this many first queries of each task; a pool keeps as many first candidates, and all positives.
        instructions: put a prompt before the text of each query.

    Raises:
        FileNotFoundError: files are missing. The message names them all.
        ValueError: a file is cut off or holds invalid values, a query has no positives, a positive has no query or is
            in no pool, or several entries share an id. The message names file and line.
    """
    pooled = list(tasks) if "global" not in scopes or not set(tasks) <= set(TASKS) else list(TASKS)
    _refuse_absent(source, tasks, pooled)
    wanted: set[str] = set()
    retrieval_tasks: list[RetrievalTask] = []
    scans: dict[str, Scan] = {}
    for task in tasks:
        prompts = source.prompts(task) if instructions else None
        scans[task.name], positives = _read_task(source, task, limit, prompts)
        queries = scans[task.name].rows
        retrieval_tasks.append(RetrievalTask(task.name, task.direction, queries, positives, task.pool))
        wanted.update(*positives.values())
    pools: dict[str, Scan] = {}
    found: dict[str, set[str]] = {}  # pool → the positives that it holds
    for task in {task.pool: task for task in pooled}.values():
        pools[task.pool], found[task.pool] = _read_pool(source, task, limit, wanted)
    if len(pools) > 1:
        refuse_shared(pools)
    for task, retrieval_task in zip(tasks, retrieval_tasks, strict=True):
        _refuse_unknown(source, task, retrieval_task.positives, found, complete=pooled == list(TASKS))
    scans |= {f"candidates/{name}": of for name, of in pools.items()}
    return MBEIR(
        tasks=retrieval_tasks,
        pools={name: of.rows for name, of in pools.items()},
        images=sum(of.images for of in scans.values()),
        missing=[file for of in scans.values() for file in of.missing],
        empty={name: of.empty for name, of in scans.items() if of.empty},
    )


def evaluate_mbeir(
    benchmark: MBEIR,
    tasks: Sequence[MBEIRTask],
    embed: Embed,
    out: str | Path,
    *,
    scopes: Sequence[str] = SCOPES,
    skip_unreadable: bool = False,
    limit: int | None = None,
    device: str = "cpu",
) -> dict | None:
    """
    Embed, search and score what `read_mbeir` returned.

    Args:
        tasks, scopes, limit: the same as for `read_mbeir`.
        embed, out, device: as for `evaluation.benchmark.evaluate_tasks`.
        skip_unreadable: go on if images are missing. `embed` must do the same. A query without an embedding is a miss.

    Returns:
        on process 0, None on the others: the result of `evaluate_tasks`, and
        - for each task and scope, `paper_metric`: the metric that the paper reports, e.g. `"hit@5"`;
        - `average`: scope → plain mean of these over the tasks, in 0..1;
        - `images`: `{"rows": how many have an image, "missing": how many images are missing, "examples"}`;
        - `empty`: as in `MBEIR`; `limit`: the limit of a smoke run, else None.

    Raises:
        FileNotFoundError: images are missing, and `skip_unreadable` is off. The message has their number and some
            names.
    """
    if benchmark.missing and not skip_unreadable:
        examples = ", ".join(benchmark.missing[:_NAMED])
        raise FileNotFoundError(
            f"{len(benchmark.missing):,} of {benchmark.images:,} images are missing, e.g. {examples}; unpack them, or "
            "leave them out with --skip-unreadable"
        )
    result = evaluate_tasks(benchmark.tasks, benchmark.pools, embed, out, scopes=scopes, device=device)
    if result is None:
        return None
    for task, retrieval_task in zip(tasks, benchmark.tasks, strict=True):
        result["tasks"][task.name]["queries"] = len(retrieval_task.positives)
        for scope in scopes:
            result["tasks"][task.name][scope]["paper_metric"] = paper_metric(task, scope)
    result["average"] = {scope: average_of(result, scope) for scope in scopes}
    missing = {"missing": len(benchmark.missing), "examples": benchmark.missing[:_NAMED]}
    images = {"rows": benchmark.images} | missing
    return result | {"images": images, "empty": benchmark.empty, "limit": limit}


def _refuse_absent(source: OriginalFiles | Mirrors, tasks: Sequence[MBEIRTask], pooled: Sequence[MBEIRTask]) -> None:
    needed = [file for task in tasks for file in source.needed(task)]
    needed += [file for task in pooled for file in source.needed_pool(task)]
    absent = [str(file) for file in needed if not file.is_file()]
    if absent:
        pools = " The global pool is that of all 16 tasks; --scope local needs only the pools of --tasks."
        raise FileNotFoundError(
            f"{len(absent)} files are missing: {', '.join(absent)}.{pools if len(pooled) > len(tasks) else ''}"
        )


def _read_task(
    source: OriginalFiles | Mirrors, task: MBEIRTask, limit: int | None, prompts: Sequence[str] | None
) -> tuple[Scan, dict[str, list[str]]]:
    """The queries of a task, and the positives of each query within the limit, in the order of the queries."""
    names: list[str] = []

    def keep(number: int, name: str) -> bool:
        names.append(name)
        return limit is None or number < limit

    queries = scan(source.queries(task), keep, prompts)
    judged: dict[str, list[str]] = {name: [] for name in names}
    for place, query, candidate in source.judgements(task):
        if query not in judged:
            raise ValueError(f"{place}: there is no query {query!r} among those of {task.name}")
        if candidate not in judged[query]:
            judged[query].append(candidate)
    without = [name for name, positives in judged.items() if not positives]
    if without:
        raise ValueError(f"{task.name}: {len(without)} queries have no positives in the qrels, e.g. {without[0]!r}")
    return queries, {name: judged[name] for name in names[:limit]}


def _read_pool(
    source: OriginalFiles | Mirrors, task: MBEIRTask, limit: int | None, wanted: set[str]
) -> tuple[Scan, set[str]]:
    """The candidates of a pool, and those positives of `wanted` that it holds."""
    found = set()

    def keep(number: int, name: str) -> bool:
        if name in wanted:
            found.add(name)
            return True
        return limit is None or number < limit

    return scan(source.pool(task), keep), found


def _refuse_unknown(
    source: OriginalFiles | Mirrors,
    task: MBEIRTask,
    positives: Mapping[str, Collection[str]],
    found: Mapping[str, Collection[str]],
    complete: bool,
) -> None:
    """Refuse positives that no pool holds. `complete`: whether `found` covers all pools of M-BEIR."""
    unknown: set[str] = set().union(*positives.values()).difference(found[task.pool])
    if task.dataset_id in _SHARING:
        unknown = unknown.difference(*found.values())
        if not complete:
            unknown = {name for name in unknown if name.split(":")[0] not in _SHARING}
    if not unknown:
        return
    for place, query, candidate in source.judgements(task):
        if candidate in unknown and query in positives:
            raise ValueError(
                f"{place}: the positive {candidate!r} of {query!r} is in no pool that was read; there are "
                f"{len(unknown)} such ids"
            )
