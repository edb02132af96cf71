"""Writes a new folder that is either complete or absent. Existing files are never touched."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_is_new(folder: Path) -> None:
    """Raise FileExistsError unless `folder` does not exist or is an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: choose another one, or remove it first.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """
    A context manager that gives a temporary folder to write into.

    After the block, its files are moved to `folder`. After an error, they are deleted. An empty `folder` that exists is
    not replaced, because it may be a link, a mount or the working directory of a shell.
    """
    exists = folder.exists()
    beside = folder if exists else folder.parent
    beside.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".partial", dir=beside))
    try:
        yield partial
        if exists:
            for path in partial.iterdir():
                path.rename(folder / path.name)
        else:
            partial.chmod(0o755)  # only the owner can read a folder made by mkdtemp
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
