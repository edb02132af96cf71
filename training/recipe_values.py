"""The values of a recipe: YAML with line numbers, and conversion to the declared types of the arguments."""

import dataclasses
import enum
import re
import types
import typing
from collections.abc import Callable
from typing import Any, NoReturn

import yaml


class RecipeError(ValueError):
    """A recipe or an option that can't be used. The message names it and says what to do."""


class _Loader(yaml.SafeLoader):
    """Reads plain scalars as YAML 1.2 does: `1e-5` is a number; `no` and dates are text (as in `eval_strategy: no`)."""


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else."""


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


def write_yaml(value: Any) -> str:
    """Plain data as YAML, which `read_yaml` and any reader of YAML 1.1 read back to the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def read_yaml(text: str, name: str) -> tuple[object, dict[tuple, int]]:
    """Parse one YAML document.

    Args:
        text: the document.
        name: what to call it in errors.

    Returns:
        The value, and the line (from 1) of every key as `{("training", "seed"): 7, ("data", "train", 0, "path"): 3}`.

    Raises:
        RecipeError: the text is not YAML or repeats a key. The message has name and line.
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
                raise RecipeError(f"{name}, line {line}: a key must be one word, not a list or a mapping")
            if key.value in seen:
                raise RecipeError(f"{name}, line {line}: key {key.value!r} is already set in line {seen[key.value]}")
            seen[key.value] = line
            lines[(*keys, key.value)] = line
            _record_lines(value, (*keys, key.value), lines, name)


def convert(value: Any, hint: Any, keys: tuple, where: Callable[[tuple], str], check_keys: Callable[..., None]) -> Any:
    """Convert a value to plain data of the declared type.

    Three shorthands are accepted: a text that is a number for a number, a single item for a list, and a path for a data
    source. A dataclass becomes a dict of the keys that were set.

    Args:
        value: as read from YAML.
        hint: the declared type, as `typing.get_type_hints` returns it.
        keys: path of keys to the value, for messages.
        where: `where(keys)` returns file and line.
        check_keys: `check_keys(cls, names, keys, where)` raises for names that the dataclass doesn't have.

    Raises:
        RecipeError: the value doesn't fit. The message names the place, the key and the expected type.
    """

    def wrong() -> NoReturn:
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


def is_switch(hint: Any) -> bool:
    """Whether an option of this type needs no value: `--bf16`."""
    return bool in choices(hint)


def read_option(text: str, hint: Any, name: str) -> Any:
    """Read the value of an option, before conversion.

    The value is YAML, with two exceptions. If only text fits the declared type, it stays as typed: `--run_name 2024`,
    `--resume_from_checkpoint @x`. A data source is a path as typed (`--train "photos #1"`), unless it is a list or a
    mapping with a key that sources have.

    Args:
        text: as typed.
        hint: the declared type.
        name: the option, for errors.

    Raises:
        RecipeError: the text is not YAML and can't be taken as typed.
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
    """The keys of a data source, if a source or a list of sources is declared; otherwise none."""
    for kind in kinds:
        item = (typing.get_args(kind) or [None])[0] if typing.get_origin(kind) is list else kind
        if dataclasses.is_dataclass(item):
            return set(typing.get_type_hints(item))
    return set()


def describe(hint: Any) -> str:
    """A type in words: "a number or null"."""
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


def choices(hint: Any) -> list[Any]:
    """The members of a union without None and without enumerations, which YAML writes as text; or the type itself."""
    if typing.get_origin(hint) not in (typing.Union, types.UnionType):
        return [hint]
    members = [choice for choice in typing.get_args(hint) if choice is not type(None)]
    return [choice for choice in members if not (isinstance(choice, type) and issubclass(choice, enum.Enum))]


def _choice(value, hint):
    """The member of a union that fits the kind of the value, or None."""
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
