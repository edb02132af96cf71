"""Rows to embed, as pairs `(id, row)` with the row in the form that `GCLModel.encode` takes.

They come from a file that lists them (`read_rows`) or from captioned images (`PairRows`).
"""

import os
from pathlib import Path

import datasets
import numpy as np

from modeling_gcl.modalities import MODALITIES
from modeling_gcl.rows import parse_row
from universal_gcl.sources.checks import DataError, UniqueIds
from universal_gcl.sources.files import image_path, jsonl_rows

_KEYS = ("id", "text", "image", "video", "instruction")


def read_rows(path: str | Path, image_root: str | Path | None = None) -> list[tuple[str, dict]]:
    """
    Read rows from a .jsonl file with one object a line.

    Each object has an `id` and any of the keys that `GCLModel.encode` takes: `text`, `image` (a path or a list of
    paths), `video` (a path, or a list of paths of its frames) and `instruction`. A key with the value `null` is
    ignored.

    Args:
        image_root: folder that paths are relative to. Defaults to the folder of the file.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: (a ValueError) the file has no rows, or one of its lines is not a JSON object, has an unknown key, no
            id or an id that was used before, a path that leaves the root, or a row that `encode` would refuse. The
            message names file and line.
    """
    path = Path(path)
    root = Path(os.path.abspath(path.parent if image_root is None else image_root))
    rows, ids = [], UniqueIds()
    for place, values in jsonl_rows(path):
        if not isinstance(values, dict):
            raise DataError(
                f"{place}: expected an object with an id and a text or image, got a {type(values).__name__}"
            )
        unknown = sorted(values.keys() - _KEYS)
        if unknown:
            raise DataError(f"{place}: unknown key {unknown[0]!r}; use {', '.join(_KEYS)}")
        name = ids.add(values.pop("id", None), place)
        row = {key: value for key, value in values.items() if value is not None}
        for key in ("image", "video"):
            if isinstance(row.get(key), list):
                row[key] = [image_path(root, file, place) for file in row[key]]
            elif key in row:
                row[key] = image_path(root, row[key], place)
        try:
            parse_row(row, 0)
        except ValueError as error:
            raise DataError(f"{place}, id {name!r}: {str(error).removeprefix('row 0').lstrip(': ')}") from error
        rows.append((name, row))
    if not rows:
        raise DataError(f"{path} has no rows")
    return rows


class PairRows:
    """
    The rows of one modality of captioned images. A row is made when it is read.

    - `i`: the images, with the ids of their pairs, such as `cat.jpg`.
    - `t`: the captions. The captions of the pair `cat.jpg` have the ids `cat.jpg#0`, `cat.jpg#1`, ….
    - `it`: each caption together with its image. The ids are `cat.jpg#0+image`, ….

    The ids of the three modalities differ, so all three can be searched as one pool.

    Args:
        pairs: pairs from `sources.pairs.load_pairs`.
        modality: `i`, `t` or `it`.

    Raises:
        ValueError: the modality is unknown.
    """

    def __init__(self, pairs: datasets.Dataset, modality: str) -> None:
        if modality not in MODALITIES:
            raise ValueError(f"the modality {modality!r} is unknown: choose one of {', '.join(MODALITIES)}")
        self.modality = modality
        # without the column of images, the bytes of the image are not read for the row of a text
        self.pairs = pairs.select_columns(["id", "captions"]) if modality == "t" else pairs
        counts = [1 if modality == "i" else len(captions) for captions in pairs.select_columns("captions")["captions"]]
        self.ends = np.cumsum(counts)

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, number: int) -> tuple[str, dict]:
        number = range(len(self))[number]
        place = int(np.searchsorted(self.ends, number, side="right"))
        pair = self.pairs[place]
        if self.modality == "i":
            return pair["id"], {"image": pair["image"]}
        caption = number - int(self.ends[place]) + len(pair["captions"])
        name, row = f"{pair['id']}#{caption}", {"text": pair["captions"][caption]}
        return (name, row) if self.modality == "t" else (f"{name}+image", row | {"image": pair["image"]})
