"""The recipe of a run: a YAML file with the sections `model:`, `data:`, `training:` and, for LoRA, `peft:`.

Options of the command line override it:

    recipe = parse_recipe(["hub_configs/quickstart.yaml", "--learning_rate", "1e-5", "--data.eval.limit", "100"])
    recipe.model, recipe.data, recipe.training   # dataclasses
    recipe.to_yaml()                             # all that was set, with the overrides; saved next to the weights

A key is written in full (`--training.seed 3`, `--data.train.0.limit 100`) or without its section, if only one section
has it (`--seed 3`). Values are YAML: `--freeze "[text, logit_scale]"`. Text and the paths of sources are taken as they
are typed. A switch needs no value: `--bf16`. Relative paths start from the working directory, not from the recipe's
folder.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path

from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.training.arguments import DataArguments, LoraArguments, ModelArguments
from universal_gcl.training.recipe_help import format_help
from universal_gcl.training.recipe_values import (
    RecipeError,
    choices,
    convert,
    is_switch,
    read_option,
    read_yaml,
    write_yaml,
)
from universal_gcl.training.shipped import find_recipe, shipped_recipes
from universal_gcl.training.training_arguments import GCLTrainingArguments

SECTIONS = {"model": ModelArguments, "data": DataArguments, "training": GCLTrainingArguments, "peft": LoraArguments}
USAGE = "usage: gcl train RECIPE [--key value ...]   (--help lists the keys)"
HELP = """usage: gcl train RECIPE [--key value ...]

RECIPE is the path of a YAML file, or the name of a recipe that comes with GCL:
{recipes}.

Each key below can be set in the recipe or on the command line. You can leave out its section if no other section has
the key: --bf16 is --training.bf16. A switch needs no value. Other values are YAML, as in --freeze "[text]". Keys of a
source are written with its place: --data.train.0.caption_column for the first one, --data.eval.limit.

  gcl train finetune --train FOLDER --eval FOLDER_OF_OTHER_PAIRS
  accelerate launch --multi_gpu --num_processes 8 -m universal_gcl.train finetune --train FOLDER"""


@dataclass
class Recipe:
    """A parsed recipe.

    Attributes:
        model, data, training: these sections as dataclasses, with defaults filled in.
        peft: the section of LoRA; None if the recipe has none.
        settings: `{section: {key: value}}` with plain values, only those that the YAML or the command line set. The Hub
            token is left out, because settings are saved and published.
        path: the YAML file that was read.
    """

    model: ModelArguments
    data: DataArguments
    training: GCLTrainingArguments
    peft: LoraArguments | None = None
    settings: dict = field(default_factory=dict)
    path: str = ""

    def to_yaml(self) -> str:
        """The settings as YAML text; `parse_recipe` reads the same settings from it."""
        return write_yaml(self.settings)


def parse_recipe(argv: list[str]) -> Recipe:
    """Read a recipe and apply the options that follow it.

    `--help` at any place prints all keys and exits.

    Args:
        argv: path or name of the recipe, then `--key value` and so on, without the program's name.

    Raises:
        RecipeError: (a ValueError) the file is missing or not YAML, a key is unknown or missing, or a value has a wrong
            type or is out of range. The message names file and line, or the option, and suggests the nearest key.
    """
    if "--help" in argv or "-h" in argv:
        print(HELP.format(recipes=", ".join(shipped_recipes())))
        print(f"\n{format_help(SECTIONS | {'source': SourceArguments})}")
        raise SystemExit(0)
    if not argv or argv[0].startswith("-"):
        raise RecipeError(f"no recipe given\n{USAGE}")
    try:
        path = str(find_recipe(argv[0]))
    except FileNotFoundError as error:
        raise RecipeError(str(error)) from error
    settings = _read_recipe(path)
    for key, value in _options(argv[1:]):
        _override(settings, key, value)
    return _build(settings, path)


def _read_recipe(path: str) -> dict:
    """The settings of a YAML file, checked and converted."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise RecipeError(f"{path}, line {line}: not UTF-8. Save it as UTF-8") from error
    document, lines = read_yaml(text, path)

    def where(keys: tuple) -> str:
        return f"{path}, line {lines[keys]}" if keys in lines else path

    if not isinstance(document, dict):
        raise RecipeError(f"{path}: a recipe must be a mapping with the keys {', '.join(SECTIONS)}")
    settings = {}
    for section, values in document.items():
        if section not in SECTIONS:
            raise RecipeError(f"{where((section,))}: unknown key {section!r}; {_suggest(section, SECTIONS)}")
        settings[section] = convert({} if values is None else values, SECTIONS[section], (section,), where, _check_keys)
    return settings


def _options(tokens: list[str]) -> list[tuple[str, str | None]]:
    """`--key value`, `--key=value` and `--key` as (key, value or None)."""
    options, position = [], 0
    while position < len(tokens):
        token = tokens[position]
        if not token.startswith("--"):
            raise RecipeError(
                f'{token!r} is not an option. Write --key value, and several values as a list: --key "[a, b]"\n{USAGE}'
            )
        key, equals, value = token[2:].partition("=")
        has_value = bool(equals)
        if not has_value and position + 1 < len(tokens) and not tokens[position + 1].startswith("--"):
            position += 1
            value, has_value = tokens[position], True
        options.append((key, value if has_value else None))
        position += 1
    return options


