"""M-BEIR in its own layout: `TIGER-Lab/M-BEIR` from the Hub with its images unpacked, or a folder in that layout.

Files under the root, to which image paths are relative:
- `query/test/mbeir_TASK_test.jsonl`: qid, query_txt, query_img_path, query_modality;
- `cand_pool/local/mbeir_POOL_cand_pool.jsonl`: did, txt, img_path, modality;
- `qrels/test/mbeir_TASK_test_qrels.txt`: `qid 0 did relevance task_id`;
- `instructions/query_instructions.tsv`: query_modality, cand_modality, dataset_name, dataset_id, prompts.
"""

import json
import os
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from universal_gcl.evaluation.mbeir.rows import Entry
from universal_gcl.evaluation.mbeir.tasks import MBEIRTask, parse_modality
from universal_gcl.sources.files import text_lines
from universal_gcl.sources.paths import path_inside

_QUERY = ("qid", "query_modality", "query_txt", "query_img_path")
_CANDIDATE = ("did", "modality", "txt", "img_path")


class OriginalFiles:
    """The files named in the module's docstring; they are opened when they are needed."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.settings: dict = {"root": str(root), "layout": "original"}

    def present(self) -> tuple[list[str], list[str]]:
        """Names of the tests and of the pools that exist, for `evaluation.mbeir.tasks.choose_tasks`."""
        return self._names("query/test", "_test.jsonl"), self._names("cand_pool/local", "_cand_pool.jsonl")

    def needed(self, task: MBEIRTask) -> list[Path]:
        """The files of a task's queries and positives."""
        return [self._queries(task), self._qrels(task)]

    def needed_pool(self, task: MBEIRTask) -> list[Path]:
        """The file of a task's local pool."""
        return [self._pool(task)]

    def queries(self, task: MBEIRTask) -> "JsonlTable":
        """The table of a task's queries."""
        return JsonlTable(self._queries(task), self.root, _QUERY)

    def pool(self, task: MBEIRTask) -> "JsonlTable":
        """The table of a task's candidates."""
        return JsonlTable(self._pool(task), self.root, _CANDIDATE)

    def judgements(self, task: MBEIRTask) -> Iterator[tuple[str, str, str]]:
        """Place, qid and did of each line with a relevance above 0.

        Raises:
            ValueError: a line has another form or is not UTF-8. The message names file and line.
        """
        path = self._qrels(task)
        for number, line in enumerate(text_lines(path), start=1):
            fields = line.split()
            if not fields:
                continue
            place = f"{path}, line {number}"
            if len(fields) != 5 or not fields[3].lstrip("-").isdecimal():
                raise ValueError(f"{place}: {line.strip()!r} is not `qid 0 did relevance task_id`")
            if int(fields[3]) > 0:
                yield place, fields[0], fields[2]

    def prompts(self, task: MBEIRTask) -> list[str]:
        """A task's instructions. The errors are those of `read_prompts`."""
        return read_prompts(self.root / "instructions" / "query_instructions.tsv", task)

    def _names(self, folder: str, end: str) -> list[str]:
        paths = sorted(self.root.glob(f"{folder}/mbeir_*{end}"))
        return [path.name.removeprefix("mbeir_").removesuffix(end) for path in paths]

    def _queries(self, task: MBEIRTask) -> Path:
        return self.root / "query" / "test" / f"mbeir_{task.name}_test.jsonl"

    def _pool(self, task: MBEIRTask) -> Path:
        return self.root / "cand_pool" / "local" / f"mbeir_{task.pool}_cand_pool.jsonl"

    def _qrels(self, task: MBEIRTask) -> Path:
        return self.root / "qrels" / "test" / f"mbeir_{task.name}_test_qrels.txt"


class JsonlTable:
    """An `evaluation.mbeir.rows.Table` over a .jsonl file. The key of an entry is the offset of its line in bytes.

    Only one thread may read a table at a time.

    Args:
        columns: names of id, modality, text and image.

    Iteration raises a ValueError that names file and line if a line is not a JSON object, keys are missing, values have
    other types, a modality is unknown, or the path of an image leaves the root. Links inside the root may lead
    elsewhere.
    """

    def __init__(self, path: Path, root: Path, columns: tuple[str, str, str, str]):
        self.path, self.root, self.columns = path, root, columns
        self.name = str(path)

    def __iter__(self) -> Iterator[tuple[int, str, Entry]]:
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{self.name}, line {number}"
                    yield start, place, self._checked(line, place)
                start += len(line)

    def __getitem__(self, key: int) -> Entry:
        self._file.seek(key)
        return self._entry(json.loads(self._file.readline()), f"{self.name}, byte {key}")

    @cached_property
    def _file(self) -> BinaryIO:
        return self.path.open("rb")  # stays open as long as the table lives

    def missing_image(self, entry: Entry) -> str | None:
        """The entry's image file, if it has one that doesn't exist."""
        image = entry.image
        return image if isinstance(image, str) and not os.path.isfile(image) else None

    def _checked(self, line: bytes, place: str) -> Entry:
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # also for a wrong encoding, and for deeply nested brackets
            raise ValueError(f"{place}: not valid JSON ({error}); is the file cut off?") from error
        if not isinstance(values, dict):
            raise ValueError(f"{place}: expected an object, got {type(values).__name__}")
        absent = [name for name in self.columns if name not in values]
        if absent:
            raise ValueError(f"{place}: no key {absent[0]!r}; the keys are {', '.join(values)}")
        *names, text, image = (values[column] for column in self.columns)
        for column, value in zip(self.columns, names, strict=False):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{place}: {column} must be a non-empty string, got {value!r}")
        for column, value in zip(self.columns[2:], (text, image), strict=True):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{place}: {column} must be a string or null, got {type(value).__name__}")
        try:
            parse_modality(names[1])
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        return self._entry(values, place)

    def _entry(self, values: dict, place: str) -> Entry:
        name, modality, text, image = (values[column] for column in self.columns)
        file = str(path_inside(self.root, image, place)) if image else None
        return Entry(name, parse_modality(modality), text, file)


def read_prompts(path: Path, task: MBEIRTask) -> list[str]:
    """A task's prompts.

    Args:
        path: `query_instructions.tsv`.

    Raises:
        ValueError: the file has no prompts for the task, or is not UTF-8.
    """
    for line in text_lines(path):
        query, candidate, _, dataset_id, *prompts = [*line.rstrip("\r\n").split("\t"), "", "", "", ""]
        found = [prompt.strip() for prompt in prompts if prompt.strip()]
        key = (dataset_id, _modality(query), _modality(candidate))
        if found and key == (task.dataset_id, task.query, task.candidate):
            return found
    raise ValueError(f"{path} has no instruction for {task.name} ({task.query} to {task.candidate})")


def _modality(text: str) -> str | None:
    try:
        return parse_modality(text)
    except ValueError:
        return None
