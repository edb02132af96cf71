"""Sources that list image files by their paths.

These are folders of images with a metadata file or with one .txt an image, and .csv, .jsonl and LLaVA-Pretrain's .json
files.
"""

import csv
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import datasets

from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MISSING,
    NO_CAPTION_FILE,
    DataError,
    SourceReport,
    UniqueIds,
    check_captions,
    find_column,
)
from universal_gcl.sources.paths import path_inside

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "image": datasets.Image(decode=False),
        "captions": datasets.List(datasets.Value("string")),
    }
)
METADATA_NAMES = ("metadata.csv", "metadata.jsonl")
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass
class ListRow:
    """
    One row of a list of images and captions, as it was read. None of the values has been checked yet.

    Attributes:
        place: file and line of the row, for error messages.
        id: the id, or None to use the path of the image.
        image: the path of the image.
        captions: one caption or a list of captions.
    """

    place: str
    id: object
    image: object
    captions: object


def metadata_file(folder: Path) -> Path | None:
    """The metadata file of a folder of images, or None if it has none.

    Raises:
        DataError: the folder has both a metadata.csv and a metadata.jsonl.
    """
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(
            f"{folder} has both {' and '.join(METADATA_NAMES)}; remove one, or give the path of one as the source"
        )
    return found[0] if found else None


def read_list(path: Path, source: SourceArguments) -> Iterator[ListRow]:
    """Read the rows of a .csv, .jsonl or .json file.

    Raises:
        DataError: the file can't be parsed, has no rows, or lacks a column. The message names file and line.
    """
    rows = {".csv": _csv_rows, ".jsonl": jsonl_rows, ".json": _json_rows}[path.suffix.lower()](path)
    columns = None
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with an image and captions, got a {type(row).__name__}")
        if columns is None:
            image = find_column(place, row, source.image_column, IMAGE_COLUMNS, "image_column")
            caption = "conversations"
            if source.caption_column is not None or caption not in row:
                caption = find_column(place, row, source.caption_column, CAPTION_COLUMNS, "caption_column")
            columns = (image, caption)
            if source.id_column is not None:
                find_column(place, row, source.id_column, (), "id_column")
        for column in columns:
            if column not in row:
                raise DataError(
                    f"{place}: there is no {column!r}, which the rows before have. Columns: {', '.join(row)}"
                )
        captions = row[columns[1]]
        if columns[1] == "conversations":
            captions = _first_answer(captions, place)
        yield ListRow(place, row.get(source.id_column or "id"), row[columns[0]], captions)
    if columns is None:
        raise DataError(f"{path} has no rows")


def read_sidecars(folder: Path, report: SourceReport) -> Iterator[ListRow]:
    """
    Find the images below `folder`, each with its captions in a `.txt` of the same name, one caption a line.

    Images without a `.txt` are skipped and counted in `report`. Hidden files and folders (`.name`) are ignored, and so
    is `__MACOSX`, which archives made on a Mac contain.

    Raises:
        DataError: the folder has no images, none of the images has a `.txt`, or a `.txt` is not UTF-8.
    """
    images = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(folder).parts)
    )
    if not any(image.with_suffix(".txt").is_file() for image in images):
        raise DataError(
            f"{folder} has {len(images)} images and no captions: add a {' or '.join(METADATA_NAMES)}, "
            "or next to each image a .txt of the same name"
        )
    for image in images:
        text = image.with_suffix(".txt")
        name = image.relative_to(folder).as_posix()
        if not text.is_file():
            report.skip(NO_CAPTION_FILE, name)
            continue
        captions = [line for line in "".join(text_lines(text)).splitlines() if line.strip()]
        yield ListRow(str(text), None, name, captions)


