"""Reads and checks the rows of WebVid-CoVR's test, `webvid8m-covr_test.csv`, and makes the text of a query.

Reference: CoVR (arXiv 2308.14746), https://github.com/lucas-ventura/CoVR at f335ebc.
"""

import csv
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

MAX_WORDS = 30


@dataclass(frozen=True)
class Triplet:
    """A row of the CSV.

    Attributes:
        line: the number of its first line in the file, from 1.
        query, target: videos, as `folder/id`.
        edit: the text as written.
        scores: one for each of the target's frames; empty if the file has none.
    """

    line: int
    query: str
    target: str
    edit: str
    scores: tuple[float, ...]


def clean_edit(text: str) -> str:
    """The text of the query: in lower case, with one space for each of `.!"()*#:;~` and each run of white space, and at
    most 30 words.

    Reference: `pre_caption` in src/data/utils.py of CoVR. As there, a single tab or line break stays.
    """
    text = re.sub(r"\s{2,}", " ", re.sub(r'[.!"()*#:;~]', " ", text.lower())).rstrip("\n").strip(" ")
    return " ".join(text.split(" ")[:MAX_WORDS])


def read_triplets(path: str | Path, limit: int | None = None) -> list[Triplet]:
    """
    Read `webvid8m-covr_test.csv` or a file with the same columns: `pth1`, `pth2`, `edit`, and `scores` for the weighted
    mean of frames. Other columns are ignored.

    Args:
        limit: read only this many first rows.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a row can't be parsed, a path is not `folder/id`, an edit has no words, the scores are not a list of
            numbers, the target of a row is its query, or two rows have the same target (the official test keeps one of
            them). The message names file and line.
    """
    path = Path(path)
    data = path.read_bytes()
    try:
        reader = csv.reader(io.StringIO(data.decode("utf-8-sig"), newline=""), strict=True)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{path}, line {line}: not UTF-8 ({error.reason})") from error
    triplets: list[Triplet] = []
    lines: dict[str, int] = {}  # target → line of its row
    line = 1
    try:
        header = next(reader, [])
        absent = [name for name in ("pth1", "pth2", "edit") if name not in header]
        if absent:
            raise ValueError(f"{path}, line 1: there is no column {absent[0]!r}, only {', '.join(header) or 'nothing'}")
        line = reader.line_num + 1
        for values in reader:
            if limit is not None and len(triplets) == limit:
                break
            if values:  # not a blank line
                place = f"{path}, line {line}"
                if len(values) != len(header):
                    raise ValueError(f"{place}: {len(values)} fields, but the header has {len(header)}")
                triplet = _triplet(place, line, dict(zip(header, values)))
                if triplet.target in lines:
                    other = lines[triplet.target]
                    raise ValueError(f"{place}: line {other} has the same target, {triplet.target}; keep one of them")
                lines[triplet.target] = line
                triplets.append(triplet)
            line = reader.line_num + 1  # a quoted text may span several lines
    except csv.Error as error:
        raise ValueError(f"{path}, line {line}: {error}") from error
    if not triplets:
        raise ValueError(f"{path}: no rows" if limit is None else f"{path}: no rows among the first {limit}")
    return triplets


def _triplet(place: str, line: int, row: Mapping[str, str]) -> Triplet:
    for name in ("pth1", "pth2"):
        parts = row[name].split("/")
        if len(parts) != 2 or any(part.strip(" .") == "" or "\\" in part or "\0" in part for part in parts):
            raise ValueError(f"{place}: {name} must be folder/id, as in the path of a video's file, got {row[name]!r}")
    if row["pth1"] == row["pth2"]:
        raise ValueError(
            f"{place}: the target is the query's own video, {row['pth1']}, which is excluded from the search"
        )
    if not clean_edit(row["edit"]).strip():
        raise ValueError(f"{place}: the edit {row['edit']!r} has no words after cleaning")
    try:
        scores = json.loads(row.get("scores", "[]"))
        is_list = isinstance(scores, list) and all(type(score) in (int, float) for score in scores)
        valid = is_list and all(map(math.isfinite, scores))
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(f"{place}: scores must be a list of numbers, such as [0.31, 0.4], got {row['scores'][:80]!r}")
    return Triplet(line, row["pth1"], row["pth2"], row["edit"], tuple(map(float, scores)))
