"""A store: a folder with embeddings, which `retrieval.embed` writes and `retrieval.run` searches. Its files are:

- `manifest.json`: the model, the options, hashes of the ids and contents, counts, and whether the store is `complete`.
- `vectors-00000.npy`, …: shards of (n, D) float16 vectors with unit norm. A shard is written under another name and
  then renamed, so a shard that exists is whole. `np.load(path, mmap_mode="r")` reads it. Rows with equal contents share
  one vector.
- `vectors-00000.json`, …: the rows of each shard that could not be read, and why.
- `ids.json`: the N ids.
- `rows.npy`: (N,) int64, the index of each row's vector, or -1 for a row that was skipped.
- `skipped.json`: id → reason, for the rows without a vector.
- `codes.npy`, `codes.safetensors`: the vectors in int8, written by the first search (see `retrieval.quantised`).
"""

import json
import os
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Literal

import numpy as np

from universal_gcl.retrieval.fingerprint import describe_model, same_model

FORMAT = 2


class Store:
    """
    The embeddings of N rows. They are read from disk when they are needed.

    Attributes:
        folder: the folder of the store.
        manifest: the content of `manifest.json`.
        vectors: (M, D) `Vectors` in float16, one for each different content. The contents are sorted by the smallest id
            of the rows that have them.
        rows: (N,) int64, the index of each row's vector, or -1 for a row without one.

    Raises:
        FileNotFoundError: the folder has no store.
        ValueError: the store is incomplete, damaged, or written by another version.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        manifest = read_manifest(self.folder)
        if manifest is None:
            raise FileNotFoundError(f"{self.folder} holds no embeddings: there is no manifest.json")
        self.manifest: dict = manifest
        if not self.manifest["complete"]:
            raise ValueError(f"the embeddings in {self.folder} are not complete: embed the same rows again to finish")
        self.rows = read_array(self.folder / "rows.npy")
        self.vectors = Vectors(shard_paths(self.folder, len(self.manifest["shards"])), self.manifest["dim"])

    def __len__(self) -> int:
        return len(self.rows)

    @cached_property
    def ids(self) -> list[str]:
        """The ids of all rows, in the order of the rows."""
        return _read_json(self.folder / "ids.json")

    @cached_property
    def id_ranks(self) -> np.ndarray:
        """(N,) int64: the rank of each row's id when all ids are sorted as strings."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[sorted(range(len(self)), key=self.ids.__getitem__)] = np.arange(len(self))
        return ranks

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Id → reason, for the rows without a vector."""
        return _read_json(self.folder / "skipped.json")

    def embeddings(self, indices: Sequence[int] | np.ndarray | None = None) -> np.ndarray:
        """(n, D) float32: the embeddings of the rows with these numbers. None stands for all rows.

        Raises:
            ValueError: one of the rows was skipped. The message names it.
        """
        wanted = self.rows if indices is None else self.rows[indices]
        if (wanted < 0).any():
            place = int(np.flatnonzero(wanted < 0)[0])
            name = self.ids[place if indices is None else int(np.asarray(indices)[place])]
            raise ValueError(f"{self.folder}: row {name!r} has no embedding: {self.skipped[name]}")
        return self.vectors[wanted].astype(np.float32)

    def check_model(self, other: "Store") -> None:
        """Check that the embeddings of this store can be compared with those of another.

        Raises:
            ValueError: the models or the options differ.
        """
        mine, theirs = self.manifest["model"], other.manifest["model"]
        if not same_model(mine, theirs):
            raise ValueError(
                f"{self.folder} and {other.folder} hold embeddings of different models, which can't be compared: "
                f"{describe_model(mine)} and {describe_model(theirs)}. Embed both with the same model"
            )
        for name in ("dim", "options"):
            if self.manifest[name] != other.manifest[name]:
                raise ValueError(
                    f"{self.folder} and {other.folder} were embedded with different {name}: {self.manifest[name]} and "
                    f"{other.manifest[name]}. Embed both with the same"
                )


class Vectors:
    """
    An (M, D) float16 array that lies in several .npy files.

    It can be indexed like one array, as `vectors[10:20]` or `vectors[[3, 1]]`. The result is a copy, and no file stays
    open.
    """

    dtype = np.dtype(np.float16)

    def __init__(self, paths: list[Path], dim: int) -> None:
        self.paths = paths
        # with mmap_mode, only the header of the file is read
        self.ends = np.cumsum([read_array(path, mmap_mode="r").shape[0] for path in paths], dtype=np.int64)
        self.shape = (int(self.ends[-1]) if paths else 0, dim)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int | slice | Sequence[int] | np.ndarray) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        index = np.asarray(index)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(
                f"indices from {index.min()} to {index.max()} are out of range: there are {len(self)} vectors"
            )
        index = index % max(1, len(self))
        result = np.empty((*index.shape, self.shape[1]), dtype=self.dtype)
        shards = np.searchsorted(self.ends, index, side="right")
        for shard in np.unique(shards):
            here = shards == shard
            file = read_array(self.paths[shard], mmap_mode="r")
            places = index[here] - (self.ends[shard] - len(file))
            first = int(places[0])
            whole = places[-1] - first + 1 == len(places) and (np.diff(places) == 1).all()
            result[here] = file[first : first + len(places)] if whole else file[places]
        return result


def shard_paths(folder: Path, count: int) -> list[Path]:
    """The files of the first `count` shards."""
    return [folder / f"vectors-{number:05}.npy" for number in range(count)]


def read_manifest(folder: Path) -> dict | None:
    """Read the manifest of a store. Returns None if there is none.

    Raises:
        ValueError: the manifest is damaged, was written by another version of this library, or is not of a store.
    """
    try:
        manifest = _read_json(folder / "manifest.json")
    except FileNotFoundError:
        return None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{folder}: its manifest.json is not one of embeddings; choose another folder")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder} has format {manifest['format']}, but this version reads {FORMAT}: embed again")
    return manifest


def read_array(path: Path, *, mmap_mode: Literal["r"] | None = None) -> np.ndarray:
    """`np.load` with an error message that names the file.

    Raises:
        ValueError: the file is cut off, for example because a copy was interrupted, or it is not a .npy.
    """
    try:
        return np.load(path, mmap_mode=mmap_mode)
    except (ValueError, EOFError) as error:
        raise _damaged(path, error) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged ({error}): copy the embeddings again, or delete their folder and embed the same rows again"
    )


def write_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """
    Write a file that is either complete or absent, also after a kill or a power failure.

    Args:
        path: the file. An existing one is replaced.
        write: gets a binary file and writes the content to it.
    """
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # another process may write the same file
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, with `write_whole`."""
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
