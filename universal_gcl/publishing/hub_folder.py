"""The Hub-ready folder: the files that accompany the weights, the processor and the code.

- `recipe.yaml`: the recipe as run
- `environment.json`: versions, hardware, git SHA
- `data.json`: sources, revisions, numbers of pairs used and skipped
- `results.json`: what the evaluation measured
- `pictures/`: heat map, PCA, curves, result sheet
- `benchmarks/`: results of `gcl evaluate` on this model that were given to `gcl card`
- `card.json`: the facts of the model card that are in none of the other files
- `.eval_results/`: the benchmarks in the form that the Hub reads
- `README.md`: the model card; it is written last, so a folder with a card is complete

A conversion writes `environment.json`, `card.json` and `README.md`. The card can be rewritten from the folder alone,
for another id or with more benchmarks.
"""

import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import yaml

from modeling_gcl import GCLModel, GCLProcessor
from universal_gcl.evaluation.environment import collect_environment, command_line
from universal_gcl.evaluation.model_size import model_size
from universal_gcl.publishing.benchmarks import OURS, benchmark_name, eval_result_files, read_benchmark, without_folders
from universal_gcl.publishing.card_facts import CardFacts, check_hub_id
from universal_gcl.publishing.model_card import card_text
from universal_gcl.publishing.shown_paths import absolute_paths, without_paths
from universal_gcl.retrieval.adapters import adapter_base
from universal_gcl.retrieval.fingerprint import model_fingerprint

ADAPTER_FOLDER = "adapter"
_ELSEWHERE = ("recipe", "environment", "data", "results_before", "results_after", "adapter_base", "benchmarks")