def _override(settings: dict, key: str, text: str | None):
    """Write one option of the command line into the settings."""
    keys = _resolve(key)
    hint = SECTIONS
    target = settings
    for depth, name in enumerate(keys[:-1]):
        hint = _step_into(hint, name, keys[: depth + 1], key)
        target = _container(target, name, hint, key)
    hint = _step_into(hint, keys[-1], keys, key)
    if isinstance(target, list):
        _check_position(target, keys[-1], key)
    if text is None:
        if not is_switch(hint):
            raise RecipeError(f"--{key}: a value is missing")
        value = True
    else:
        value = read_option(text, hint, f"--{key}")
    target[keys[-1]] = convert(value, hint, tuple(keys), lambda _: f"--{key}", _check_keys)


def _resolve(key: str) -> list:
    """`training.seed` or `seed` as ["training", "seed"]; list positions become integers."""
    keys = [int(part) if part.isdecimal() else part for part in key.replace("-", "_").split(".")]
    if keys[0] in SECTIONS and len(keys) > 1:
        return keys
    owners = [section for section, cls in SECTIONS.items() if keys[0] in _fields(cls)]
    if len(owners) == 1:
        return [owners[0], *keys]
    if owners:
        raise RecipeError(f"--{key} is ambiguous. Write {' or '.join(f'--{owner}.{key}' for owner in owners)}")
    known = [name for cls in SECTIONS.values() for name in _fields(cls)]
    raise RecipeError(f"--{key}: unknown option; {_suggest(keys[0], known, '--')}")


def _step_into(hint, name, keys: list, key: str):
    """The declared type of `name` in a section table, a dataclass or a list of dataclasses."""
    if isinstance(hint, dict):
        return hint[name]
    full = ".".join(map(str, keys[:-1]))
    for candidate in choices(hint):
        if dataclasses.is_dataclass(candidate):
            _check_keys(candidate, [name], tuple(keys[:-1]), lambda _: f"--{key}")
            return _fields(candidate)[name]
        if typing.get_origin(candidate) is list:
            if isinstance(name, int):
                return typing.get_args(candidate)[0]
            raise RecipeError(
                f"--{key}: {full} is a list. Use --{keys[-2]} for the whole list, or --{full}.0.{name} for its first "
                "entry"
            )
    raise RecipeError(f"--{key}: {full} has no parts. Give its whole value")


def _container(parent, name, hint, key: str):
    """The dict or list under `name`; an empty one is added if the recipe has none."""
    if isinstance(parent, list):
        _check_position(parent, name, key)
        return parent[name]
    if parent.get(name) is None:
        parent[name] = [] if any(typing.get_origin(choice) is list for choice in choices(hint)) else {}
    return parent[name]


def _check_position(entries: list, position: int, key: str):
    if position >= len(entries):
        raise RecipeError(f"--{key}: the recipe has only {len(entries)} entries there; the first is 0")


def _check_keys(cls, names, keys: tuple, where):
    """Raise for names that are not fields of the dataclass `cls`, and suggest the nearest field."""
    known = _fields(cls)
    for name in names:
        if name in known:
            continue
        full = ".".join(map(str, (*keys, name)))
        owners = [section for section, other in SECTIONS.items() if other is not cls and name in _fields(other)]
        hint = f"{name} belongs to {owners[0]}:" if owners else _suggest(name, known)
        raise RecipeError(f"{where((*keys, name))}: unknown key {full}; {hint}")


def _fields(cls) -> dict:
    """Names and types of the fields of a dataclass that a recipe may set."""
    hints = typing.get_type_hints(cls)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(cls) if entry.init}


def _suggest(name, known, prefix: str = "") -> str:
    nearest = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"did you mean {prefix}{nearest[0]}?" if nearest else "--help lists all keys"


def _build(settings: dict, path: str) -> Recipe:
    """Make the dataclasses from plain settings."""
    for section, cls in SECTIONS.items():
        for entry in dataclasses.fields(cls):
            required = entry.default is dataclasses.MISSING and entry.default_factory is dataclasses.MISSING
            if required and not settings.get(section, {}).get(entry.name):
                raise RecipeError(f"{path}: {section}.{entry.name} is missing. --help describes it")
    data = dict(settings["data"])
    for name, source in [*((f"train.{n}", s) for n, s in enumerate(data["train"])), ("eval", data.get("eval"))]:
        if source is not None and "path" not in source:
            raise RecipeError(
                f"{path}: data.{name}.path is missing. Give a folder, a file or the id of a data set on the Hub"
            )
    training = _known_checkpointing_name(settings.get("training", {}))
    for name in ("hub_token", "push_to_hub"):  # whoever repeats a recipe has their own token and repository
        settings.get("training", {}).pop(name, None)
    try:
        data["train"] = [SourceArguments(**source) for source in data["train"]]
        if data.get("eval") is not None:
            data["eval"] = SourceArguments(**data["eval"])
        return Recipe(
            model=ModelArguments(**settings["model"]),
            data=DataArguments(**data),
            training=GCLTrainingArguments(**training),
            peft=LoraArguments(**settings["peft"]) if "peft" in settings else None,
            settings=settings,
            path=path,
        )
    except (ValueError, TypeError) as error:
        raise RecipeError(f"{path}: {error}") from error


def _known_checkpointing_name(training: dict) -> dict:
    """Rename `gradient_checkpointing*` to what the installed transformers calls it (5.23 renamed these settings)."""
    known = _fields(GCLTrainingArguments)
    renamed = {}
    for name, value in training.items():
        newer = name.replace("gradient_checkpointing", "activation_checkpointing")
        renamed[newer if newer in known else name] = value
    return renamed
