"""Puts the results of `gcl evaluate` on a model card, after a check that they belong to the same model. They become
tables, a model index, and the Hub's evaluation results, `.eval_results/*.yaml`
(https://huggingface.co/docs/hub/eval-results).

Such a file names a data set of the Hub and one of its tasks. So it is written only for benchmarks that are a data set
with named tasks: M-BEIR, MMEB and MixBench. The Hub ranks the figures if that data set is registered as a benchmark.

`evaluation.protocol.Protocol` knows the tables, titles and figures of each benchmark.
"""

import logging
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import EvalResult

from universal_gcl.evaluation.protocol import slug
from universal_gcl.evaluation.protocols import protocol_of, read_run, results_file
from universal_gcl.publishing.shown_paths import shown_command, shown_name
from universal_gcl.retrieval.fingerprint import describe_model, same_model

logger = logging.getLogger(__name__)

OURS = ".eval_results/gcl_*.yaml"  # the files that are written here; those of another model are replaced


def read_benchmark(path: str | Path, fingerprint: dict) -> dict:
    """
    Read what a command of `gcl evaluate` wrote, for the card of a model.

    Args:
        path: `results.json`, or the folder that holds it.
        fingerprint: the fingerprint of the model whose card it is.

    Raises:
        ValueError: the file has no such results, or it has results of a part of the data (`--limit`), of another model,
            or of an unknown model.
        OSError: there is no such file.
    """
    path = results_file(path)
    run = read_run(path)
    if "train_runtime" in run:
        raise ValueError(f"{path} was written by a training run, and the card of that run already has its results")
    if run.get("limit") is not None:
        raise ValueError(
            f"{path} is a smoke run on the first {run['limit']} queries (--limit). A card doesn't show such results: "
            "measure all queries"
        )
    if "fingerprint" not in run:
        raise ValueError(
            f"{path} does not name the model that it measured: measure again with this version of gcl evaluate"
        )
    if not same_model(run["fingerprint"], fingerprint):
        raise ValueError(
            f"{path} has results of another model: {describe_model(run['fingerprint'])}, but this folder has "
            f"{describe_model(fingerprint)}. A --variant other than plain also counts as another model"
        )
    try:
        benchmark_markdown(run)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks a part of its results ({error!r}): measure again") from error
    return run


def benchmark_name(run: dict) -> str:
    """The name of a run's file: the benchmark, and what distinguishes this run from others of it."""
    return protocol_of(run).file_name(run)


def without_folders(run: dict) -> dict:
    """The run with absolute paths reduced to the names of their files and folders."""
    shown = {key: shown_name(value) if isinstance(value, str) else value for key, value in run.items()}
    name = run["fingerprint"]["name"]
    fingerprint = run["fingerprint"] | {"name": name and shown_name(name)}
    return shown | {"fingerprint": fingerprint, "command": shown_command(run["command"])}


def benchmark_title(run: dict) -> str:
    """The heading of a run on the card."""
    return protocol_of(run).title(run)


def benchmark_markdown(run: dict) -> str:
    """The tables of a run, with the paper's figures if it has them, and what a reader needs to know about them."""
    protocol = protocol_of(run)
    notes = protocol.notes(run)
    if run.get("truncate_dim"):
        notes.append(f"Embeddings cut to {run['truncate_dim']} dimensions.")
    environment = run["environment"]
    machine = ", ".join(environment["gpus"]) or environment["cpu"]["name"]
    notes.append(f"`{run['command']}` on {machine}, images by {environment['image_backend']}.")
    return "\n\n".join([*protocol.tables(run, markdown=True), " ".join(notes)])


def model_index(runs: list[dict]) -> list[EvalResult]:
    """The figures by which the benchmarks judge, in percent. `pairs` has none: its data sets have no Hub-wide name."""
    found = []
    for run in runs:
        protocol, title = protocol_of(run), benchmark_title(run)
        dataset = protocol.hub_dataset(run)
        for line, value in protocol.figures(run).items():
            if value is None:
                continue
            found.append(
                EvalResult(
                    task_type="retrieval",
                    task_name=f"{line.direction} retrieval, {line.pool} pool",
                    dataset_type=dataset.id if dataset else slug(title),
                    dataset_name=f"{title} {line.task}",
                    dataset_config=line.task,
                    dataset_split="test",
                    dataset_revision=dataset.revision if dataset else None,
                    metric_type=line.metric,
                    metric_name=f"{line.metric} {line.direction}, {line.pool} pool",
                    metric_value=round(100 * value, 2),
                )
            )
    return found


def eval_result_files(runs: list[dict], repo_id: str | None) -> dict[str, str]:
    """
    The Hub's evaluation results.

    Args:
        runs: runs from `read_benchmark`.
        repo_id: the Hub id of the model. None if it is not on the Hub; its results then have no source.

    Returns:
        path → YAML. There is one file per pool, because a file can have only one figure for each task of a data set.
        Empty, with a warning, if the installed huggingface_hub doesn't support evaluation results.
    """
    files = {}
    for run in runs:
        protocol = protocol_of(run)
        dataset = protocol.hub_dataset(run)
        if dataset is None:
            continue
        if not hasattr(huggingface_hub, "EvalResultEntry"):
            logger.warning(
                f"huggingface_hub {huggingface_hub.__version__} doesn't support evaluation results: .eval_results/ is "
                "left out. Upgrade it, then write the card again"
            )
            return {}
        cut = f", cut to {run['truncate_dim']} dimensions" if run.get("truncate_dim") else ""
        by_pool: dict[str, list] = {}
        for line, value in protocol.figures(run).items():
            if value is None or line.pool not in dataset.pools:
                continue
            entry = huggingface_hub.EvalResultEntry(
                dataset_id=dataset.id,
                task_id=f"{dataset.task_prefix}{line.task}",
                value=round(100 * value, 2),
                dataset_revision=dataset.revision,
                date=run["environment"].get("date"),
                source_url=repo_id and f"https://huggingface.co/{repo_id}",
                source_name=repo_id and "Model card",
                notes=f"{line.metric} in %, {line.direction}, {line.pool} pool{dataset.notes}{cut}",
            )
            by_pool.setdefault(line.pool, []).append(entry)
        for pool, entries in by_pool.items():
            text = yaml.safe_dump(huggingface_hub.eval_result_entries_to_yaml(entries), sort_keys=False)
            if huggingface_hub.parse_eval_result_entries(yaml.safe_load(text)) != entries:
                raise ValueError(f"these evaluation results do not survive YAML: {text}")
            files[OURS.replace("*", f"{protocol.file_name(run)}{dataset.pools[pool]}")] = text
    return files
