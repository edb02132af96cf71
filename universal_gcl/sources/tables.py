"""Sources that are tables, mostly with the images inside: .parquet files and data sets on the Hub.

Only the columns with text are loaded into memory. The images stay memory-mapped, so a table may be larger than memory.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import (
    CAPTION_COLUMNS,
    IMAGE_COLUMNS,
    MISSING,
    DataError,
    SourceReport,
    UniqueIds,
    check_captions,
    find_column,
)
from universal_gcl.sources.files import FEATURES, ListRow, image_path, pairs_from_list

TEXT = (datasets.Value("string"), datasets.Value("large_string"))
BYTES = (datasets.Value("binary"), datasets.Value("large_binary"))


def read_parquet(path: Path) -> datasets.Dataset:
    """Open a .parquet file as a data set.

    Raises:
        DataError: the file is cut off, not parquet, or has no rows.
    """
    try:
        if pyarrow.parquet.read_metadata(path).num_rows == 0:
            raise DataError(f"{path} has no rows")
        return datasets.Dataset.from_parquet(str(path))
    except (pyarrow.ArrowInvalid, OSError, datasets.exceptions.DatasetGenerationError) as error:
        raise DataError(f"{path}: not a readable parquet file ({error}); is it cut off?") from error


def check_parts(files: Sequence[Path]) -> None:
    """Check that all parts of a table are there, if the files are named like `…-00000-of-00003.parquet`.

    Raises:
        DataError: some parts are missing.
    """
    total = re.search(r"-of-(\d+)$", files[0].stem) if files else None
    if total and int(total[1]) != len(files):
        raise DataError(
            f"{files[0].parent} holds {len(files)} of the {int(total[1])} files such as {files[0].name}: fetch the rest"
        )


def read_hub(source: SourceArguments) -> tuple[datasets.Dataset, str | None]:
    """Download a split of a data set on the Hub.

    Returns:
        - The split.
        - Its commit. If the download does not say which, the revision that was asked for.

    Raises:
        DataError: there is no such data set, configuration, split or revision, or the Hub can't be reached.
    """
    try:
        table = datasets.load_dataset(source.path, source.name, revision=source.revision, split=source.split)
    except (OSError, ValueError) as error:
        asked = {"name": source.name, "split": source.split, "revision": source.revision}
        details = ", ".join(f"{key} {value}" for key, value in asked.items() if value is not None)
        raise DataError(
            f"{source.path}: there is no such file or folder in {Path.cwd()}, and loading it as a data set from the "
            f"Hub failed ({details}): {error}"
        ) from error
    addresses = " ".join(table.info.download_checksums or {})
    commit = re.search(r"@([0-9a-f]{40})/", addresses)
    return table, commit[1] if commit else source.revision


def pairs_from_table(
    table: datasets.Dataset,
    place: str,
    root: Path | None,
    source: SourceArguments,
    report: SourceReport,
    max_broken_share: float,
) -> datasets.Dataset:
    """
    Find the columns of a table, check them, and make a data set of pairs from them.

    Args:
        table: a table with any columns. The images may be `datasets.Image`, bytes, `{bytes, path}` or paths.
        place: the name of the table in error messages.
        root: the folder that paths of images are relative to. None for a Hub data set, whose image files are in the
            caches of the Hub.

    Raises:
        DataError: see `sources.pairs.read_source`.
    """
    if len(table) == 0:
        raise DataError(f"{place} has no rows")
    root = Path(os.path.abspath(root)) if root is not None else None
    image_column = _image_column(table, place, source)
    caption_column = find_column(place, table.column_names, source.caption_column, CAPTION_COLUMNS, "caption_column")
    id_column = source.id_column or ("id" if "id" in table.column_names else None)
    if id_column is not None:
        find_column(place, table.column_names, id_column, (), "id_column")

    if table.features[image_column] in TEXT:
        if root is None:
            raise DataError(
                f"{place}: the column {image_column} has paths, not images; set image_root to the folder "
                "that they are relative to"
            )
        listed = zip(_values(table, id_column), _values(table, image_column), _values(table, caption_column))
        rows = (ListRow(f"{place}, row {number}", *values) for number, values in enumerate(listed))
        return pairs_from_list(rows, root, source, report, max_broken_share)

    if source.limit is not None and source.limit < len(table):
        table = table.select(range(source.limit))
    unique = UniqueIds()
    ids = [
        unique.add(value, f"{place}, row {number}")
        for number, value in enumerate(_values(table, id_column) if id_column else range(len(table)))
    ]
    captions = [
        check_captions(value, f"{place}, row {number}") for number, value in enumerate(_values(table, caption_column))
    ]
    pairs = table.select_columns([image_column]).rename_columns({image_column: "image"})
    pairs = pairs.cast_column("image", FEATURES["image"])
    files = {row: _file(path, f"{place}, row {row}", root) for row, path in _paths_of_files(pairs).items()}
    texts = datasets.Dataset.from_dict(
        {"id": ids, "captions": captions},
        features=datasets.Features({key: FEATURES[key] for key in ("id", "captions")}),
    )
    pairs = datasets.concatenate_datasets([pairs, texts], axis=1).select_columns(list(FEATURES))
    for row, file in files.items():
        if file is None or not os.path.isfile(file):
            report.skip(MISSING, f"row {row}" if file is None else f"row {row}, {file}")
            files[row] = None
    report.check_skipped(len(pairs), max_broken_share)
    found = {row: file for row, file in files.items() if file is not None}
    if files:
        # the rows of the table stay memory-mapped. Rows whose image is a file are appended with the checked path, and
        # the new order puts each in the place of the original row
        checked = {
            "id": [ids[row] for row in found],
            "image": [{"bytes": None, "path": file} for file in found.values()],
            "captions": [captions[row] for row in found],
        }
        places = {row: len(pairs) + number for number, row in enumerate(found)}
        order = [places.get(row, row) for row in range(len(pairs)) if row not in files or row in found]
        pairs = datasets.concatenate_datasets([pairs, datasets.Dataset.from_dict(checked, features=FEATURES)])
        pairs = pairs.select(order)
    report.pairs = len(pairs)
    report.captions = sum(len(texts) for row, texts in enumerate(captions) if row not in files or row in found)
    return pairs


def _image_column(table: datasets.Dataset, place: str, source: SourceArguments) -> str:
    """The name of the image column: the one the user chose, the only one of type Image, or the first known name."""
    typed = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
    asked = source.image_column or (typed[0] if len(typed) == 1 else None)
    name = find_column(place, table.column_names, asked, IMAGE_COLUMNS, "image_column")
    feature = table.features[name]
    is_struct = isinstance(feature, dict) and {"bytes", "path"} <= set(feature)
    if isinstance(feature, datasets.Image) or is_struct or feature in BYTES + TEXT:
        return name
    raise DataError(
        f"{place}: the column {name} is {feature}, not images, bytes or paths; set image_column to another column"
    )


def _values(table: datasets.Dataset, column: str | None) -> list:
    """A column as a list, without reading the other columns. If `column` is None, a list with None for each row."""
    return [None] * len(table) if column is None else table.select_columns([column]).to_dict()[column]


def _paths_of_files(pairs: datasets.Dataset) -> dict[int, str | None]:
    """Row → path (or None), for the rows whose image is not stored in the table. Reads no image."""
    images = pairs.data.column("image")
    sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(images, "bytes")).to_pylist()
    paths = pyarrow.compute.struct_field(images, "path").to_pylist()
    return {row: path for row, (size, path) in enumerate(zip(sizes, paths)) if not size}


def _file(path: str | None, place: str, root: Path | None) -> str | None:
    """The file of an image whose bytes are not in the table, or None if there is no path or the path can't be resolved.

    Raises:
        DataError: the path leaves the root, or, for a Hub data set without a root, lies outside the caches.
    """
    if not path:
        return None
    if root is not None:
        return image_path(root, path, place)
    if not os.path.isabs(path):
        return None
    config = datasets.config
    caches = (config.HF_DATASETS_CACHE, config.DOWNLOADED_DATASETS_PATH, config.EXTRACTED_DATASETS_PATH)
    for cache in (*caches, huggingface_hub.constants.HF_HUB_CACHE):
        if Path(os.path.normpath(path)).is_relative_to(os.path.abspath(cache)):
            return os.path.normpath(path)
    raise DataError(f"{place}: {path} lies outside the caches of the Hub; set image_root to the folder of the images")