def write_hub_folder(
    folder: str | Path,
    *,
    facts: CardFacts,
    recipe_text: str,
    results: dict,
    pictures: dict[str, Path] | None = None,
) -> Path:
    """Complete a folder that `save_model_folder` wrote.

    Each file appears whole or not at all. An older card and the benchmarks of its model are removed first.

    Args:
        folder: a folder that already has `config.json` and the weights.
        facts: the facts for the card. Its `pictures` are set here.
        recipe_text: YAML of the recipe as run.
        results: written to `results.json` as they are; rates in 0..1. `before` and `after` are those of the facts.
        pictures: name (see `model_card.PICTURES`) → an image file, in the folder or elsewhere.

    Returns:
        Path of the folder.

    Raises:
        FileNotFoundError: the folder holds no saved model, or a picture is missing.
        ValueError: the recipe is not YAML, figures are not finite, or a fact is missing.
        TypeError: the recipe is not a mapping.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: call model.save_pretrained({str(folder)!r}) first.")
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe_text is not YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise TypeError(f"recipe_text must be a YAML mapping, got {type(recipe).__name__}.")

    (folder / "README.md").unlink(missing_ok=True)
    shutil.rmtree(folder / "benchmarks", ignore_errors=True)
    paths = {name: copy_picture(folder, name, Path(path)) for name, path in (pictures or {}).items()}
    write_text(folder / "recipe.yaml", recipe_text)
    write_text(folder / "data.json", json_text([asdict(source) for source in facts.data], "data.json"))
    write_text(folder / "results.json", json_text(results, "results.json"))
    write_card(folder, replace(facts, pictures=paths, adapter_base=_adapter_base(folder)))
    return folder


def write_conversion(
    folder: Path,
    *,
    out: Path,
    model: GCLModel,
    processor: GCLProcessor,
    base_model: str,
    conversion: str,
    base_model_ids: Sequence[str] = (),
    licence: str | None = None,
    licence_note: str = "",
) -> None:
    """Complete a folder that a converter wrote with `save_model_folder`.

    Args:
        folder: a folder that already has the model.
        out: the folder that it will be moved to.
        model, processor: the model and the processor in the folder.
        base_model, conversion, base_model_ids, licence, licence_note: see `CardFacts`.
    """
    write_card(
        folder,
        CardFacts(
            title=out.resolve().name,
            model_name=local_name(out),
            base_model=base_model,
            base_model_ids=list(base_model_ids),
            command=command_line(),
            environment=collect_environment(),
            size=model_size(model, processor),
            licence=licence,
            licence_note=licence_note,
            conversion=conversion,
        ),
    )


def write_card(folder: Path, facts: CardFacts) -> Path:
    """Write `environment.json`, `card.json`, `.eval_results/` and, last, `README.md`; return the path of the card.

    Raises:
        ValueError: a fact is missing, contradicts another, or the Hub would refuse it; the message names the fact.
        FileNotFoundError: a picture is not in the folder.
    """
    for name, path in facts.pictures.items():
        if not (folder / path).is_file():
            raise FileNotFoundError(f"CardFacts.pictures[{name!r}] is {path!r}, which {folder} does not hold.")
    files = card_files(facts)
    for stale in folder.glob(OURS):
        stale.unlink()
    write_text(folder / "environment.json", json_text(facts.environment, "environment.json"))
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        write_text(folder / name, text)
    return folder / "README.md"


def card_files(facts: CardFacts) -> dict[str, str]:
    """Path → text of `.eval_results/`, `card.json` and, last, `README.md`. Raises what `write_card` raises."""
    readme = card_text(facts)
    own = {name: value for name, value in asdict(facts).items() if name not in _ELSEWHERE}
    card = {"facts": own, "readme_sha256": hashlib.sha256(readme.encode()).hexdigest()}
    files = eval_result_files(facts.benchmarks, facts.model_name if facts.on_hub else None)
    return files | {"card.json": json_text(card, "card.json"), "README.md": readme}


def read_facts(folder: Path) -> CardFacts:
    """
    The facts that a folder holds.

    Raises:
        ValueError: there is no `card.json`, or a file is missing or damaged.
    """
    if not (folder / "card.json").is_file():
        raise ValueError(
            f"{folder} holds no card.json, which training and `gcl convert` write, so it is not known how this model "
            "was made. Write its README.md by hand"
        )
    try:
        read = _read_json(folder / "card.json")["facts"] | {"environment": _read_json(folder / "environment.json")}
        if not read["conversion"]:
            results = _read_json(folder / "results.json")
            read["recipe"] = yaml.safe_load((folder / "recipe.yaml").read_text(encoding="utf-8"))
            read["data"] = _read_json(folder / "data.json")
            read["results_before"], read["results_after"] = results.get("before"), results.get("after")
        benchmarks = [_read_json(path) for path in sorted((folder / "benchmarks").glob("*.json"))]
        return CardFacts(**read, adapter_base=_adapter_base(folder), benchmarks=benchmarks)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise ValueError(
            f"{folder}: the facts of its card can't be read ({error}). Train or convert it again"
        ) from error


def is_edited(folder: Path) -> bool:
    """Whether `README.md` was changed since `write_card` wrote it."""
    readme = (folder / "README.md").read_bytes()
    return hashlib.sha256(readme).hexdigest() != _read_json(folder / "card.json")["readme_sha256"]


def rewrite_card(
    folder: Path, *, repo_id: str | None = None, results: Sequence[Path] = (), licence: str | None = None
) -> Path:
    """
    Rewrite the card from what the folder holds and from the arguments.

    Args:
        folder: the folder of the model.
        repo_id: id on the Hub, for the snippets and the title; None keeps the present one.
        results: files of `gcl evaluate` to show. They are copied to `benchmarks/` and replace older results of the same
            benchmark.
        licence: the licence of the weights, as the Hub spells it; None keeps the present one.

    Returns:
        Path of the card.

    Raises:
        ValueError: the folder has no facts, its card was changed by hand, or the results belong to another model (see
            `publishing.benchmarks.read_benchmark`). In that case nothing has changed.
    """
    facts = read_facts(folder)
    if (folder / "README.md").is_file() and is_edited(folder):
        raise ValueError(f"{folder / 'README.md'} was changed by hand: move it away, and a new one will be written")
    if repo_id is not None:
        check_hub_id(repo_id)
        facts = replace(facts, model_name=repo_id, on_hub=True, title=repo_id.split("/")[-1])
    if licence is not None:
        facts = replace(facts, licence=licence)
    files = [*results, *sorted((folder / "benchmarks").glob("*.json"))]
    if files:  # older results are checked too, because the weights may have changed since
        fingerprint = model_fingerprint(GCLModel.from_pretrained(folder), GCLProcessor.from_pretrained(folder))
        runs: dict[str, dict] = {}
        for place, path in enumerate(files):
            run = without_folders(read_benchmark(path, fingerprint))
            name = benchmark_name(run)
            if name in runs and place < len(results):
                raise ValueError(f"{path} is a second result of {name}, but a card shows only one")
            runs.setdefault(name, run)
        facts = replace(facts, benchmarks=[runs[name] for name in sorted(runs)])
        card_files(facts)  # raises before anything is written
        (folder / "benchmarks").mkdir(exist_ok=True)
        for name, run in runs.items():
            write_text(folder / "benchmarks" / f"{name}.json", json_text(run, f"{name}.json"))
    return write_card(folder, facts)


def files_for(folder: Path, repo_id: str, base_id: str | None = None) -> dict[str, str]:
    """The files that are pushed in a changed form, as path → text.

    The card loads `repo_id`. Absolute paths from the recipe or the command are cut to their last part, in every file. A
    card that was changed by hand is kept, with the id instead of the old name. A folder without facts is pushed as it
    is.

    Args:
        folder: the folder of the model.
        repo_id: the id to push to.
        base_id: Hub id of the adapter's base.
    """
    if not (folder / "card.json").is_file():
        return {}
    facts = read_facts(folder)
    title, base = repo_id.split("/")[-1], base_id or facts.adapter_base
    files = card_files(replace(facts, model_name=repo_id, on_hub=True, title=title, adapter_base=base))
    if is_edited(folder):
        text = (folder / "README.md").read_text(encoding="utf-8")
        files["README.md"] = text.replace(f'"{facts.model_name}"', f'"{repo_id}"')
    kept = [name for name in ("config.json", "recipe.yaml", "results.json") if (folder / name).is_file()]
    texts = {name: (folder / name).read_text(encoding="utf-8") for name in kept} | files
    paths = absolute_paths([facts.recipe, shlex.split(facts.command or "")])
    shown = {name: without_paths(text, paths) for name, text in texts.items()}
    return {name: text for name, text in shown.items() if name in files or text != texts[name]}


def local_name(folder: str | Path) -> str:
    """The name of a folder in code examples. It has a slash, because mteb would take a bare name for something else."""
    name = Path(folder).as_posix()
    return name if "/" in name else f"./{name}"


def base_model_ids(encoder: str) -> list[str]:
    """Hub ids of the models that a model was made from: the encoder, or the ids in the card of a local folder."""
    if not Path(encoder).exists():
        return [encoder]
    return read_facts(Path(encoder)).base_model_ids if (Path(encoder) / "card.json").is_file() else []


def copy_picture(folder: Path, name: str, picture: Path) -> str:
    """Copy a picture to `pictures/` unless it is there; return its path relative to the folder."""
    if not picture.is_file():
        raise FileNotFoundError(f"pictures[{name!r}]: {picture} does not exist.")
    target = folder / "pictures" / f"{name}{picture.suffix}"
    target.parent.mkdir(exist_ok=True)
    if picture.resolve() != target.resolve():
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(picture, partial)
        os.replace(partial, target)
    return target.relative_to(folder).as_posix()


def json_text(value: Any, name: str) -> str:
    """A value as the text of the JSON file `name`; raises ValueError if JSON can't hold it."""
    try:
        return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be written: {error}") from error


def write_text(path: Path, text: str) -> None:
    """Write a file, which appears whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8", newline="\n")
    os.replace(partial, path)


def _adapter_base(folder):
    return adapter_base(folder / ADAPTER_FOLDER) if (folder / ADAPTER_FOLDER).is_dir() else None


def _read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))
