"""Rows `(id, row)` for `retrieval.embed.embed_rows`: of a file that lists them, or of captioned images."""

import os
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np

from modeling_gcl.rows import parse_row
from universal_gcl.sources.checks import DataError, UniqueIds
from universal_gcl.sources.files import image_path, jsonl_rows

MODALITIES = ("i", "t", "it")
_KEYS = ("id", "text", "image", "video", "instruction")


def read_rows(path: str | Path, image_root: str | Path | None = None) -> list[tuple[str, dict]]:
    """
    Rows from a .jsonl file, one object a line: `id`, and any of `text`, `image` (a path, or a list), `video` (a path,
    or a list of paths of its frames) and `instruction`, as `GCLModel.encode` takes them. `null` is as if the key were
    absent.

    Args:
        image_root: folder that paths are relative to. By default that of the file.

    Raises:
        FileNotFoundError: there is no such file.
        DataError: (a ValueError) with file and line for: what is no JSON or no object, an unknown key, an id that is
            missing or was used, a path that leaves the root, a row that `encode` would refuse; a file without rows.
    """
    path = Path(path)
    root = Path(os.path.abspath(path.parent if image_root is None else image_root))
    rows, ids = [], UniqueIds()
    for place, values in jsonl_rows(path):
        if not isinstance(values, dict):
            raise DataError(f"{place}: expected an object with an id and a text or image, got {type(values).__name__}")
        unknown = sorted(values.keys() - _KEYS)
        if unknown:
            raise DataError(f"{place}: unknown key {unknown[0]!r}; rows have {', '.join(_KEYS)}")
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
        raise DataError(f"{path} holds no rows")
    return rows


class PairRows(Sequence):
    """
    The rows of one modality of captioned images, made as they are asked for.

    - `i`: the images, under the ids of the pairs;
    - `t`: the captions; the first of the pair `cat.jpg` is `cat.jpg#0`, the next `cat.jpg#1`;
    - `it`: each caption fused with its image, `cat.jpg#0+image`; so that all three can be searched as one pool.

    Args:
        pairs: as `sources.pairs.load_pairs` gives them.

    Raises:
        ValueError: another modality.
    """

    def __init__(self, pairs: datasets.Dataset, modality: str):
        if modality not in MODALITIES:
            raise ValueError(f"modality {modality!r} is unknown: choose one of {', '.join(MODALITIES)}")
        self.modality = modality
        # a text's row needs no bytes of its image
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
