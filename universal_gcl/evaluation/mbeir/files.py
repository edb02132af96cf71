"""M-BEIR in its own layout: `TIGER-Lab/M-BEIR` of the Hub with its images unpacked, or a folder made like it.

Under the root, and image paths relative to it:
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

from universal_gcl.evaluation.mbeir.rows import Entry
from universal_gcl.evaluation.mbeir.tasks import MBEIRTask, parse_modality
from universal_gcl.sources.files import text_lines

_QUERY = ("qid", "query_modality", "query_txt", "query_img_path")
_CANDIDATE = ("did", "modality", "txt", "img_path")


class OriginalFiles:
    """See above; the files are opened when they are needed."""

    def __init__(self, root: str | Path):
        self.root = Path(root)
        self.settings = {"root": str(root), "layout": "original"}

    def present(self) -> tuple[list[str], list[str]]:
        """Names of the tests and of the pools that are there; see `mbeir_tasks.choose_tasks`."""
        return tuple(
            [
                path.name.removeprefix("mbeir_").removesuffix(end)
                for path in sorted(self.root.glob(f"{folder}/mbeir_*{end}"))
            ]
            for folder, end in (("query/test", "_test.jsonl"), ("cand_pool/local", "_cand_pool.jsonl"))
        )

    def needed(self, task: MBEIRTask) -> list[Path]:
        """The files of a task's queries and positives."""
        return [self._queries(task), self._qrels(task)]

    def needed_pool(self, task: MBEIRTask) -> list[Path]:
        return [self._pool(task)]

    def queries(self, task: MBEIRTask) -> "JsonlTable":
        return JsonlTable(self._queries(task), self.root, _QUERY)

    def pool(self, task: MBEIRTask) -> "JsonlTable":
        return JsonlTable(self._pool(task), self.root, _CANDIDATE)

    def judgements(self, task: MBEIRTask) -> Iterator[tuple[str, str, str]]:
        """Place, qid and did of each line that says relevant.

        Raises:
            ValueError: a line of another form, text that is not UTF-8; with file and line.
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
        return read_prompts(self.root / "instructions" / "query_instructions.tsv", task)

    def _queries(self, task):
        return self.root / "query" / "test" / f"mbeir_{task.name}_test.jsonl"

    def _pool(self, task):
        return self.root / "cand_pool" / "local" / f"mbeir_{task.pool}_cand_pool.jsonl"

    def _qrels(self, task):
        return self.root / "qrels" / "test" / f"mbeir_{task.name}_test_qrels.txt"


class JsonlTable:
    """A `mbeir_rows.Table` over a .jsonl file; the key of an entry is where its line begins, in bytes. Not for several
    threads at once.

    Args:
        columns: names of id, modality, text and image.

    Iteration raises ValueError, with file and line, for what is no JSON object, for missing keys and values of other
    types, an unknown modality, and an image whose path leaves the root. Links inside the root may lead elsewhere.
    """

    def __init__(self, path: Path, root: Path, columns: tuple[str, str, str, str]):
        self.path, self.root, self.columns = path, root, columns
        self.name = str(path)
        self._prefix = f"{root}{os.sep}"

    def __iter__(self):
        start = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    place = f"{self.name}, line {number}"
                    yield start, place, self._checked(line, place)
                start += len(line)

    def __getitem__(self, key):
        self._file.seek(key)
        return self._entry(json.loads(self._file.readline()))

    @cached_property
    def _file(self):
        return self.path.open("rb")  # for as long as entries may be asked for

    def missing_image(self, entry):
        return None if os.path.isfile(entry.image) else entry.image

    def _checked(self, line, place):
        try:
            values = json.loads(line)
        except (ValueError, RecursionError) as error:  # of the encoding, and of brackets in brackets too
            raise ValueError(f"{place}: not valid JSON ({error}); is the file cut off?") from error
        if not isinstance(values, dict):
            raise ValueError(f"{place}: expected an object, got {type(values).__name__}")
        absent = [name for name in self.columns if name not in values]
        if absent:
            raise ValueError(f"{place}: no {absent[0]!r}; there are {', '.join(values)}")
        *names, text, image = (values[column] for column in self.columns)
        for column, value in zip(self.columns, names, strict=False):
            if not isinstance(value, str) or not value:
                raise ValueError(f"{place}: {column} must be a str that is not empty, got {value!r}")
        for column, value in zip(self.columns[2:], (text, image), strict=True):
            if value is not None and not isinstance(value, str):
                raise ValueError(f"{place}: {column} must be a str or null, got {type(value).__name__}")
        if image:
            path = os.path.normpath(image)
            if os.path.isabs(path) or path.split(os.sep)[0] == os.pardir:
                raise ValueError(f"{place}: the image {image} lies outside {self.root}; paths are relative to it")
        try:
            return self._entry(values)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error

    def _entry(self, values):
        name, modality, text, image = (values[column] for column in self.columns)
        return Entry(name, parse_modality(modality), text, self._prefix + image if image else None)


def read_prompts(path: Path, task: MBEIRTask) -> list[str]:
    """A task's prompts.

    Raises:
        ValueError: the file has none for the task, or is not UTF-8.
    """
    for line in text_lines(path):
        query, candidate, _, dataset_id, *prompts = [*line.rstrip("\r\n").split("\t"), "", "", "", ""]
        found = [prompt.strip() for prompt in prompts if prompt.strip()]
        key = (dataset_id, _modality(query), _modality(candidate))
        if found and key == (task.dataset_id, task.query, task.candidate):
            return found
    raise ValueError(f"{path} has no instruction for {task.name} ({task.query} to {task.candidate})")


def _modality(text):
    try:
        return parse_modality(text)
    except ValueError:
        return None
