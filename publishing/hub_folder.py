"""The Hub-ready folder: what goes beside the weights, the processor and the code files.

- `recipe.yaml`: the recipe as run
- `environment.json`: versions, hardware, git SHA
- `data.json`: sources, revisions, pairs used and skipped
- `results.json`: what the evaluation measured
- `pictures/`: heat map, PCA, curves, result sheet
- `README.md`: the model card; written last, so that a folder with a card is complete
"""

import json
import os
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import yaml

from publishing.model_card import CardFacts, write_model_card


def write_hub_folder(
    folder: str | Path,
    *,
    facts: CardFacts,
    recipe_text: str,
    results: dict,
    pictures: dict[str, Path] | None = None,
) -> Path:
    """Completes a folder that `save_model_folder` wrote.

    Each file appears whole or not at all. An older card is removed first.

    Args:
        folder: holds `config.json` and the weights already.
        facts: for the card; its `pictures` are set here.
        recipe_text: YAML of the recipe as run.
        results: JSON-serialisable, rates in 0..1; written as they are.
        pictures: name (see `model_card.PICTURES`) → an image file, inside the folder or elsewhere.

    Returns:
        Path of the folder.

    Raises:
        FileNotFoundError: the folder holds no saved model, or a picture is absent.
        ValueError: the recipe is no YAML, figures are not finite, or a fact is missing.
        TypeError: the recipe is no mapping.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} holds no config.json: call model.save_pretrained({str(folder)!r}) first.")
    try:
        recipe = yaml.safe_load(recipe_text)
    except yaml.YAMLError as error:
        raise ValueError(f"recipe_text is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise TypeError(f"recipe_text must be a YAML mapping, got {type(recipe).__name__}.")

    (folder / "README.md").unlink(missing_ok=True)
    paths = {name: copy_picture(folder, name, Path(path)) for name, path in (pictures or {}).items()}
    write_text(folder / "recipe.yaml", recipe_text)
    write_json(folder / "environment.json", facts.environment)
    write_json(folder / "data.json", [asdict(source) for source in facts.data])
    write_json(folder / "results.json", results)
    write_model_card(folder, replace(facts, pictures=paths))
    return folder


def copy_picture(folder: Path, name: str, picture: Path) -> str:
    """Copies a picture to `pictures/` unless it is there; returns its path relative to the folder."""
    if not picture.is_file():
        raise FileNotFoundError(f"pictures[{name!r}]: {picture} is absent.")
    target = folder / "pictures" / f"{name}{picture.suffix}"
    target.parent.mkdir(exist_ok=True)
    if picture.resolve() != target.resolve():
        partial = target.with_name(target.name + ".partial")
        shutil.copyfile(picture, partial)
        os.replace(partial, target)
    return target.relative_to(folder).as_posix()


def write_json(path: Path, value) -> None:
    try:
        text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path.name} cannot be written: {error}") from error
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
