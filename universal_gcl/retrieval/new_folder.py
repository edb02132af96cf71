"""A folder that a converter writes: it appears whole, or not at all, and nothing of the user's is touched."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def check_is_new(folder: Path) -> None:
    """Raises FileExistsError unless `folder` is absent or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not an empty folder: name another one, or remove it first.")


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Gives a folder to write into, whose files are `folder`'s once all went well; after an error nothing is left.

    An empty folder that exists is kept, as it may be a link, a mount or the one that the shell is in.
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
            partial.chmod(0o755)  # mkdtemp's folders are for their owner alone
            partial.rename(folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
