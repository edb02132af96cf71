"""Own test data in M-BEIR's layout, so that `gcl evaluate mbeir` measures on it by M-BEIR's rules.

Captioned pairs become five tests, `NAME_task0` (t→i), `task1` (t→t), `task2` (t→it), `task3` (i→t) and `task6` (it→t).
`evaluation.pairs.measure` says what each caption is used for (with four captions or more); the pools are the same. The
three tests with text candidates share one pool, that of task3.

Composed queries, an image with a text that changes it, become `NAME_task7` (it→i) over all images; the query's own
image stays among them, as in CIRR and FashionIQ.

A root may hold several data sets: their pools together are the global one.
"""

import json
import os
import re
import tempfile
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from PIL import Image

from modeling_gcl import ImageError, load_image
from universal_gcl.evaluation.pairs.embeddings import caption_roles
from universal_gcl.sources.checks import DataError
from universal_gcl.sources.files import jsonl_rows

FIRST_ID = 10  # M-BEIR's own data sets have 0 to 9
MIN_CAPTIONS = 4
_TASK_IDS = {"t→i": 0, "t→t": 1, "t→it": 2, "i→t": 3, "it→t": 6, "it→i": 7}
_MODALITIES = {"i": "image", "t": "text", "it": "image,text"}


def write_pairs(pairs: Sequence[dict], root: str | Path, *, name: str, dataset_id: int) -> dict[str, int]:
    """
    Write the tests of captioned pairs.

    Args:
        pairs: as `sources.pairs.load_pairs` returns them, each with four captions or more.
        root: is made, or holds other data sets in this layout.
        name: of the data set, of letters, digits and `_`.
        dataset_id: its number, before the colon of all ids; 10 or more.

    Returns:
        test → how many queries.

    Raises:
        DataError: (a ValueError) a pair with too few captions or an image that can't be read (it is named), a name or
            number that is taken or not allowed.
    """
    roles = caption_roles(MIN_CAPTIONS)
    with _DataSet(root, name, dataset_id) as data:
        pools = {"i": data.pool("t→i"), "t": data.pool("i→t"), "it": data.pool("t→it")}
        for pair in pairs:
            pair_id, captions = pair["id"], pair["captions"]
            if len(captions) < MIN_CAPTIONS:
                raise DataError(f"pair {pair_id!r} has {len(captions)} captions, not {MIN_CAPTIONS} or more")
            image = data.add_image(pair_id, pair["image"])
            found = {
                "i": [pools["i"].add(pair_id, image=image)],
                "t": [pools["t"].add(pair_id, text=caption) for caption in captions[roles.first_text :]],
                "it": [pools["it"].add(pair_id, text=captions[roles.fused_candidate], image=image)],
            }
            text, fused = captions[roles.text_query], captions[roles.fused_query]
            queries = {"t": {"text": text}, "i": {"image": image}, "it": {"text": fused, "image": image}}
            for direction in ("t→i", "t→t", "t→it", "i→t", "it→t"):
                query, target = direction.split("→")
                data.test(direction).add(pair_id, found[target], **queries[query])
    return data.num_queries


def write_composed(
    images: Sequence[dict], queries: str | Path, root: str | Path, *, name: str, dataset_id: int
) -> dict[str, int]:
    """
    Write the test of composed queries; `root`, `name` and `dataset_id` as for `write_pairs`.

    Args:
        images: as `sources.pairs.load_pairs` returns them; captions are not used. All are candidates.
        queries: .jsonl of `{"ref": id of the query's image, "text": str, "targets": [ids of the right images]}`; other
            keys are not looked at.

    Returns:
        test → how many queries.

    Raises:
        DataError: (a ValueError) with file and line for a query that can't be read or names an unknown image; as
            `write_pairs` for the rest.
    """
    queries = Path(queries)
    with _DataSet(root, name, dataset_id) as data:
        pool, files, candidates = data.pool("it→i"), {}, {}
        for image in images:
            files[image["id"]] = data.add_image(image["id"], image["image"])
            candidates[image["id"]] = pool.add(image["id"], image=files[image["id"]])
        for place, row in jsonl_rows(queries):
            ref, text, targets = _composed(place, row)
            for wanted in (ref, *targets):
                if wanted not in files:
                    raise DataError(f"{place}: there is no image {wanted!r}")
            data.test("it→i").add(ref, [candidates[target] for target in targets], text=text, image=files[ref])
        if not data.num_queries:
            raise DataError(f"{queries} has no rows")
    return data.num_queries


def _composed(place, row):
    ref, text, targets = (row.get(key) for key in ("ref", "text", "targets")) if isinstance(row, dict) else [None] * 3
    if not isinstance(ref, str) or not isinstance(text, str) or not text.strip() or not isinstance(targets, list):
        raise DataError(f'{place}: expected {{"ref": "ID", "text": "…", "targets": ["ID", …]}}')
    if not targets or len(set(map(str, targets))) < len(targets) or not all(isinstance(name, str) for name in targets):
        raise DataError(f"{place}: targets must be ids, at least one, none twice, got {targets!r}"[:300])
    if ref in targets:
        raise DataError(f"{place}: {ref!r} is among its own targets")
    return ref, text, targets


