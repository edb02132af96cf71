"""MMEB's sets as published on the Hub: SET/test-*.parquet, and images in a folder or in images.zip, which stays packed.

Version 1 (`TIGER-Lab/MMEB-eval`) has the columns `qry_text`, `qry_img_path`, `tgt_text` and `tgt_img_path`, with the
instruction inside the texts. Version 2 (`ziyjiang/MMEB_Test_Instruct`) has instructions in columns of their own,
`qry_inst` and `tgt_inst`; its images are those of `TIGER-Lab/MMEB-V2`, image-tasks/mmeb_v1.tar.gz. The meaning of the
columns follows VLM2Vec's evaluation (at 6e1e1d4, and its branch v1):
- The candidates of a query are pairs of `tgt_text` and `tgt_img_path`; the first is the right one. "" instead of the
  list of texts means a list of ""; "" as a path means no image.
- `<|image_1|>` marks where a vision-language model inserts the image. It is removed, with white space at both ends.
- Each distinct candidate is embedded once for the whole set. In version 1, candidates are distinct by text and path. In
  version 2 they are distinct by text in sets whose candidates are texts; by path in its text-to-image sets (if an image
  has several texts, the first is embedded for all); and by path and text, without outer quotes, in the others.
- Version 2 joins instruction and text with a space. Text candidates have no instruction. Images with a text get the
  instruction and the text, images without a text get the instruction only.
"""

import posixpath
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import huggingface_hub
import numpy as np
import pyarrow
import pyarrow.parquet

from universal_gcl.evaluation.mmeb.sets import HUB_IDS, TEXT_CANDIDATES, TEXT_TO_IMAGE
from universal_gcl.sources.checks import DataError
from universal_gcl.sources.paths import path_inside
from universal_gcl.sources.tables import check_parts

IMAGE_TOKEN = "<|image_1|>"
_ARCHIVE = "images.zip"
# folders below the root into which users and the upstream scripts unpack the archives
_FOLDERS = ("", "images", "eval_images", "image-tasks", "MMEB", "image-tasks/MMEB")
_PROBED = 100  # paths to look for when the folder of the images is searched, since some images may be missing
_COLUMNS = ("qry_text", "qry_img_path", "tgt_text", "tgt_img_path")


class Item(NamedTuple):
    """A query or a candidate; "" stands for a missing part."""

    instruction: str
    text: str
    path: str

    @property
    def kind(self) -> str:
        """Its modality, `"i"`, `"t"` or `"it"`: an image with an instruction is fused."""
        return ("i" if self.path else "") + ("t" if self.text or self.instruction else "")


@dataclass
class MMEBSet:
    """
    One set: `Q` queries over `M` distinct candidates.

    Attributes:
        queries: Q items.
        candidates: M items, in the order of their first appearance.
        own: for each query the (n,) int64 places of its candidates in `candidates`; the first is the right one.
        first_seen: M pairs: the query in which a candidate first appears, and its place among that query's candidates.
        images: the images of the whole set; None if it has no images.
    """

    name: str
    queries: list[Item]
    candidates: list[Item]
    own: list[np.ndarray]
    first_seen: list[tuple[int, int]]
    images: "Images | None"

    def query_rows(self) -> "Rows":
        """The rows to embed. An id is the number of the query and the path of its image."""
        return Rows([f"{n} {item.path}".rstrip() for n, item in enumerate(self.queries)], self.queries, self.images)

    def candidate_rows(self) -> "Rows":
        """The rows to embed. An id is QUERY.PLACE from `first_seen` and the path of the image."""
        ids = [f"{q}.{place} {item.path}".rstrip() for (q, place), item in zip(self.first_seen, self.candidates)]
        return Rows(ids, self.candidates, self.images)


class Rows(Sequence):
    """`(id, row)` pairs for `retrieval.embed.embed_rows`, made when they are needed."""

    def __init__(self, ids: list[str], items: list[Item], images: "Images | None"):
        self.ids, self.items, self.images = ids, items, images

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> tuple[str, dict]:  # type: ignore[override]  # no slices
        item = self.items[number]
        row: dict = {"instruction": item.instruction or None, "text": item.text or None}
        if self.images is not None and item.path:
            row["image"] = self.images[item.path]
        return self.ids[number], row


