"""The check that a path named in a data set stays inside the folder that it is relative to."""

import os
import re
from pathlib import Path

from universal_gcl.sources.checks import DataError, check_encodable

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+://")
_DRIVE = re.compile(r"[A-Za-z]:[\\/]")


def path_inside(
    root: Path, name: str, place: str, *, remedy: str = "correct the path: paths are relative to that folder"
) -> Path:
    r"""
    Join a path from a data set to its root folder, and refuse a path that leaves the folder.

    The paths are compared as text: no link is followed, so a link inside the root may lead elsewhere. An absolute path
    is accepted if it lies inside the root. On Linux and macOS a backslash is a legal character in the name of a file,
    and on Windows it separates folders. The name is read the second way unless a file exists under the first.

    Args:
        root: the folder. It need not exist.
        name: the path in the data set.
        place: file and row of the path, for the error message.
        remedy: what the user can do about a path outside the root, for the error message.

    Returns:
        `root` joined with the path below it; the part below has no `..` in it.

    Raises:
        DataError: the path leaves the root (by `..`, as an absolute path, or with a drive letter such as `C:\`), is an
            address (`http://…`), or has characters that no UTF-8 file name can have.
    """
    if _ADDRESS.match(name):
        raise DataError(f"{place}: {name} is an address; download the file into {root} and give its path there")
    check_encodable(name, "path", place)
    base = os.path.abspath(root)
    path = os.path.normpath(os.path.join(base, name))
    if ("\\" in name or _DRIVE.match(name)) and not os.path.isfile(path):
        path = os.path.normpath(os.path.join(base, name.replace("\\", "/")))
        if _DRIVE.match(name):
            path = name
    try:
        return root / Path(path).relative_to(base)
    except ValueError:
        raise DataError(f"{place}: {name} lies outside {root}; {remedy}") from None
