"""What of the user's paths is published: the last part alone; where a file lies is the user's own business."""

import re
import shlex
from pathlib import Path


def shown_name(path: str) -> str:
    """A path or id as it is published: of an absolute path the name alone."""
    return Path(path).name if Path(path).is_absolute() else path


def shown_command(command: str) -> str:
    """A command line whose words are published so."""
    return shlex.join(map(shown_name, shlex.split(command)))


def absolute_paths(value) -> set[str]:
    """Absolute paths among the values of nested settings."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        return set().union(*map(absolute_paths, value))
    return {value} if isinstance(value, str) and Path(value).is_absolute() and Path(value).name else set()


def without_paths(text: str, paths: set[str]) -> str:
    """A text with the names of these paths in their places, also where they go on."""
    for path in sorted(paths, key=len, reverse=True):  # those inside others first
        text = re.sub(rf"(?<![\w./-]){re.escape(path)}(?![\w-])", lambda _, path=path: shown_name(path), text)
    return text
