"""Benchmarks on a model card: results of `gcl evaluate`, checked to be of this very model, as tables, as a model index,
and as the Hub's evaluation results, `.eval_results/*.yaml` (https://huggingface.co/docs/hub/eval-results).

Such a file names a data set of the Hub and a task of it. Only benchmarks that are one, with tasks that its own files
name, are written so: M-BEIR, MMEB, MixBench. The Hub ranks figures where that data set is registered as a benchmark.
"""

import json
import logging
import re
from pathlib import Path

import huggingface_hub
import yaml
from huggingface_hub import EvalResult

from universal_gcl.evaluation.benchmark_report import figures, read_run
from universal_gcl.evaluation.covr.measure import covr_table
from universal_gcl.evaluation.mbeir.report import mbeir_table
from universal_gcl.evaluation.mbeir.tasks import TASKS
from universal_gcl.evaluation.mixbench.data import HUB_ID as MIXBENCH_ID
from universal_gcl.evaluation.mixbench.data import PUBLISHED
from universal_gcl.evaluation.mixbench.measure import mixbench_table
from universal_gcl.evaluation.mmeb.data import HUB_IDS as MMEB_IDS
from universal_gcl.evaluation.mmeb.report import mmeb_table
from universal_gcl.evaluation.pairs.report import nine_way_markdown
from universal_gcl.publishing.shown_paths import shown_command, shown_name
from universal_gcl.retrieval.fingerprint import describe_model, same_model

logger = logging.getLogger(__name__)

OURS = ".eval_results/gcl_*.yaml"  # those written here, which another model's replace
_MBEIR_ID = "TIGER-Lab/M-BEIR"


def read_benchmark(path: str | Path, fingerprint: dict) -> dict:
    """
    What a command of `gcl evaluate` wrote.

    Args:
        path: `results.json`, or the folder that holds it.
        fingerprint: of the model that the card is of.

    Raises:
        ValueError: no such results, results of a part of the data (`--limit`), of another model, or that don't name
            their model.
        OSError: no such file.
    """
    path = Path(path)
    path = path / "results.json" if path.is_dir() else path
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); was it cut off?") from error
    if isinstance(run, dict) and "train_runtime" in run:
        raise ValueError(f"{path} is of a training run, whose card has its results already")
    if isinstance(run, dict) and run.get("after"):
        run = {"protocol": "pairs", **run}
    else:
        run = read_run(path)
    if run.get("limit") is not None:
        raise ValueError(f"{path} is of the first {run['limit']} alone (--limit), which no card shows: measure all")
    if "fingerprint" not in run:
        raise ValueError(f"{path} does not say which model it is of: measure again, by this version of gcl evaluate")
    if not same_model(run["fingerprint"], fingerprint):
        raise ValueError(
            f"{path} is of another model, {describe_model(run['fingerprint'])}, than this folder's, "
            f"{describe_model(fingerprint)}. A --variant other than plain is another model, too"
        )
    try:
        benchmark_markdown(run)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} lacks a part of its results ({error!r}): measure again") from error
    return run


def benchmark_name(run: dict) -> str:
    """As a file's name: the protocol, and what makes its figures others."""
    parts = [run["protocol"]]
    if run["protocol"] == "pairs":
        parts.append(slug(Path(run["data"]).name))
    if run["protocol"] in ("mbeir", "mixbench") and not _is_published(run):
        parts += sorted({slug(name.partition("_task")[0]) for name in _tasks(run)})
    if run["protocol"] == "mmeb" and run["version"] != 1:
        parts.append(f"v{run['version']}")
    if run["protocol"] == "mbeir" and run["instructions"]:
        parts.append("instructions")
    if run.get("truncate_dim"):
        parts.append(f"{run['truncate_dim']}d")
    return "-".join(parts)


def without_folders(run: dict) -> dict:
    """The run with the names alone of files and folders that it gives by absolute paths."""
    shown = {key: shown_name(value) if isinstance(value, str) else value for key, value in run.items()}
    name = run["fingerprint"]["name"]
    fingerprint = run["fingerprint"] | {"name": name and shown_name(name)}
    return shown | {"fingerprint": fingerprint, "command": shown_command(run["command"])}


def benchmark_title(run: dict) -> str:
    if run["protocol"] in ("mbeir", "mixbench") and not _is_published(run):
        return f"Data in {'M-BEIR' if run['protocol'] == 'mbeir' else 'MixBench'}'s layout"
    if run["protocol"] == "pairs":
        return f"Nine directions on {Path(run['data']).name}"
    names = {"mbeir": "M-BEIR", "mmeb": "MMEB", "covr": "WebVid-CoVR", "mixbench": "MixBench"}
    version = f", version {run['version']}" if run["protocol"] == "mmeb" else ""
    return names[run["protocol"]] + version


