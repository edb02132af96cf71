"""Reads pairs (an image and its captions) from a folder, a file or a data set on the Hub.

Files may be .parquet, .csv, .jsonl or LLaVA-Pretrain's .json:

pairs = load_pairs(SourceArguments("my_photos"))
pairs[0]  # {"id": "cat.jpg", "image": {"bytes": None, "path": "/.../my_photos/cat.jpg"}, "captions": ["A cat."]}
"""

import hashlib
import re
from pathlib import Path

import datasets

from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import DataError, SourceReport
from universal_gcl.sources.files import metadata_file, pairs_from_list, read_list, read_sidecars
from universal_gcl.sources.tables import pairs_from_table, read_hub, read_parquet

LIST_SUFFIXES = (".csv", ".jsonl", ".json")
_HUB_ID = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


def load_pairs(source: SourceArguments, *, max_broken_share: float = 0.01) -> datasets.Dataset:
    """Read the pairs of a source. `read_source` does the same and also returns a report."""
    return read_source(source, max_broken_share=max_broken_share)[0]


def read_source(source: SourceArguments, *, max_broken_share: float = 0.01) -> tuple[datasets.Dataset, SourceReport]:
    """
    Read the pairs of a source. Images are not decoded here, so a damaged image is found only when it is used.

    Args:
        source: what to read.
        max_broken_share: pairs whose image file is missing are skipped, counted and reported, as long as they are no
            more than this share of all pairs.

    Returns:
        - The pairs: a data set with the columns `id` (string, unique), `image` (`Image(decode=False)`: `{"bytes",
          "path"}`) and `captions` (list of strings, at least one).
        - The report of what was read and skipped.

    Raises:
        DataError: (a ValueError) the path or the type of the file is unknown, a column is missing, a caption is empty
            or not text, an id occurs twice, a file is cut off, a path leaves the image root, or too many images are
            missing. The message names file and row.
    """
    path = Path(source.path).expanduser()
    root = Path(source.image_root).expanduser() if source.image_root else None
    if root is not None and not root.is_dir():
        raise DataError(f"{source.path}: image_root {root} is not a folder (working directory: {Path.cwd()})")
    report = SourceReport(path=source.path)
    if path.is_dir():
        metadata = metadata_file(path)
        if metadata is None:
            rows = read_sidecars(path, report)
        else:
            report.revision = _checksum(metadata)
            rows = read_list(metadata, source)
        pairs = pairs_from_list(rows, root or path, source, report, max_broken_share)
    elif path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        report.revision = _checksum(path)
        pairs = pairs_from_list(read_list(path, source), root or path.parent, source, report, max_broken_share)
    elif path.is_file() and path.suffix.lower() == ".parquet":
        report.revision = _checksum(path)
        table = read_parquet(path)
        pairs = pairs_from_table(table, str(path), root or path.parent, source, report, max_broken_share)
    elif path.is_file():
        raise DataError(
            f"{path}: unknown type of file; use .parquet or {', '.join(LIST_SUFFIXES)}, a folder, or a Hub id"
        )
    elif path.suffix.lower() in (".parquet", *LIST_SUFFIXES) or not _HUB_ID.match(source.path):
        raise DataError(f"{source.path}: no such file or folder (working directory: {Path.cwd()})")
    else:
        table, report.revision = read_hub(source)
        report.split = source.split
        pairs = pairs_from_table(table, source.path, root, source, report, max_broken_share)
    return pairs, report


def _checksum(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
