"""M-BEIR as parquet, one data set per task: `MRBench/mbeir_TASK` or `mteb/mbeir_TASK` on the Hub, or folders like them.

Columns and splits are those of the data sets' cards:
- configurations `query` (split `test`) and `corpus` (split `corpus`): id, modality, text and image (bytes or null);
- configuration `qrels` (split `test`): query-id, Q0, corpus-id and score; rows with a score above 0 count, as in mteb.

A folder holds `mbeir_TASK/query-*.parquet`, `corpus-*.parquet` and `qrels-*.parquet`, as the data sets do, or
`mbeir_TASK/query/*.parquet` and so on. `mteb` has infoseek_task8 under another name and with other columns: use
MRBench's.
"""

from collections.abc import Iterator
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.compute

from universal_gcl.evaluation.mbeir.files import read_prompts
from universal_gcl.evaluation.mbeir.rows import Entry
from universal_gcl.evaluation.mbeir.tasks import MBEIRTask, parse_modality
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.tables import TEXT, check_parts, read_hub, read_parquet

_SPLITS = {"query": "test", "corpus": "corpus", "qrels": "test"}
_ROWS_READ_AT_ONCE = 1000


class Mirrors:
    """The data sets named in the module's docstring. Give either root or hub.

    Args:
        root: folder of the tasks' folders.
        hub: user or organisation on the Hub that has the data sets.

    Attributes:
        settings: the settings for results. For the Hub, they include the commit of each data set that was read.
    """

    def __init__(self, root: str | Path | None = None, hub: str | None = None):
        self.root, self.hub = None if root is None else Path(root), hub
        self.settings: dict = {"layout": "parquet"} | (
            {"root": str(root)} if hub is None else {"hub": hub, "commits": {}}
        )

    def present(self) -> tuple[list[str], list[str]]:
        """No names of tests or pools: by default, all of M-BEIR's tasks are evaluated."""
        return [], []

    def needed(self, task: MBEIRTask) -> list[Path]:
        """The files of a task's queries and positives; none for the Hub."""
        return self._needed(task, "query") + self._needed(task, "qrels")

    def needed_pool(self, task: MBEIRTask) -> list[Path]:
        """The files of a task's local pool; none for the Hub."""
        return self._needed(task, "corpus")

    def queries(self, task: MBEIRTask) -> "ParquetTable":
        """The table of a task's queries."""
        return ParquetTable(*self._open(task, "query"))

    def pool(self, task: MBEIRTask) -> "ParquetTable":
        """The table of a task's candidates."""
        return ParquetTable(*self._open(task, "corpus"))

    def judgements(self, task: MBEIRTask) -> Iterator[tuple[str, str, str]]:
        """Place, query id and candidate id of each row with a score above 0.

        Raises:
            ValueError: a column is missing, or a score is not a number.
        """
        table, name = self._open(task, "qrels")
        columns = ["query-id", "corpus-id", "score"]
        _check_columns(table, name, columns)
        values = table.select_columns(columns)[:]
        for number, (query, candidate, score) in enumerate(zip(*(values[column] for column in columns), strict=True)):
            place = f"{name}, row {number}"
            if not isinstance(score, (int, float)):
                raise ValueError(f"{place}: the score must be a number, got {score!r}")
            if score > 0:
                yield place, str(query), str(candidate)

    def prompts(self, task: MBEIRTask) -> list[str]:
        """A task's instructions, from `instructions/query_instructions.tsv` in the folder, or of `TIGER-Lab/M-BEIR`.

        Raises:
            ValueError: see `evaluation.mbeir.files.read_prompts`.
        """
        file = "instructions/query_instructions.tsv"
        if self.root is not None:
            return read_prompts(self.root / file, task)
        return read_prompts(Path(huggingface_hub.hf_hub_download("TIGER-Lab/M-BEIR", file, repo_type="dataset")), task)

    def _files(self, root: Path, task: MBEIRTask, part: str) -> list[Path]:
        folder = root / f"mbeir_{task.name}"
        files = sorted(folder.glob(f"{part}-*.parquet")) or sorted((folder / part).glob("*.parquet"))
        check_parts(files)
        return files

    def _needed(self, task: MBEIRTask, part: str) -> list[Path]:
        if self.root is None:
            return []
        return self._files(self.root, task, part) or [self.root / f"mbeir_{task.name}" / f"{part}-*.parquet"]

    def _open(self, task: MBEIRTask, part: str) -> tuple[datasets.Dataset, str]:
        """The table, and its name for error messages."""
        if self.root is not None:
            files = self._files(self.root, task, part)
            name = str(files[0] if len(files) == 1 else files[0].parent / f"{part}…")
            return datasets.concatenate_datasets([read_parquet(file) for file in files]), name
        name = f"{self.hub}/mbeir_{task.name}"
        table, commit = read_hub(SourceArguments(name, name=part, split=_SPLITS[part]))
        self.settings["commits"][name] = commit
        return table, f"{name} ({part})"


class ParquetTable:
    """An `evaluation.mbeir.rows.Table` over a data set. The key of an entry is the number of its row.

    Iteration raises a ValueError that names the row if an id is empty, a modality is unknown, or an image is only a
    path: the table doesn't say which folder it is relative to.

    Raises:
        ValueError: a column is missing, or the texts are not strings.
    """

    def __init__(self, table: datasets.Dataset, name: str):
        _check_columns(table, name, ["id", "modality"])
        self.name = name
        self.texts = table.select_columns([column for column in ("id", "modality", "text") if column in table.features])
        self.images = None
        if table.features.get("text", TEXT[0]) not in (*TEXT, datasets.Value("null")):
            raise ValueError(f"{name}: the column text holds {table.features['text']}, not strings")
        if "image" in table.features:
            self.images = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))

    def __iter__(self) -> Iterator[tuple[int, str, Entry]]:
        images = None if self.images is None else self.images.with_format("arrow")
        for start in range(0, len(self.texts), _ROWS_READ_AT_ONCE):
            several = slice(start, start + _ROWS_READ_AT_ONCE)
            texts = self.texts[several]
            count = len(texts["id"])
            sizes = paths = [None] * count
            if images is not None:  # only the number of bytes is read
                column = images[several]["image"]
                sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(column, "bytes")).to_pylist()
                paths = pyarrow.compute.struct_field(column, "path").to_pylist()
            values = zip(texts["id"], texts["modality"], texts.get("text", [None] * count), sizes, paths, strict=True)
            for number, (name, modality, text, size, path) in enumerate(values, start=start):
                place = f"{self.name}, row {number}"
                if not size and path:
                    raise ValueError(f"{place}: the image {path} is not inside the table, which has only its path")
                if not isinstance(name, str) or not name:
                    raise ValueError(f"{place}: id must be a non-empty string, got {name!r}")
                try:
                    modality = parse_modality(modality)
                except ValueError as error:
                    raise ValueError(f"{place}: {error}") from error
                yield number, place, Entry(name, modality, text, True if size else None)

    def __getitem__(self, key: int) -> Entry:
        values = self.texts[key]
        image = None if self.images is None else self.images[key]["image"]
        has_image = image is not None and image["bytes"]
        return Entry(values["id"], parse_modality(values["modality"]), values.get("text"), image if has_image else None)

    def missing_image(self, entry: Entry) -> str | None:
        """None: the images are inside the table."""
        return None


def _check_columns(table: datasets.Dataset, name: str, columns: list[str]) -> None:
    absent = [column for column in columns if column not in table.features]
    if absent:
        raise ValueError(f"{name}: no column {absent[0]!r}; the columns are {', '.join(table.column_names)}")
