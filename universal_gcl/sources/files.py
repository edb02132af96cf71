"""Sources that name image files: folders with metadata or sidecar texts, .csv, .jsonl, LLaVA-Pretrain's .json."""

import csv
import json
import os
from collections.abc import Callable, Iterable, Iterator
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
class Listed:
    """One row of a list: where it stands, its id (None: the image's path), image path and captions as read."""

    place: str
    id: object
    image: object
    captions: object


def metadata_file(folder: Path) -> Path | None:
    """The metadata file of an image folder, or None.

    Raises:
        DataError: for a folder with both.
    """
    found = [folder / name for name in METADATA_NAMES if (folder / name).is_file()]
    if len(found) > 1:
        raise DataError(f"{folder} has both {' and '.join(METADATA_NAMES)}; remove one or give its path as the source")
    return found[0] if found else None


def read_list(path: Path, source: SourceArguments) -> Iterator[Listed]:
    """Rows of a .csv, .jsonl or .json file.

    Raises:
        DataError: with file and line for text that can't be parsed and for missing columns.
    """
    rows = {".csv": _csv_rows, ".jsonl": jsonl_rows, ".json": _json_rows}[path.suffix.lower()](path)
    columns = None
    for place, row in rows:
        if not isinstance(row, dict):
            raise DataError(f"{place}: expected an object with an image and captions, got {type(row).__name__}")
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
                raise DataError(f"{place}: no {column!r}, which the rows before have; columns: {', '.join(row)}")
        captions = row[columns[1]]
        if columns[1] == "conversations":
            captions = _answer(captions, place)
        yield Listed(place, row.get(source.id_column or "id"), row[columns[0]], captions)
    if columns is None:
        raise DataError(f"{path} has no rows")


def read_sidecars(folder: Path, report: SourceReport) -> Iterator[Listed]:
    """Images below `folder` with the captions of the `.txt` of the same name, one a line. Images without are skipped.

    Hidden files and folders (`.name`) and `__MACOSX`, which archives made on a Mac bring, are not looked at.

    Raises:
        DataError: for a folder without images, or with images but no `.txt` at all, and for text that is not UTF-8.
    """
    images = sorted(
        file
        for file in folder.rglob("*")
        if file.suffix.lower() in IMAGE_SUFFIXES
        and not any(part.startswith(".") or part == "__MACOSX" for part in file.relative_to(folder).parts)
    )
    if not any(image.with_suffix(".txt").is_file() for image in images):
        raise DataError(
            f"{folder} has {len(images)} images and no captions: expected {', '.join(METADATA_NAMES)}, "
            "or a .txt of the same name beside each image"
        )
    for image in images:
        text = image.with_suffix(".txt")
        name = image.relative_to(folder).as_posix()
        if not text.is_file():
            report.skip(NO_CAPTION_FILE, name)
            continue
        captions = [line for line in "".join(text_lines(text)).splitlines() if line.strip()]
        yield Listed(str(text), None, name, captions)


def pairs_from_list(
    rows: Iterable[Listed], root: Path, source: SourceArguments, report: SourceReport, max_broken_share: float
) -> datasets.Dataset:
    """Join rows that repeat an image, check them, leave out missing files, and make the data set of pairs.

    A joined pair keeps the id of its first row.

    Raises:
        DataError: as `sources.pairs.read_source` lists them.
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
            continue  # later rows may still hold captions of the pairs taken
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
    """The path of an image or video below `root`, as `sources.paths.path_inside` reads it.

    Raises:
        DataError: `image` is not a path, or leaves the root.
    """
    if not isinstance(image, str) or not image.strip():
        raise DataError(f"{place}: the image is {image!r}, not a path; correct it, or set image_column")
    return str(path_inside(root, image, place, remedy="set image_root to a folder that holds all images"))


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a text file with their ends, a byte order mark taken off.

    Raises:
        DataError: with file and line for text that is not UTF-8. NUL stands in UTF-16 without a mark, never in text.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, line in enumerate(file, start=1):
                if "\0" in line:
                    raise DataError(f"{path}, line {number}: not UTF-8; save it as UTF-8")
                yield line
    except UnicodeDecodeError as error:
        # decoded in blocks: the line at fault is found by going through the file again
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
                raise DataError(f"{path}, line 1: the header has the column {name!r} twice; rename or remove one")
        for row in reader:
            place = f"{path}, line {reader.line_num}"
            if None in row:
                raise DataError(f"{place}: more fields than the header has; quote captions that contain commas")
            yield place, row
    except csv.Error as error:
        line = reader.reader.line_num  # DictReader's own count stays behind when a row fails
        raise DataError(f"{path}, line {line}: not valid CSV ({error}); is the file cut off?") from error


def jsonl_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The place (`FILE, line N`) and the value of each line of a .jsonl file; blank lines are none.

    Raises:
        DataError: with file and line for text that is not UTF-8, or not JSON.
    """
    for number, line in enumerate(text_lines(path), start=1):
        if line.strip():
            place = f"{path}, line {number}"
            yield place, _parse_json(line, lambda _, place=place: place)


def _json_rows(path: Path) -> Iterator[tuple[str, object]]:
    entries = _parse_json("".join(text_lines(path)), lambda line: f"{path}, line {line}")
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a list of entries as in LLaVA-Pretrain, got {type(entries).__name__}")
    for number, entry in enumerate(entries):
        yield f"{path}, entry {number}", entry


def _parse_json(text: str, where: Callable[[int], str]) -> object:
    """The value of JSON text; `where(line)` names the place of an error."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where(error.lineno)}: not valid JSON ({error.msg}); is the file cut off?") from error
    except RecursionError as error:
        raise DataError(f"{where(1)}: nested too deeply to be read; correct the row") from error
    except ValueError as error:  # a number of thousands of digits
        raise DataError(f"{where(1)}: not usable JSON ({error})") from error


def _answer(conversation: object, place: str) -> str:
    """The caption in LLaVA's chat format: what `gpt` says first."""
    turns = conversation if isinstance(conversation, list) else []
    for turn in turns:
        if isinstance(turn, dict) and turn.get("from") == "gpt":
            return turn.get("value")
    raise DataError(f"{place}: conversations has no turn from gpt, which holds the caption")