class Images:
    """
    Images by their path in the data.

    Args:
        root: a folder, or a .zip file.

    Attributes:
        below: the folder below the root to which paths are relative.
    """

    def __init__(self, root: Path):
        self.root, self.below = root, ""
        self.archive = zipfile.ZipFile(root) if root.is_file() else None
        self.names = set() if self.archive is None else set(self.archive.namelist())

    def __contains__(self, path: str) -> bool:
        name = posixpath.join(self.below, path)
        return (self.root / name).exists() if self.archive is None else name in self.names

    def __getitem__(self, path: str) -> Path | bytes:
        """The path of the file, or its bytes from the archive. If the archive lacks it, the path where it should be."""
        name = posixpath.join(self.below, path)
        if self.archive is None:
            return self.root / name
        if name not in self.names:
            return Path(f"{self.root}:{name}")
        try:
            return self.archive.read(name)
        except (zipfile.BadZipFile, zlib.error, EOFError):
            return b""  # not an image: treated like any other damaged one

    @classmethod
    def find(cls, paths: Sequence[str], root: Path, image_root: Path | None) -> "Images":
        """
        The first place that holds one of these paths: in `image_root` if it is given, else in images.zip in the root
        and in the folders into which upstream's scripts unpack it.

        Raises:
            DataError: no place holds one of them, or an archive is cut off.
        """
        bases = [root / _ARCHIVE, root] if image_root is None else [image_root]
        for base in filter(Path.exists, bases):
            try:
                images = cls(base)
            except zipfile.BadZipFile as error:
                raise DataError(f"{base}: not a readable zip archive ({error}); is it cut off?") from error
            for images.below in _FOLDERS:
                if any(path in images for path in paths):
                    return images
        raise DataError(
            f"the images, such as {paths[0]}, are in none of {', '.join(map(str, bases))}: put {_ARCHIVE} of "
            f"{HUB_IDS[1]} there, unpack it there, or name the folder of the images with --image-root"
        )


def download_mmeb(hub: str, sets: Sequence[str], *, revision: str | None, images: bool) -> Path:
    """Download the files of these sets into the Hub's cache.

    Args:
        hub: id of the data set.
        revision: branch, tag or commit.
        images: download images.zip too.

    Returns:
        a root for `read_set`.

    Raises:
        DataError: the repository can't be downloaded.
    """
    wanted = [f"{name}/*" for name in sets] + ([_ARCHIVE] if images else [])
    try:
        return Path(
            huggingface_hub.snapshot_download(hub, repo_type="dataset", revision=revision, allow_patterns=wanted)
        )
    except (OSError, ValueError) as error:  # errors of the Hub are OSErrors
        raise DataError(
            f"{hub} can't be downloaded from the Hub as a data set (revision {revision}): {error}"
        ) from error


def read_set(
    root: str | Path,
    name: str,
    *,
    version: int = 1,
    image_root: str | Path | None = None,
    instructions: bool = True,
    limit: int | None = None,
) -> MMEBSet:
    """
    Read one set. Its images are read when they are embedded.

    Args:
        root: folder with a folder for each set, as on the Hub.
        version: 1 or 2.
        image_root: folder or .zip file to which image paths are relative; by default it is looked for in the root.
        instructions: False leaves them out (version 2 only).
        limit: only this many first queries.

    Raises:
        DataError: (a ValueError) the set or a part of it is missing; a file is cut off, belongs to the other version or
            has no rows; a query has no candidates, or another number of texts than of paths; a path leaves the folder
            of the images; or the images are not found. The message names file and row. Candidates with neither text nor
            image, and missing or damaged images, are only found when they are embedded.
        ValueError: the version is unknown, `instructions` is False with version 1, or the limit is below 1.
    """
    if version not in HUB_IDS:
        raise ValueError(f"MMEB has versions 1 and 2, not {version}")
    if version == 1 and not instructions:
        raise ValueError(
            "in version 1 of MMEB the instructions are part of the texts: leaving them out needs version 2"
        )
    if limit is not None and limit < 1:
        raise ValueError(f"the limit of queries is {limit}: use 1 or more, or no limit")
    root = Path(root)
    base = root if image_root is None else Path(image_root)  # for error messages about paths
    read = _version_1 if version == 1 else _version_2(name, instructions)
    found = MMEBSet(name, [], [], [], [], None)
    places: dict[tuple, int] = {}
    for place, row in _table_rows(root, name, version):
        if len(found.queries) == limit:
            break
        query, keyed = read(row, place)
        if not keyed:
            raise DataError(f"{place}: the query has no candidates")
        number, own = len(found.queries), []
        if query.path:
            path_inside(base, query.path, place)
        for n, (key, item) in enumerate(keyed):
            if key not in places:
                if item.path:
                    path_inside(base, item.path, place)
                places[key] = len(found.candidates)
                found.candidates.append(item)
                found.first_seen.append((number, n))
            own.append(places[key])
        found.queries.append(query)
        found.own.append(np.array(own))
    if not found.queries:
        raise DataError(f"{root / name} has no rows")
    paths = [item.path for item in (*found.queries, *found.candidates) if item.path]
    if paths:
        found.images = Images.find(paths[:_PROBED], root, None if image_root is None else Path(image_root))
    return found