class _DataSet:
    """Collects pools and tests of one data set; at the end of the `with` block they appear in the root, or nothing."""

    def __init__(self, root, name, dataset_id):
        self.root, self.name, self.dataset_id = Path(root), name, dataset_id
        self.pools, self.tests, self.images, self.counts = {}, {}, {}, {"did": 0, "qid": 0}

    @property
    def num_queries(self) -> dict[str, int]:
        return {f"{self.name}_task{_TASK_IDS[test.direction]}": len(test.lines) for test in self.tests.values()}

    def __enter__(self):
        if not re.fullmatch(r"[A-Za-z0-9_]+", self.name):
            raise DataError(f"the name {self.name!r} must be of letters, digits and _")
        if self.dataset_id < FIRST_ID:
            raise DataError(f"dataset_id {self.dataset_id} is one of M-BEIR's own: choose {FIRST_ID} or more")
        self._refuse_taken()
        self.root.mkdir(parents=True, exist_ok=True)
        self.staging = tempfile.TemporaryDirectory(prefix=f".{self.name}.", dir=self.root)
        return self

    def __exit__(self, kind, error, trace):
        with self.staging as folder:
            if kind is None:
                self._write(Path(folder))

    def pool(self, direction) -> "_Pool":
        return self.pools.setdefault(direction, _Pool(self, direction))

    def test(self, direction) -> "_Test":
        return self.tests.setdefault(direction, _Test(self, direction))

    def next_id(self, kind) -> str:
        self.counts[kind] += 1
        return f"{self.dataset_id}:{self.counts[kind]}"

    def add_image(self, pair_id, image) -> str:
        """Its path relative to the root."""
        try:
            load_image(image)  # to its end
        except ImageError as error:
            raise DataError(f"pair {pair_id!r}: {error}") from error
        content = image["bytes"] or Path(image["path"]).read_bytes()
        suffix = Image.open(BytesIO(content)).format.lower().replace("jpeg", "jpg")
        path = f"mbeir_images/{self.name}_images/{len(self.images):06}.{suffix}"
        self.images[pair_id] = path
        file = Path(self.staging.name) / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        return path

    def _refuse_taken(self):
        if any(self.root.glob(f"query/test/mbeir_{self.name}_task*")):
            raise DataError(f"{self.root} has a data set {self.name} already: choose another root or name")
        for path in sorted(self.root.glob("cand_pool/local/*.jsonl")):
            place, first = next(jsonl_rows(path), (None, {}))
            if isinstance(first, dict) and str(first.get("did")).split(":")[0] == str(self.dataset_id):
                raise DataError(f"{place} has the dataset_id {self.dataset_id} already: choose another number")

    def _write(self, folder):
        for pool in self.pools.values():
            path = f"cand_pool/local/mbeir_{self.name}_task{_TASK_IDS[pool.direction]}_cand_pool.jsonl"
            _write_lines(folder / path, pool.lines)
        for test in self.tests.values():
            name = f"mbeir_{self.name}_task{_TASK_IDS[test.direction]}_test"
            _write_lines(folder / "qrels" / "test" / f"{name}_qrels.txt", test.qrels)
            _write_lines(folder / "query" / "test" / f"{name}.jsonl", test.lines)
        # queries come last: they tell which tests there are
        for part in ("mbeir_images", "cand_pool", "qrels", "query"):
            for path in sorted(path for path in (folder / part).rglob("*") if path.is_file()):
                target = self.root / path.relative_to(folder)
                target.parent.mkdir(parents=True, exist_ok=True)
                os.replace(path, target)


class _Pool:
    def __init__(self, data, direction):
        self.data, self.direction, self.lines = data, direction, []

    def add(self, source, *, text=None, image=None) -> str:
        """The id of the new candidate."""
        did = self.data.next_id("did")
        row = {"did": did, "txt": text, "img_path": image, "modality": _MODALITIES[self.direction.split("→")[1]]}
        self.lines.append(_json(row | {"src_content": _json({"id": source})}))
        return did


class _Test:
    def __init__(self, data, direction):
        self.data, self.direction, self.lines, self.qrels = data, direction, [], []

    def add(self, source, positives, *, text=None, image=None):
        qid, task_id = self.data.next_id("qid"), _TASK_IDS[self.direction]
        row = {
            "qid": qid,
            "query_txt": text,
            "query_img_path": image,
            "query_modality": _MODALITIES[self.direction.split("→")[0]],
            "query_src_content": _json({"id": source}),
            "pos_cand_list": positives,
            "neg_cand_list": [],
            "task_id": task_id,
        }
        self.lines.append(_json(row))
        self.qrels += [f"{qid} 0 {did} 1 {task_id}" for did in positives]


def _json(value):
    return json.dumps(value, ensure_ascii=False)


def _write_lines(path, lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
