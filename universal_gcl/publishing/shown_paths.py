"""How the user's paths are published: only their last part, since the folders of a user's machine are private."""

import re
import shlex
from pathlib import Path
from typing import Any


def shown_name(path: str) -> str:
    """A path or id as it is published: an absolute path is cut to its last part."""
    return Path(path).name if Path(path).is_absolute() else path


def shown_command(command: str) -> str:
    """A command line with each word as `shown_name` publishes it."""
    return shlex.join(map(shown_name, shlex.split(command)))


def absolute_paths(value: Any) -> set[str]:
    """All absolute paths among the values of nested settings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(absolute_paths, value))
    return {value} if isinstance(value, str) and Path(value).is_absolute() and Path(value).name else set()


def without_paths(text: str, paths: set[str]) -> str:
    """The text with each of these paths cut to its last part, also where it is the start of a longer path."""
    for path in sorted(paths, key=len, reverse=True):  # paths inside others first
        name = shown_name(path).replace("\\", r"\\")  # in a replacement, a backslash is special
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", name, text)
    return text
