"""Embeddings on disk: a folder that `retrieval.embed` writes and searches read.

- `manifest.json`: what they are of: model, options, hashes of ids and contents, counts; `complete` when all is there.
- `vectors-00000.npy`, …: (n, D) float16, unit norm, each written aside and renamed: present means whole. Plain .npy, so
  that `np.load(path, mmap_mode="r")` reads them anywhere. Equal contents have one vector.
- `vectors-00000.json`, …: rows of that shard that could not be read, and why.
- `ids.json`: the N ids. `rows.npy`: (N,) int64, the vector of each, -1 for a row that was skipped.
- `skipped.json`: id → why, of rows that have no vector.
- `codes.npy`, `codes.safetensors`: the vectors in int8, once they have been searched: see `retrieval.quantised`.
"""

import json
import os
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

import numpy as np

from universal_gcl.retrieval.fingerprint import describe_model, same_model

FORMAT = 2


class Store:
    """
    The embeddings of N rows, read as needed.

    Attributes:
        folder, manifest: where, and what `manifest.json` holds.
        vectors: (M, D) `Vectors`, float16; of different contents, in the order of the smallest id that has each.
        rows: (N,) int64, the vector of each row, -1 where it has none.

    Raises:
        FileNotFoundError: the folder holds no store.
        ValueError: the store is not complete, damaged, or of another version.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if self.manifest is None:
            raise FileNotFoundError(f"{self.folder} holds no embeddings: there is no manifest.json")
        if not self.manifest["complete"]:
            raise ValueError(f"the embeddings in {self.folder} are not complete: embed the same rows again to finish")
        self.rows = read_array(self.folder / "rows.npy")
        self.vectors = Vectors(shard_paths(self.folder, len(self.manifest["shards"])), self.manifest["dim"])

    def __len__(self):
        return len(self.rows)

    @cached_property
    def ids(self) -> list[str]:
        """Of all rows, in their order."""
        return _read_json(self.folder / "ids.json")

    @cached_property
    def id_ranks(self) -> np.ndarray:
        """(N,) int64: the place of each row's id among all ids, in the order of strings."""
        ranks = np.empty(len(self), dtype=np.int64)
        ranks[sorted(range(len(self)), key=self.ids.__getitem__)] = np.arange(len(self))
        return ranks

    @cached_property
    def skipped(self) -> dict[str, str]:
        """Id → why, of the rows without a vector."""
        return _read_json(self.folder / "skipped.json")

    def embeddings(self, indices=None) -> np.ndarray:
        """(n, D) float32 embeddings of rows by their number; of all by default.

        Raises:
            ValueError: one of them was skipped; it is named.
        """
        wanted = self.rows if indices is None else self.rows[indices]
        if (wanted < 0).any():
            place = int(np.flatnonzero(wanted < 0)[0])
            name = self.ids[place if indices is None else int(np.asarray(indices)[place])]
            raise ValueError(f"{self.folder}: row {name!r} has no embedding: {self.skipped[name]}")
        return self.vectors[wanted].astype(np.float32)

    def check_model(self, other: "Store") -> None:
        """
        Raises:
            ValueError: the other store is of another model, or was embedded with other options.
        """
        mine, theirs = self.manifest["model"], other.manifest["model"]
        if not same_model(mine, theirs):
            raise ValueError(
                f"{self.folder} and {other.folder} hold embeddings of different models, which can't be compared: "
                f"{describe_model(mine)} and {describe_model(theirs)}. Embed both with one"
            )
        for name in ("dim", "options"):
            if self.manifest[name] != other.manifest[name]:
                raise ValueError(
                    f"{self.folder} and {other.folder} were embedded with different {name}: {self.manifest[name]} and "
                    f"{other.manifest[name]}"
                )


class Vectors:
    """An (M, D) float16 array in several .npy files, sliced like one: `vectors[10:20]`, `vectors[[3, 1]]`. What is read
    is copied; no file stays open."""

    dtype = np.dtype(np.float16)

    def __init__(self, paths: list[Path], dim: int):
        self.paths = paths
        # of the header alone
        self.ends = np.cumsum([read_array(path, mmap_mode="r").shape[0] for path in paths], dtype=np.int64)
        self.shape = (int(self.ends[-1]) if paths else 0, dim)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index) -> np.ndarray:
        if isinstance(index, slice):
            index = np.arange(*index.indices(len(self)))
        index = np.asarray(index)
        if index.size and (index.min() < -len(self) or index.max() >= len(self)):
            raise IndexError(f"vectors {index.min()} to {index.max()} are not all among {len(self)}")
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
    return [folder / f"vectors-{number:05}.npy" for number in range(count)]


def read_manifest(folder: Path) -> dict | None:
    """The manifest of a store, or None without one.

    Raises:
        ValueError: it is cut off, of another version of this library or of something else.
    """
    try:
        manifest = _read_json(folder / "manifest.json")
    except FileNotFoundError:
        return None
    if not isinstance(manifest, dict) or "format" not in manifest:
        raise ValueError(f"{folder}: its manifest.json is not one of embeddings; choose another folder")
    if manifest["format"] != FORMAT:
        raise ValueError(f"{folder} is of format {manifest['format']}, this version reads {FORMAT}: embed anew")
    return manifest


def read_array(path: Path, **options) -> np.ndarray:
    """`np.load`, which says nothing of the file.

    Raises:
        ValueError: the file is cut off, as a copy may be, or is no .npy.
    """
    try:
        return np.load(path, **options)
    except (ValueError, EOFError) as error:
        raise _damaged(path, error) from error


def _read_json(path: Path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error


def _damaged(path: Path, error: Exception) -> ValueError:
    return ValueError(
        f"{path} is damaged ({error}): copy the embeddings again, or delete their folder and embed the same rows again"
    )


def write_whole(path: Path, write: Callable) -> None:
    """`write(file)` to a file that appears whole or not at all, and stays after a power failure."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")  # others may write the same
    try:
        with partial.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def write_json(path: Path, value) -> None:
    text = json.dumps(value, indent=1, allow_nan=False) + "\n"
    write_whole(path, lambda file: file.write(text.encode()))