def _table_rows(root: Path, name: str, version: int) -> Iterator[tuple[str, dict]]:
    """The rows of a set, each with its place for error messages. They are read in small batches, because a row may have
    many texts."""
    for path in checked_files(root, name, version):
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                number = 0
                for batch in file.iter_batches(batch_size=32, columns=_columns(name, version)):
                    for row in batch.to_pylist():
                        yield f"{path}, row {number}", row
                        number += 1
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error


def checked_files(root: Path, name: str, version: int) -> list[Path]:
    """The parquet files of a set. Only their schemas are read.

    Raises:
        DataError: a file is missing, cut off, or lacks columns of this version.
    """
    parts = sorted((root / name).glob("test-*.parquet"))
    if not parts:
        raise DataError(f"{root} has no set {name}: {name}/test-*.parquet is missing")
    check_parts(parts)
    for path in parts:
        try:
            names = pyarrow.parquet.read_schema(path).names
        except (pyarrow.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
        _check_columns(path, names, _columns(name, version), version)
    return parts


def _columns(name: str, version: int) -> list[str]:
    if version == 1:
        return list(_COLUMNS)
    return ["qry_inst", *_COLUMNS[:3], *(() if name in TEXT_CANDIDATES else ("tgt_inst", "tgt_img_path"))]


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"{path}: not a readable parquet file ({error}); is it cut off?")


def _check_columns(path: Path, names: Sequence[str], columns: Sequence[str], version: int) -> None:
    other = "qry_inst" in names
    if other != (version == 2):
        raise DataError(f"{path} is of version {2 if other else 1} of MMEB: use --version {2 if other else 1}")
    missing = [name for name in columns if name not in names]
    if missing:
        raise DataError(f"{path} has no column {', '.join(missing)}, only {', '.join(names)}")


def _version_1(row: dict, place: str) -> tuple[Item, list[tuple[tuple, Item]]]:
    """The query, and for each candidate its key (equal for equal candidates) and the item."""
    query = Item("", _text(row, "qry_text", place), _string(row, "qry_img_path", place))
    texts, paths = _matched(_list(row, "tgt_text", place), _list(row, "tgt_img_path", place), place)
    items = [Item("", _cleaned(text), path) for text, path in zip(texts, paths)]
    return query, [(item, item) for item in items]


def _version_2(name: str, instructions: bool) -> Callable[[dict, str], tuple[Item, list[tuple[tuple, Item]]]]:
    """The same for a set of version 2."""

    def read(row: dict, place: str) -> tuple[Item, list[tuple[tuple, Item]]]:
        instruction = _text(row, "qry_inst", place) if instructions else ""
        path = "" if name in TEXT_TO_IMAGE else _string(row, "qry_img_path", place)
        query = Item(instruction, _text(row, "qry_text", place), path)
        texts = _list(row, "tgt_text", place)
        if name in TEXT_CANDIDATES:
            return query, [((text,), Item("", text.strip(), "")) for text in texts]
        instruction = _text(row, "tgt_inst", place) if instructions else ""
        texts, paths = _matched(texts, _list(row, "tgt_img_path", place), place)
        with_text = bool(texts) and bool(texts[0].strip())
        items = [Item(instruction, _cleaned(text) if with_text else "", path) for text, path in zip(texts, paths)]
        if name in TEXT_TO_IMAGE:
            return query, [((path,), item) for path, item in zip(paths, items)]
        return query, [((path, text.strip('"')), item) for text, path, item in zip(texts, paths, items)]

    return read


def _matched(texts: list[str], paths: list[str], place: str) -> tuple[list[str], list[str]]:
    """As many texts as paths: a single "" on one side stands for as many as the other side has."""
    if texts in ([], [""]) and paths:
        texts = [""] * len(paths)
    elif paths in ([], [""]):
        paths = [""] * len(texts)
    if len(texts) != len(paths):
        raise DataError(f"{place}: tgt_text has {len(texts)} candidates and tgt_img_path {len(paths)}")
    return texts, paths


def _list(row: dict, column: str, place: str) -> list[str]:
    value = row[column]
    if value is None or value == "":
        return []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        raise DataError(f'{place}: {column} must be a list of strings, or "", got {value!r:.80}')
    return value


def _string(row: dict, column: str, place: str) -> str:
    value = "" if row[column] is None else row[column]
    if not isinstance(value, str):
        raise DataError(f"{place}: {column} must be a string, got {value!r:.80}")
    return value


def _text(row: dict, column: str, place: str) -> str:
    return _cleaned(_string(row, column, place))


def _cleaned(text: str) -> str:
    return text.replace(IMAGE_TOKEN, "").strip()
