"""Queries and pools of M-BEIR as rows that are read from their files when they are needed.

A pool of M-BEIR has up to a million candidates, all pools together 5.6 million. A row that is kept takes 8 bytes of
memory: its key in the file.
"""

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

import numpy as np

from universal_gcl.evaluation.mbeir.tasks import clean_text, instructed_text


class Entry(NamedTuple):
    """A query or candidate as in its file; `image` is what `GCLModel.encode` takes."""

    id: str
    modality: str
    text: str | None
    image: object


class Table(Protocol):
    """A file of queries or candidates.

    Iteration checks what it reads and yields `(key, place, entry)`. The place is for error messages. `entry.image` may
    be just True for an entry with an image; `table[key]` is the whole entry. `name` is the name of the file.
    """

    name: str

    def __iter__(self) -> Iterator[tuple[int, str, Entry]]: ...

    def __getitem__(self, key: int) -> Entry: ...

    def missing_image(self, entry: Entry) -> str | None:
        """The entry's image file, if it has one that doesn't exist."""


class Rows(Sequence):
    """`(id, row)` of the entries with these keys, as `retrieval.embed.embed_rows` takes them.

    Args:
        keys: (N,) int64.
        prompts: instructions that are put before queries; None to put nothing there.
    """

    def __init__(self, table: Table, keys: np.ndarray, prompts: Sequence[str] | None = None):
        self.table, self.keys, self.prompts = table, keys, prompts

    def __len__(self) -> int:
        return len(self.keys)

    def __getitem__(self, number: int) -> tuple[str, dict]:  # type: ignore[override]  # no slices
        entry = self.table[int(self.keys[number])]
        return entry.id, make_row(entry, self.prompts)


def make_row(entry: Entry, prompts: Sequence[str] | None = None) -> dict:
    """The row to embed: the image and the cleaned text that the entry has. (UniIR masks a modality that is absent.)
    Empty if it has neither."""
    text = clean_text(entry.text) if prompts is None else instructed_text(prompts, entry.text, entry.id)
    row = {"image": entry.image} if entry.image is not None else {}
    return row | ({"text": text} if text else {})


@dataclass
class Scan:
    """
    What one pass over a table found.

    Attributes:
        rows: the entries that are kept and have something to embed.
        hashes: (N,) int64, hashes of the ids of all entries.
        empty: ids of entries that would be kept but have nothing to embed.
        images: how many of the rows have an image.
        missing: image files that don't exist.
    """

    rows: Rows
    hashes: np.ndarray
    empty: list[str] = field(default_factory=list)
    images: int = 0
    missing: list[str] = field(default_factory=list)


def scan(table: Table, keep: Callable[[int, str], bool], prompts: Sequence[str] | None = None) -> Scan:
    """
    Go through a table once, check each entry, and find the entries to keep.

    Args:
        keep: (number, id) → whether to keep the entry.
        prompts: as for `Rows`.

    Raises:
        ValueError: an entry has no content in its only modality, an id is repeated, or the file has no entries. The
            message names file and line.
    """
    keys, hashes = array("q"), array("q")
    found = Scan(Rows(table, np.empty(0, np.int64), prompts), np.empty(0, np.int64))
    for number, (key, place, entry) in enumerate(table):
        content = {"text": entry.text, "image": entry.image}.get(entry.modality, True)  # both: one may be absent
        if content is None:
            raise ValueError(f"{place}: {entry.id!r} is of modality {entry.modality}, but its {entry.modality} is null")
        hashes.append(hash(entry.id))
        if not keep(number, entry.id):
            continue
        if not make_row(entry, prompts):
            found.empty.append(entry.id)
            continue
        keys.append(key)
        if entry.image is not None:
            found.images += 1
            file = table.missing_image(entry)
            if file is not None:
                found.missing.append(file)
    if not hashes:
        raise ValueError(f"{table.name} has no rows; is the file cut off?")
    found.hashes = np.array(hashes, dtype=np.int64)
    if len(np.unique(found.hashes)) < len(found.hashes):
        _refuse_repeated(table)
    found.rows.keys = np.array(keys, dtype=np.int64)
    return found


def _refuse_repeated(table: Table) -> None:
    places: dict[str, str] = {}
    for _, place, entry in table:
        if entry.id in places:
            raise ValueError(
                f"{place}: the id {entry.id!r} is also used in {places[entry.id]}; give each row its own id"
            )
        places[entry.id] = place


def refuse_shared(scans: dict[str, Scan]) -> None:
    """Refuse pools that share ids.

    Args:
        scans: pool → what a pass over it found.

    Raises:
        ValueError: two pools hold the same id; the message says how many ids, and names one with its pools.
    """
    values, counts = np.unique(np.concatenate([found.hashes for found in scans.values()]), return_counts=True)
    suspects = set(values[counts > 1].tolist())
    if not suspects:
        return
    pools: dict[str, list[str]] = {}
    for name, found in scans.items():
        for _, _, entry in found.rows.table:
            if hash(entry.id) in suspects:
                pools.setdefault(entry.id, []).append(name)
    shared = {name: of for name, of in pools.items() if len(of) > 1}
    if shared:
        name, of = next(iter(shared.items()))
        raise ValueError(f"{len(shared)} ids are in several pools, e.g. {name!r} in {' and '.join(of)}")