def benchmark_markdown(run: dict) -> str:
    """Tables with the paper's figures beside, where it has them, and what else must be known to read them."""
    protocol, result = run["protocol"], run.get("result")
    if protocol == "pairs":
        tables = [nine_way_markdown({"this model": run["after"]})]
    elif protocol == "mbeir":
        tables = [mbeir_table(result, scope, markdown=True) for scope in run["scopes"]]
    elif protocol == "mixbench":
        tables = [mixbench_table(result["subsets"], markdown=True)]
    else:
        tables = [{"mmeb": mmeb_table, "covr": covr_table}[protocol](result, markdown=True)]
    notes = []
    if protocol in ("mbeir", "mmeb"):
        notes.append(f"{'With' if run['instructions'] else 'Without'} instructions before queries.")
    if run.get("truncate_dim"):
        notes.append(f"Embeddings cut to {run['truncate_dim']} dimensions.")
    skipped = sum(map(len, (result or {}).get("skipped", {}).values()))
    if skipped and protocol in ("mixbench", "covr"):
        notes.append(f"{skipped} rows could not be read and were left out.")
    environment = run["environment"]
    machine = ", ".join(environment["gpus"]) or environment["cpu"]["name"]
    notes.append(f"`{run['command']}` on {machine}, images by {environment['image_backend']}.")
    return "\n\n".join([*tables, " ".join(notes)])


def model_index(runs: list[dict]) -> list[EvalResult]:
    """The figures by which the benchmarks judge, in percent. Those of `pairs` have no Hub-wide name, and stay out."""
    found = []
    for run in runs:
        if run["protocol"] == "pairs":
            continue
        dataset_id, revision = _dataset(run)
        for line, value in figures(run).items():
            found.append(
                EvalResult(
                    task_type="retrieval",
                    task_name=f"{line.direction} retrieval, {line.pool} pool",
                    dataset_type=dataset_id or slug(benchmark_title(run)),
                    dataset_name=f"{benchmark_title(run)} {line.task}",
                    dataset_config=line.task,
                    dataset_split="test",
                    dataset_revision=revision,
                    metric_type=line.metric,
                    metric_name=f"{line.metric} {line.direction}, {line.pool} pool",
                    metric_value=round(value, 2),
                )
            )
    return found


def eval_result_files(runs: list[dict], repo_id: str | None) -> dict[str, str]:
    """
    The Hub's evaluation results.

    Args:
        runs: as `read_benchmark` gives them.
        repo_id: of the model; None while it is on no Hub, and the results have no source.

    Returns:
        path → YAML; a file for each pool, as a data set's task has one figure in a file. A huggingface_hub that does
        not know such results writes none, and says so.
    """
    files = {}
    for run in runs:
        dataset_id, revision = (None, None) if run["protocol"] == "pairs" else _dataset(run)
        if dataset_id is None:
            continue
        if not hasattr(huggingface_hub, "EvalResultEntry"):
            logger.warning(
                f"huggingface_hub {huggingface_hub.__version__} knows no evaluation results: .eval_results/ is left "
                "out. Upgrade it, then write the card again"
            )
            return {}
        by_pool: dict[str, list] = {}
        for line, value in figures(run).items():
            if line.pool in ("local", "global", "own", "mixed"):  # others are parts of these
                entry = huggingface_hub.EvalResultEntry(
                    dataset_id=dataset_id,
                    task_id=f"mbeir_{line.task}" if run["protocol"] == "mbeir" else line.task,
                    value=round(value, 2),
                    dataset_revision=revision,
                    date=run["environment"].get("date"),
                    source_url=repo_id and f"https://huggingface.co/{repo_id}",
                    source_name=repo_id and "Model card",
                    notes=f"{line.metric} in %, {line.direction}, {line.pool} pool{_eval_notes(run)}",
                )
                by_pool.setdefault(line.pool, []).append(entry)
        for pool, entries in by_pool.items():
            text = yaml.safe_dump(huggingface_hub.eval_result_entries_to_yaml(entries), sort_keys=False)
            if huggingface_hub.parse_eval_result_entries(yaml.safe_load(text)) != entries:
                raise ValueError(f"evaluation results do not survive YAML: {text}")
            suffix = "" if pool in ("own", "mixed") else f"_{pool}"
            files[OURS.replace("*", f"{benchmark_name(run)}{suffix}")] = text
    return files


def _eval_notes(run):
    notes = ", with instructions" if run.get("instructions") and run["protocol"] == "mbeir" else ""
    return notes + (f", cut to {run['truncate_dim']} dimensions" if run.get("truncate_dim") else "")


def _tasks(run):
    return run["result"]["tasks" if run["protocol"] == "mbeir" else "subsets"]


def _is_published(run):
    """Whether the tasks of M-BEIR or MixBench are their own, not of a user's data in their layout."""
    return set(_tasks(run)) <= ({task.name for task in TASKS} if run["protocol"] == "mbeir" else set(PUBLISHED))


def _dataset(run: dict) -> tuple[str | None, str | None]:
    """Id on the Hub and, where the run names it, commit of the data set that a benchmark is; None, None without one."""
    protocol = run["protocol"]
    if protocol == "mmeb":
        is_official = run["hub"] and run["hub"].partition("@")[0] == MMEB_IDS[run["version"]]
        return MMEB_IDS[run["version"]], run["hub_commit"] if is_official else None
    if protocol not in ("mbeir", "mixbench") or not _is_published(run):
        return None, None
    return (_MBEIR_ID, None) if protocol == "mbeir" else (run["hub"] or MIXBENCH_ID, run["hub_commit"])


def slug(name: str) -> str:
    """As a part of a file's name or an id."""
    return re.sub(r"[^a-z0-9]+", "-", name.casefold()).strip("-")
