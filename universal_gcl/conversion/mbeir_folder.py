"""Writes your own test data in M-BEIR's layout, so that `gcl evaluate mbeir` measures on it by M-BEIR's rules.

Captioned pairs become five tests: `NAME_task0` (t→i), `task1` (t→t), `task2` (t→it), `task3` (i→t) and `task6` (it→t).
They use the captions and pools of `evaluation.pairs.measure`, which says what each caption is for (with four captions
or more). The three tests with text candidates share one pool, that of task3.

Composed queries, each an image with a text that changes it, become `NAME_task7` (it→i) over all images. The query's own
image stays among the candidates, as in CIRR and FashionIQ.

A root may hold several data sets; their pools together are the global pool.
"""

import itertools
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from io import BytesIO
from pathlib import Path
from types import TracebackType

from PIL import Image

from modeling_gcl import ImageError, load_image
from universal_gcl.evaluation.mbeir.tasks import MBEIRTask, parse_task
from universal_gcl.evaluation.pairs.embeddings import caption_roles
from universal_gcl.sources.checks import DataError
from universal_gcl.sources.files import jsonl_rows

FIRST_ID = 10  # M-BEIR's own data sets have the ids 0 to 9
MIN_CAPTIONS = 4
PAIR_TASKS = (0, 1, 2, 3, 6)  # numbers of M-BEIR's tasks: t→i, t→t, t→it, i→t, it→t
PAIR_POOLS = (0, 3, 2)  # the tasks that name the pools of images, texts and fused candidates
COMPOSED_TASK = 7  # it→i


def write_pairs(pairs: Sequence[dict], root: str | Path, *, name: str, dataset_id: int) -> dict[str, int]:
    """Write the five tests of captioned pairs.

    Args:
        pairs: pairs from `sources.pairs.load_pairs`, each with four captions or more.
        root: folder to write into. It is created if needed, and may already have other data sets in this layout.
        name: name of the data set: letters, digits and `_`.
        dataset_id: number of the data set, before the colon of all ids; 10 or more.

    Returns:
        test → number of queries.

    Raises:
        DataError: (a ValueError) there are no pairs; a pair has too few captions or an unreadable image (the message
            names it); the name or the number is taken or not allowed.
    """
    roles = caption_roles(MIN_CAPTIONS)
    if not len(pairs):
        raise DataError("there are no pairs to write")
    with _DataSet(root, name, dataset_id) as data:
        images, texts, fused = (data.add_pool(number) for number in PAIR_POOLS)
        tests = [data.add_test(number) for number in PAIR_TASKS]
        for pair in pairs:
            pair_id, captions = pair["id"], pair["captions"]
            if len(captions) < MIN_CAPTIONS:
                raise DataError(f"pair {pair_id!r} has {len(captions)} captions, but needs {MIN_CAPTIONS} or more")
            image = data.add_image(pair_id, pair["image"])
            positives = {
                "image": [images.add(pair_id, image=image)],
                "text": [texts.add(pair_id, text=caption) for caption in captions[roles.first_text :]],
                "image,text": [fused.add(pair_id, text=captions[roles.fused_candidate], image=image)],
            }
            queries = {
                "image": {"image": image},
                "text": {"text": captions[roles.text_query]},
                "image,text": {"text": captions[roles.fused_query], "image": image},
            }
            for test in tests:
                test.add(pair_id, positives[test.task.candidate], **queries[test.task.query])
    return data.num_queries()


def write_composed(
    images: Sequence[dict], queries: str | Path, root: str | Path, *, name: str, dataset_id: int
) -> dict[str, int]:
    """Write the test of composed queries. `root`, `name` and `dataset_id` are those of `write_pairs`.

    Args:
        images: pairs from `sources.pairs.load_pairs`. All images are candidates. The captions are not used.
        queries: .jsonl of `{"ref": id of the query's image, "text": str, "targets": [ids of the right images]}`; other
            keys are ignored.

    Returns:
        test → number of queries.

    Raises:
        DataError: (a ValueError) a query is malformed or names an unknown image (with file and line), or there are no
            queries; otherwise as in `write_pairs`.
    """
    queries = Path(queries)
    with _DataSet(root, name, dataset_id) as data:
        pool, test = data.add_pool(COMPOSED_TASK), data.add_test(COMPOSED_TASK)
        files, candidates = {}, {}
        for image in images:
            files[image["id"]] = data.add_image(image["id"], image["image"])
            candidates[image["id"]] = pool.add(image["id"], image=files[image["id"]])
        for place, row in jsonl_rows(queries):
            ref, text, targets = _composed_query(place, row)
            for image_id in (ref, *targets):
                if image_id not in files:
                    raise DataError(f"{place}: there is no image {image_id!r}")
            test.add(ref, [candidates[target] for target in targets], text=text, image=files[ref])
        if not test.rows:
            raise DataError(f"{queries} has no rows")
    return data.num_queries()


def _composed_query(place: str, row: object) -> tuple[str, str, list[str]]:
    """The image's id, the text and the targets' ids of one line of composed queries."""
    ref, text, targets = (row.get(key) for key in ("ref", "text", "targets")) if isinstance(row, dict) else [None] * 3
    if not isinstance(ref, str) or not isinstance(text, str) or not text.strip() or not isinstance(targets, list):
        raise DataError(f'{place}: expected {{"ref": "ID", "text": "…", "targets": ["ID", …]}}')
    if not targets or len(set(map(str, targets))) < len(targets) or not all(isinstance(name, str) for name in targets):
        raise DataError(f"{place}: targets must be one or more different ids, got {targets!r}"[:300])
    if ref in targets:
        raise DataError(f"{place}: {ref!r} is one of its own targets")
    return ref, text, targets


