"""Reads the contents of rows as hashes, and finds the rows with equal contents, before anything is embedded."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import numpy as np

from modeling_gcl.rows import parse_row
from universal_gcl.retrieval.fingerprint import content_hash
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.progress import Progress, job_name

_READERS = 8  # threads that hash files
_ROWS_AT_ONCE = 1024
_NO_CONTENT = bytes(16)  # hash of a row that can't be read


class Rows(Protocol):
    """A sequence of rows: `rows[number]` is an id with its row, and `len(rows)` the number of rows."""

    def __len__(self) -> int: ...

    def __getitem__(self, number: int, /) -> tuple[str, dict]: ...


def read_contents(
    rows: Rows, processes: Processes, on_error: str, shown: bool
) -> tuple[np.ndarray, dict[int, str], list[str] | None]:
    """
    Hash the contents of all rows. Each process reads a part of the rows.

    Args:
        rows: all rows.
        processes: the processes that share the work.
        on_error: what to do with rows that can't be read, `"raise"` or `"skip"`.
        shown: whether to show the progress.

    Returns:
        - (N, 16) uint8, the hashes, with zeros for rows that can't be read.
        - Row number → reason, for rows that can't be read.
        - The ids of all rows on process 0, None on other processes.

    Raises:
        ValueError: an item is not `(id, row)`, an id is empty or occurs twice, or a row can't be read. The message
            names the row.
    """
    start, end = (len(rows) * rank // processes.size for rank in (processes.rank, processes.rank + 1))
    hashes, unreadable, ids = [], {}, []

    def read(number: int, item: tuple[str, dict]) -> tuple[str, bytes, str | None]:
        try:
            name, row = item
        except (TypeError, ValueError) as error:
            raise ValueError(f"row {number} must be a pair (id, row), got a {type(item).__name__}") from error
        if not isinstance(name, str) or not name:
            raise ValueError(f"row {number}: the id must be a str that is not empty, got {name!r}")
        try:
            return name, content_hash(parse_row(row, number)), None
        except ValueError as error:
            if on_error == "raise":
                raise type(error)(f"row {name!r}: {reason_of(error, number)}") from error
            return name, _NO_CONTENT, reason_of(error, number)

    with (
        ThreadPoolExecutor(_READERS) as executor,
        Progress(job_name("read", processes), end - start, shown=shown) as progress,
    ):
        for begin in range(start, end, _ROWS_AT_ONCE):
            numbers = range(begin, min(begin + _ROWS_AT_ONCE, end))
            for number, (name, content, why) in zip(numbers, executor.map(read, numbers, [rows[n] for n in numbers])):
                ids.append(name)
                hashes.append(content)
                if why is not None:
                    unreadable[number] = why
            progress.update(len(numbers))
    parts = processes.collect(ids)
    all_hashes = b"".join(processes.gather(b"".join(hashes)))
    unreadable = {number: why for part in processes.gather(unreadable) for number, why in part.items()}
    contents = np.frombuffer(all_hashes, dtype=np.uint8).reshape(-1, 16)
    if parts is None:
        return contents, unreadable, None
    ids = [name for part in parts for name in part]
    _check_unique(ids)
    return contents, unreadable, ids


def reason_of(error: Exception, number: int) -> str:
    """The message of an error without the number of the row, because messages here name the id."""
    return str(error).removeprefix(f"row {number}").removeprefix(":").strip()


def _check_unique(ids: list[str]) -> None:
    if len(set(ids)) == len(ids):
        return
    twice = sorted(name for name, count in Counter(ids).items() if count > 1)
    named = ", ".join(map(repr, twice[:5])) + (", …" if len(twice) > 5 else "")
    raise ValueError(f"{len(twice)} ids occur more than once: {named}; give each row its own id")


def distinct_contents(contents: np.ndarray, ids: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """
    Find the different contents among the hashes of all rows.

    Returns:
        - (M,) int64, for each content the row with the smallest id, sorted by that id.
        - (N,) int64, for each row the index of its content, or -1 if the row can't be read.
    """
    by_id = np.array(sorted(range(len(ids)), key=ids.__getitem__))
    halves = np.ascontiguousarray(contents[by_id]).view(np.uint64)  # (N, 2)
    order = np.lexsort((np.arange(len(halves)), halves[:, 1], halves[:, 0]))
    new = np.ones(len(order), dtype=bool)
    new[1:] = (halves[order[1:]] != halves[order[:-1]]).any(axis=1)
    first_of_row = np.empty(len(order), dtype=np.int64)
    first_of_row[order] = order[new][np.cumsum(new) - 1]
    first_of_row[~halves.any(axis=1)] = -1
    first = np.unique(first_of_row[first_of_row >= 0])
    content_of = np.empty(len(order), dtype=np.int64)
    content_of[by_id] = np.where(first_of_row < 0, -1, np.searchsorted(first, first_of_row))
    return by_id[first], content_of
