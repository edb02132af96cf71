"""MixBench's files as its authors publish them: one folder per subset with queries, the mixed corpus and qrels.

- `mixed-modality-search/MixBench25` has `queries.jsonl` and `mixed_corpus.jsonl` (`query_id` or `corpus_id`, `text`,
  `image`) and `qrels/qrels.tsv` (`query_id`, `corpus_id`, `score`, with a header). Image paths are relative to the
  subset's `images/`, as in the authors' extraction script; if the first image isn't there, to the subset's folder or to
  the root.
- `mixed-modality-search/MixBench2026` has `queries.parquet` and `mixed_corpus.parquet` (`id`, `text`, `image` with the
  image inside) and no qrels: those of MixBench25 fit both.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow.compute

from modeling_gcl.modalities import IN_DATA, direction
from universal_gcl.evaluation.mixbench.subsets import COLUMNS, HUB_ID, PUBLISHED
from universal_gcl.sources.checks import DataError
from universal_gcl.sources.files import jsonl_rows, text_lines
from universal_gcl.sources.paths import path_inside
from universal_gcl.sources.tables import TEXT, read_parquet


class Items(Sequence):
    """Queries or documents as `(id, row)`, for `retrieval.embed.embed_rows`; images in a table are read when needed.

    Args:
        ids, texts: those of all items. A text may be None.
        images: for each item a file, True for an image in the table, or None.
        table: the data set that holds the images of items with True.

    Attributes:
        modalities: the modality of each item, `"i"`, `"t"` or `"it"`.
    """

    def __init__(
        self,
        ids: list[str],
        texts: list[str | None],
        images: list[str | bool | None],
        table: datasets.Dataset | None = None,
    ):
        self.ids, self.texts, self.images, self.table = ids, texts, images, table
        self.modalities = ["i" * bool(image) + "t" * bool(text) for text, image in zip(texts, images)]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, number: int) -> tuple[str, dict]:  # type: ignore[override]  # no slices
        row: dict = {}
        if self.texts[number]:
            row["text"] = self.texts[number]
        image = self.images[number]
        if self.table is not None and image is True:
            row["image"] = self.table[number]["image"]
        elif image:
            row["image"] = image
        return self.ids[number], row

    def first(self, limit: int) -> "Items":
        """The first items, `limit` of them."""
        return Items(self.ids[:limit], self.texts[:limit], self.images[:limit], self.table)


@dataclass(frozen=True)
class Subset:
    """
    Attributes:
        queries, corpus: all queries and all documents.
        positives: query id → the id of its one relevant document.
    """

    name: str
    queries: Items
    corpus: Items
    positives: Mapping[str, str]

    @property
    def corpus_counts(self) -> dict[str, int]:
        """Modality, as in data sets → number of documents."""
        return {IN_DATA[modality]: self.corpus.modalities.count(modality) for modality in COLUMNS}

    @property
    def direction(self) -> str:
        """From the most frequent modality of the queries to the mixed corpus, e.g. `"t→mixed"`."""
        return direction(Counter(self.queries.modalities).most_common(1)[0][0], "mixed")


def find_subsets(root: Path) -> list[str]:
    """Names of the folders in `root` that hold a mixed corpus; MixBench's own come first, in its order.

    Raises:
        DataError: there is no such folder.
    """
    found = {path.parent.name for suffix in ("jsonl", "parquet") for path in root.glob(f"*/mixed_corpus.{suffix}")}
    if not found:
        raise DataError(f"{root} has no SUBSET/mixed_corpus.jsonl or .parquet, such as MSCOCO/mixed_corpus.jsonl")
    return [name for name in PUBLISHED if name in found] + sorted(found - set(PUBLISHED))


def download_mixbench(hub: str, subsets: Sequence[str], revision: str | None = None) -> tuple[Path, Path]:
    """Download the subsets' files into the Hub's cache.

    Args:
        hub: id of the data set.
        revision: branch, tag or commit.

    Returns:
        the root for `read_subset`, and the root of the qrels, which are MixBench25's if the data set has none. The
        folders' names are the commits.

    Raises:
        DataError: a repository can't be downloaded.
    """

    def download(name: str, commit: str | None, patterns: list[str]) -> Path:
        try:
            return Path(
                huggingface_hub.snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=patterns)
            )
        except (OSError, ValueError) as error:  # errors of the Hub are OSErrors
            raise DataError(
                f"{name} can't be downloaded from the Hub as a data set (revision {commit}): {error}"
            ) from error

    root = download(hub, revision, [f"{subset}/*" for subset in subsets])
    if all((root / subset / "qrels" / "qrels.tsv").is_file() for subset in subsets):
        return root, root
    return root, download(HUB_ID, None, [f"{subset}/qrels/*" for subset in subsets])


def read_subset(root: Path, name: str, *, qrels_root: Path | None = None, check_counts: bool = True) -> Subset:
    """
    Read one subset in either layout.

    Args:
        root: folder with a folder for each subset.
        qrels_root: a folder laid out in the same way that holds the qrels; default: the root.
        check_counts: refuse a subset that has one of MixBench's names, but not its published size.

    Raises:
        DataError: (a ValueError) a file is missing, cut off or of another form; an id is repeated; an item has neither
            text nor image; the path of an image leaves its folder; the qrels name an unknown query or document; or a
            query has no relevant document, or several. The message names the file, and the line or row.
    """
    if Path(name).name != name:
        raise DataError(f"{name!r} is not a subset: name a folder in {root}")
    folder = root / name
    queries = _read_items(folder, "queries", "query_id", root)
    corpus = _read_items(folder, "mixed_corpus", "corpus_id", root)
    positives = _read_qrels((qrels_root or root) / name / "qrels" / "qrels.tsv", queries.ids, corpus.ids)
    subset = Subset(name, queries, corpus, positives)
    if check_counts and name in PUBLISHED:
        _check_counts(folder, subset)
    return subset


def _check_counts(folder: Path, subset: Subset) -> None:
    num_queries, documents = PUBLISHED[subset.name]
    found = {"queries": len(subset.queries), **subset.corpus_counts}
    published = {"queries": num_queries, **{IN_DATA[modality]: count for modality, count in documents.items()}}
    differing = [
        f"{found[what]} of {number} {what if what == 'queries' else what + ' documents'}"
        for what, number in published.items()
        if found[what] != number
    ]
    if differing:
        raise DataError(
            f"{folder} is not the published {subset.name}: it has {', '.join(differing)}. Copy it again, or rename the "
            "folder if the data are your own"
        )


def _read_items(folder: Path, name: str, id_name: str, root: Path) -> Items:
    if (folder / f"{name}.jsonl").is_file():
        return _from_lines(folder / f"{name}.jsonl", id_name, root)
    if (folder / f"{name}.parquet").is_file():
        return _from_table(folder / f"{name}.parquet", id_name)
    raise DataError(f"{folder} has neither {name}.jsonl (as MixBench25) nor {name}.parquet (as MixBench2026)")


def _from_lines(path: Path, id_name: str, root: Path) -> Items:
    ids, texts, images, places = [], [], [], []
    for place, row in jsonl_rows(path):
        if not isinstance(row, dict) or (id_name not in row and "id" not in row):
            raise DataError(f"{place}: expected an object with {id_name}, text and image")
        image = row.get("image") or None
        if image is not None and not isinstance(image, str):
            raise DataError(f"{place}: the image must be a path or null, got {type(image).__name__}")
        texts.append(row.get("text"))
        images.append(image)
        ids.append(row.get(id_name, row.get("id")))
        places.append(place)
    base = _image_base(path.parent, root, next(filter(None, images), None))
    files = [image and str(path_inside(base, image, place)) for image, place in zip(images, places)]
    return _checked(path, ids, texts, files, places)


def _image_base(folder: Path, root: Path, image: str | None) -> Path:
    """The folder to which image paths are relative; `image` is the first of them."""
    bases = [Path(os.path.abspath(base)) for base in (folder / "images", folder, root)]
    return next((base for base in bases if image is not None and (base / image).is_file()), bases[0])


def _from_table(path: Path, id_name: str) -> Items:
    table = read_parquet(path)
    id_column = id_name if id_name in table.column_names else "id"
    missing = [name for name in (id_column, "text", "image") if name not in table.column_names]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; columns: {', '.join(table.column_names)}")
    columns = table.select_columns([id_column, "text"]).to_dict()
    places = [f"{path}, row {number}" for number in range(len(table))]
    if table.features["image"] == datasets.Value("null"):
        return _checked(path, columns[id_column], columns["text"], [None] * len(table), places)
    if table.features["image"] in TEXT:
        raise DataError(f"{path}: the column image holds paths; MixBench2026 has the images themselves in it")
    table = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    images = table.data.column("image")
    sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(images, "bytes")).to_pylist()
    names = pyarrow.compute.struct_field(images, "path").to_pylist()
    for size, name, place in zip(sizes, names, places):
        if not size and name:
            raise DataError(f"{place}: the image {name} is not inside the table, as it is in MixBench2026")
    return _checked(
        path, columns[id_column], columns["text"], [True if size else None for size in sizes], places, table
    )


def _checked(
    path: Path,
    ids: list,
    texts: list,
    images: list,
    places: list[str],
    table: datasets.Dataset | None = None,
) -> Items:
    """The items, with string ids and None for empty texts. Raises a DataError if `read_subset` must refuse an item."""
    if not ids:
        raise DataError(f"{path} has no rows")
    seen: dict[str, str] = {}
    for number, (value, text, image, place) in enumerate(zip(ids, texts, images, places)):
        if value is None or value == "" or not isinstance(value, (str, int)):
            raise DataError(f"{place}: the id is {value!r}; it must be a string or a whole number")
        ids[number] = str(value)
        if ids[number] in seen:
            raise DataError(f"{place}: the id {value!r} is also used in {seen[ids[number]]}")
        seen[ids[number]] = place
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: the text must be a string or null, got {type(text).__name__}")
        texts[number] = text if text and text.strip() else None
        if texts[number] is None and not image:
            raise DataError(f"{place}: {value!r} has neither a text nor an image")
    return Items(ids, texts, images, table)


def _read_qrels(path: Path, query_ids: list[str], corpus_ids: list[str]) -> dict[str, str]:
    if not path.is_file():
        raise DataError(
            f"there is no {path}. MixBench2026 has no qrels: use those of {HUB_ID} (--qrels ROOT_OF_MIXBENCH25)"
        )
    lines = [line.rstrip("\r\n") for line in text_lines(path)]
    if not lines or lines[0].split("\t") != ["query_id", "corpus_id", "score"]:
        raise DataError(f"{path}, line 1: expected the header query_id, corpus_id, score, separated by tabs")
    queries, documents = set(query_ids), set(corpus_ids)
    positives: dict[str, str] = {}
    for number, line in enumerate(lines[1:], start=2):
        place, fields = f"{path}, line {number}", line.split("\t")
        if not line.strip():
            continue
        if len(fields) != 3 or fields[2] not in ("0", "1"):
            raise DataError(f"{place}: expected a query id, a corpus id and a score of 0 or 1, got {line[:80]!r}")
        query, document, score = fields
        for what, value, known in (("query", query, queries), ("document", document, documents)):
            if value not in known:
                raise DataError(f"{place}: there is no {what} {value!r}")
        if score == "0":
            continue
        if query in positives:
            raise DataError(
                f"{place}: query {query!r} already has a relevant document, {positives[query]!r}. MixBench has one per "
                "query: with several, its authors' nDCG is not the standard one. For such data use gcl evaluate mbeir"
            )
        positives[query] = document
    without = [name for name in query_ids if name not in positives]
    if without:
        raise DataError(f"{path}: {len(without)} queries have no relevant document, e.g. {without[0]!r}")
    return positives
