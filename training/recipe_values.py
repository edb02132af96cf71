"""Values of a recipe: YAML with line numbers, and conversion to the types that the arguments declare."""

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Callable

import yaml


class RecipeError(ValueError):
    """A recipe or an option that can't be used; the message names it and what to do."""


class _Loader(yaml.SafeLoader):
    """YAML 1.2's plain scalars: `1e-5` is a number, `no` and dates are text (`eval_strategy: no` must stay "no")."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that either version of YAML would take for something else."""


_NUMBER = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", _NUMBER, "-+.0123456789"),
)
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith((":bool", ":float", ":int", ":timestamp"))]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _name, _pattern, _first in _SCALARS:
    for _side in (_Loader, _Dumper):
        _side.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(f"^(?:{_pattern})$"), list(_first))


def write_yaml(value) -> str:
    """Plain data as YAML that `read_yaml` (and any YAML 1.1 reader) reads back."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, name: str) -> tuple[object, dict[tuple, int]]:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what to call it in errors.

    Returns:
        The value, and the line (from 1) of every key as `{("training", "seed"): 7, ("data", "train", 0, "path"): 3}`.

    Raises:
        RecipeError: with name and line for text that is not YAML or repeats a key.
    """
    loader = _Loader(text)
    lines: dict[tuple, int] = {}
    try:
        node = loader.get_single_node()
        if node is None:
            return None, lines
        _record_lines(node, (), lines, name)
        return loader.construct_document(node), lines
    except RecursionError as error:
        raise RecipeError(f"{name}: nested too deeply") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"{name}, line {mark.line + 1}" if mark else name
        raise RecipeError(f"{place}: not valid YAML: {getattr(error, 'problem', None) or error}") from error
    finally:
        loader.dispose()


def _record_lines(node, keys: tuple, lines: dict, name: str):
    if isinstance(node, yaml.SequenceNode):
        for position, item in enumerate(node.value):
            _record_lines(item, (*keys, position), lines, name)
    if isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"{name}, line {line}: a key must be one word, not a list or mapping")
            if key.value in seen:
                raise RecipeError(f"{name}, line {line}: key {key.value!r} was set in line {seen[key.value]} already")
            seen[key.value] = line
            lines[(*keys, key.value)] = line
            _record_lines(value, (*keys, key.value), lines, name)


def convert(value, hint, keys: tuple, where: Callable, check_keys: Callable):
    """`value` as plain data of the declared type.

    A number is taken where text of a number stands, one item where a list is declared, and text where a data source is
    declared (its path). Dataclasses come back as dicts of the keys that were set.

    Args:
        value: what YAML gave.
        hint: the type, as `typing.get_type_hints` gives it.
        keys: the way to the value, for messages.
        where: `where(keys)` says file and line.
        check_keys: `check_keys(cls, names, keys, where)` raises for names that the dataclass doesn't have.

    Raises:
        RecipeError: naming the place, the key and the expected type.
    """

    def wrong():
        name = ".".join(map(str, keys))
        raise RecipeError(f"{where(keys)}: {name} expects {describe(hint)}, not {value!r}")

    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is typing.Any:
        return value
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        choice = _choice(value, hint)
        return wrong() if choice is None else convert(value, choice, keys, where, check_keys)
    if origin is typing.Literal:
        return value if value in args else wrong()
    if dataclasses.is_dataclass(hint):
        if isinstance(value, str) and "path" in typing.get_type_hints(hint):
            value = {"path": value}
        if not isinstance(value, dict):
            wrong()
        check_keys(hint, value, keys, where)
        hints = typing.get_type_hints(hint)
        return {key: convert(item, hints[key], (*keys, key), where, check_keys) for key, item in value.items()}
    if hint is list or origin is list:
        if value is None:
            wrong()
        items = value if isinstance(value, list) else [value]
        item_hint = args[0] if args else typing.Any
        return [convert(item, item_hint, (*keys, position), where, check_keys) for position, item in enumerate(items)]
    if hint is dict or origin is dict:
        if not isinstance(value, dict):
            wrong()
        item_hint = args[1] if args else typing.Any
        return {str(key): convert(item, item_hint, (*keys, key), where, check_keys) for key, item in value.items()}
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            wrong()
    if hint is int and isinstance(value, (int, float)) and not isinstance(value, bool) and float(value).is_integer():
        return int(value)
    if hint in (bool, str) and isinstance(value, hint):
        return value
    wrong()


def is_switch(hint) -> bool:
    """Whether an option of this type may stand without a value: `--bf16`."""
    return bool in choices(hint)


def read_option(text: str, hint, name: str):
    """What was typed for an option, before conversion: YAML, but for types that take text.

    Text stays as typed where nothing else fits: `--run_name 2024`, `--resume_from_checkpoint @x`. A data source is a
    path as typed too (`--train "photos #1"`), unless it is a list or a mapping with a key that sources have.

    Args:
        text: as typed.
        hint: the type that is declared.
        name: the option, for errors.

    Raises:
        RecipeError: for text that is not YAML and can't be taken as typed.
    """
    kinds = choices(hint)
    keys = _source_keys(kinds)
    if text in ("null", "~"):
        return None
    if kinds == [str]:
        return text
    try:
        value, _ = read_yaml(text, name)
    except RecipeError:
        if keys or (str in kinds and text[:1] not in ("[", "{")):
            return text
        raise
    if keys:
        is_source = isinstance(value, list) or (isinstance(value, dict) and not keys.isdisjoint(value))
        return value if is_source else text
    return text if str in kinds and _choice(value, hint) is None else value


def _source_keys(kinds: list) -> set[str]:
    """The keys of a data source, where a source or a list of them is declared."""
    for kind in kinds:
        item = (typing.get_args(kind) or [None])[0] if typing.get_origin(kind) is list else kind
        if dataclasses.is_dataclass(item):
            return set(typing.get_type_hints(item))
    return set()


def describe(hint) -> str:
    """A type in a user's words: "a number or null"."""
    members = [_describe_one(choice) for choice in choices(hint)]
    return " or ".join(members + (["null"] if type(None) in typing.get_args(hint) else []))


def _describe_one(hint) -> str:
    names = {bool: "true or false", int: "a whole number", float: "a number", str: "text (quote it)", dict: "a mapping"}
    origin = typing.get_origin(hint) or hint
    if origin is list:
        items = typing.get_args(hint)
        return f"a list, each item {describe(items[0])}" if items else "a list"
    if dataclasses.is_dataclass(hint):
        return "a path or a mapping"
    if origin is typing.Literal:
        return " or ".join(map(repr, typing.get_args(hint)))
    return names.get(origin, str(hint))


def choices(hint) -> list:
    """The type itself, or the members of a union that YAML can write: not None, no enums where plain text does too."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    members = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    return [choice for choice in members if not (isinstance(choice, type) and issubclass(choice, enum.Enum))]


def _choice(value, hint):
    """The member of a union that fits the value's kind, or None."""
    members = choices(hint)
    if len(members) == 1:
        return members[0]
    for choice in members:
        base = typing.get_origin(choice) or choice
        if base is typing.Literal:
            if value in typing.get_args(choice):
                return choice
        elif isinstance(value, base):
            return choice
    return None