def pairs_from_list(
    rows: Iterable[ListRow], root: Path, source: SourceArguments, report: SourceReport, max_broken_share: float
) -> datasets.Dataset:
    """
    Check the rows and make a data set of pairs from them.

    Rows with the same image become one pair, which has the id of the first of them and the captions of all. Pairs whose
    image file is missing are skipped and counted in `report`.

    Args:
        root: the folder that image paths are relative to.

    Raises:
        DataError: see `sources.pairs.read_source`.
    """
    root = Path(os.path.abspath(root))
    pairs: dict[str, tuple[str, list[str]]] = {}
    ids = UniqueIds()
    for row in rows:
        captions = check_captions(row.captions, row.place)
        path = image_path(root, row.image, row.place)
        if path in pairs:
            pairs[path][1].extend(captions)
            continue
        if source.limit is not None and len(pairs) == source.limit:
            continue  # go on reading: later rows may have captions for the pairs that are in use
        pairs[path] = (ids.add(str(row.image) if row.id is None else row.id, row.place), captions)
    before = len(pairs) + sum(report.skipped.values())
    kept = {}
    for path, pair in pairs.items():
        if os.path.isfile(path):
            kept[path] = pair
        else:
            report.skip(MISSING, path)
    report.check_skipped(before, max_broken_share)
    report.pairs = len(kept)
    report.captions = sum(len(captions) for _, captions in kept.values())
    columns = {
        "id": [pair_id for pair_id, _ in kept.values()],
        "image": [{"bytes": None, "path": path} for path in kept],
        "captions": [captions for _, captions in kept.values()],
    }
    return datasets.Dataset.from_dict(columns, features=FEATURES)


def image_path(root: Path, image: object, place: str) -> str:
    """The path of an image or video as a path below `root`; see `sources.paths.path_inside`.

    Raises:
        DataError: `image` is not a path, or the path leaves the root.
    """
    if not isinstance(image, str) or not image.strip():
        raise DataError(f"{place}: the image is {image!r}, not a path; correct it, or set image_column")
    return str(path_inside(root, image, place, remedy="set image_root to a folder that holds all images"))


def text_lines(path: Path) -> Iterator[str]:
    """Read a UTF-8 file line by line. The lines keep their line ends. A byte order mark is removed.

    Raises:
        DataError: the file is not UTF-8. The message names file and line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:  # UTF-16 without a byte order mark can be valid UTF-8, but then it is full of NULs
                    raise DataError(f"{path}, line {number}: not UTF-8; save it as UTF-8")
                yield line
    except UnicodeDecodeError as error:
        # Python decodes in blocks, so that the line is unknown: read the file again to find it
        with path.open("rb") as file:
            number = next(number for number, line in enumerate(file, start=1) if not _is_utf8(line))
        raise DataError(f"{path}, line {number}: not UTF-8; save it as UTF-8") from error


def _is_utf8(line: bytes) -> bool:
    try:
        return "\0" not in line.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _csv_rows(path: Path) -> Iterator[tuple[str, dict]]:
    reader = csv.DictReader(text_lines(path), strict=True)
    try:
        header = [name for name in reader.fieldnames or () if name]
        for name in header:
            if header.count(name) > 1:
                raise DataError(
                    f"{path}, line 1: the header has the column {name!r} twice; rename or remove one of them"
                )
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(
                    f"{place}: the row has more fields than the header; put captions that contain commas in quotes"
                )
            yield place, row
    except csv.Error as error:
        line = reader.reader.line_num  # DictReader's own line_num is not updated when a row fails
        raise DataError(f"{path}, line {line}: not valid CSV ({error}); is the file cut off?") from error


def jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    """Read a .jsonl file. Yields the place (`FILE, line N`) and the value of each line that is not blank.

    Raises:
        DataError: a line is not UTF-8 or not JSON. The message names file and line.
    """
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parse_json(line, path, number)


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    entries = _parse_json("".join(text_lines(path)), path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of entries, as in LLaVA-Pretrain, got a {type(entries).__name__}")
    for number, entry in enumerate(entries):
        yield f"{path}, entry {number}", entry


def _parse_json(text: str, path: Path, line: int | None = None) -> object:
    """Parse JSON from line `line` of a file, or from the whole file if it is None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {line or error.lineno}: not valid JSON ({error.msg}); is the file cut off?"
        ) from error
    except RecursionError as error:
        raise DataError(f"{path}, line {line or 1}: the JSON is nested too deeply; correct the row") from error
    except ValueError as error:  # a number with thousands of digits
        raise DataError(f"{path}, line {line or 1}: the JSON can't be read ({error}); correct the row") from error


def _first_answer(conversation: object, place: str) -> object:
    """The caption in LLaVA's chat format: the first turn from `gpt`. It has not been checked yet."""
    turns = conversation if isinstance(conversation, list) else []
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") == "gpt":
            return turn.get("value")
    raise DataError(
        f"{place}: conversations has no turn from gpt, which would be the caption; correct the entry, "
        "or set caption_column"
    )