class _DataSet:
    """Collects pools, tests and images of one data set. When the `with` block ends, all files appear in the root; after
    an error, none do."""

    def __init__(self, root: str | Path, name: str, dataset_id: int):
        self.root, self.name, self.dataset_id = Path(root), name, dataset_id
        self.pools: list[_Pool] = []
        self.tests: list[_Test] = []
        self.num_images = 0
        self.query_ids, self.candidate_ids = self._new_ids(), self._new_ids()

    def __enter__(self) -> "_DataSet":
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise DataError(f"the name {self.name!r} must consist of letters, digits and _")
        if self.dataset_id < FIRST_ID:
            raise DataError(f"dataset_id {self.dataset_id} is one of M-BEIR's own: choose {FIRST_ID} or more")
        self._refuse_if_taken()
        self.root.mkdir(parents=True, exist_ok=True)
        self.staging = tempfile.TemporaryDirectory(prefix=f".{self.name}.", dir=self.root)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self.staging as folder:
            if kind is None:
                self._write(Path(folder))

    def add_pool(self, task_number: int) -> "_Pool":
        """A new, empty pool under the name of the task."""
        self.pools.append(_Pool(self, self._task(task_number)))
        return self.pools[-1]

    def add_test(self, task_number: int) -> "_Test":
        """A new, empty test of the task."""
        self.tests.append(_Test(self, self._task(task_number)))
        return self.tests[-1]

    def add_image(self, pair_id: str, image: Mapping) -> str:
        """Copy an image into the data set.

        Args:
            image: `{"bytes": …, "path": …}`, an undecoded image of `datasets`.

        Returns:
            Its path, relative to the root.
        """
        try:
            load_image(image)  # decodes all of it
        except ImageError as error:
            raise DataError(f"pair {pair_id!r}: {error}") from error
        content = image["bytes"] or Path(image["path"]).read_bytes()
        suffix = str(Image.open(BytesIO(content)).format).lower().replace("jpeg", "jpg")
        path = f"mbeir_images/{self.name}_images/{self.num_images:06}.{suffix}"
        self.num_images += 1
        file = Path(self.staging.name) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return path

    def num_queries(self) -> dict[str, int]:
        """test → number of queries."""
        return {test.task.name: len(test.rows) for test in self.tests}

    def _task(self, number: int) -> MBEIRTask:
        return parse_task(f"{self.name}_task{number}")

    def _new_ids(self) -> Iterator[str]:
        return (f"{self.dataset_id}:{number}" for number in itertools.count(1))

    def _refuse_if_taken(self) -> None:
        if any(self.root.glob(f"query/test/mbeir_{self.name}_task*")):
            raise DataError(f"{self.root} already has a data set {self.name}: choose another root or name")
        for path in sorted(self.root.glob("cand_pool/local/*.jsonl")):
            place, first = next(jsonl_rows(path), (None, {}))
            if isinstance(first, dict) and str(first.get("did")).split(":")[0] == str(self.dataset_id):
                raise DataError(f"{place} already has the dataset_id {self.dataset_id}: choose another number")

    def _write(self, folder: Path) -> None:
        for pool in self.pools:
            _write_lines(folder / f"cand_pool/local/mbeir_{pool.task.pool}_cand_pool.jsonl", map(_json, pool.rows))
        for test in self.tests:
            _write_lines(folder / f"qrels/test/mbeir_{test.task.name}_test_qrels.txt", test.qrels)
            _write_lines(folder / f"query/test/mbeir_{test.task.name}_test.jsonl", map(_json, test.rows))
        # the queries are moved last: they define which tests there are
        for part in ("mbeir_images", "cand_pool", "qrels", "query"):
            for path in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
                target = self.root / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)


class _Pool:
    """The candidates of one modality."""

    def __init__(self, data: _DataSet, task: MBEIRTask):
        self.data, self.task = data, task
        self.rows: list[dict] = []

    def add(self, source: str, *, text: str | None = None, image: str | None = None) -> str:
        """Add a candidate and return its id."""
        did = next(self.data.candidate_ids)
        row = {"did": did, "txt": text, "img_path": image, "modality": self.task.candidate}
        self.rows.append(row | {"src_content": _json({"id": source})})
        return did


class _Test:
    """The queries of one task and their right candidates."""

    def __init__(self, data: _DataSet, task: MBEIRTask):
        self.data, self.task = data, task
        self.rows: list[dict] = []
        self.qrels: list[str] = []

    def add(self, source: str, positives: list[str], *, text: str | None = None, image: str | None = None) -> None:
        """Add a query and the ids of its right candidates."""
        qid, task_number = next(self.data.query_ids), int(self.task.name[-1])
        self.rows.append(
            {
                "qid": qid,
                "query_txt": text,
                "query_img_path": image,
                "query_modality": self.task.query,
                "query_src_content": _json({"id": source}),
                "pos_cand_list": positives,
                "neg_cand_list": [],
                "task_id": task_number,
            }
        )
        self.qrels += [f"{qid} 0 {did} 1 {task_number}" for did in positives]


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
