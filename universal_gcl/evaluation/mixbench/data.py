"""MixBench's files as its authors publish them: per subset a folder with queries, the mixed corpus and qrels.

- `mixed-modality-search/MixBench25`: `queries.jsonl` and `mixed_corpus.jsonl` (`query_id` or `corpus_id`, `text`,
  `image`), `qrels/qrels.tsv` (`query_id`, `corpus_id`, `score`; a header). Image paths are relative to the subset's
  `images/`, as in the authors' extraction script; where the first is not there, to the subset's folder or the root.
- `mixed-modality-search/MixBench2026`: `queries.parquet`, `mixed_corpus.parquet` (`id`, `text`, `image` with the image
  inside), without qrels: those of MixBench25 serve both.
"""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import datasets
import pyarrow.compute

from universal_gcl.sources.checks import DataError
from universal_gcl.sources.files import jsonl_rows, text_lines
from universal_gcl.sources.tables import TEXT, read_parquet

HUB_ID = "mixed-modality-search/MixBench25"
MODALITIES = ("image,text", "image", "text")
# subset → queries, and documents of each of MODALITIES
PUBLISHED = {
    "MSCOCO": (984, (328, 328, 328)),
    "Google_WIT": (1000, (1475, 1473, 1473)),
    "VisualNews": (981, (327, 327, 327)),
    "OVEN": (1000, (334, 333, 333)),
}


class Items(Sequence):
    """Queries or documents as `(id, row)`, for `retrieval.embed.embed_rows`; images in a table are read when asked for.

    Args:
        ids, texts: of all; a text may be None.
        images: for each a file, or None.
        table: the data set that holds the images of those that have True for an image.

    Attributes:
        modalities: of each, one of MODALITIES.
    """

    def __init__(self, ids: list[str], texts: list, images: list, table: datasets.Dataset | None = None):
        self.ids, self.texts, self.images, self.table = ids, texts, images, table
        self.modalities = [
            ",".join(["image"] * bool(image) + ["text"] * bool(text)) for text, image in zip(texts, images)
        ]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, number):
        row = {}
        if self.texts[number]:
            row["text"] = self.texts[number]
        if self.images[number]:
            inside = self.images[number] is True
            row["image"] = self.table[number]["image"] if inside else self.images[number]
        return self.ids[number], row

    def first(self, limit: int) -> "Items":
        return Items(self.ids[:limit], self.texts[:limit], self.images[:limit], self.table)


@dataclass(frozen=True)
class Subset:
    """
    Attributes:
        queries, corpus: all of them.
        positives: query id → the id of its one relevant document.
    """

    name: str
    queries: Items
    corpus: Items
    positives: Mapping[str, str]

    @property
    def corpus_counts(self) -> dict[str, int]:
        """Modality → how many documents."""
        return {name: self.corpus.modalities.count(name) for name in MODALITIES}

    @property
    def direction(self) -> str:
        """Of the queries' most frequent modality, to the mixed corpus."""
        modality = Counter(self.queries.modalities).most_common(1)[0][0]
        return {"image,text": "it", "image": "i", "text": "t"}[modality] + "→mixed"


def find_subsets(root: Path) -> list[str]:
    """Names of the folders in `root` that hold a mixed corpus, MixBench's own in its order.

    Raises:
        DataError: there is none.
    """
    found = {path.parent.name for suffix in ("jsonl", "parquet") for path in root.glob(f"*/mixed_corpus.{suffix}")}
    if not found:
        raise DataError(f"{root} has no SUBSET/mixed_corpus.jsonl or .parquet, such as MSCOCO/mixed_corpus.jsonl")
    return [name for name in PUBLISHED if name in found] + sorted(found - set(PUBLISHED))


def download_mixbench(hub: str, subsets: Sequence[str], revision: str | None = None) -> tuple[Path, Path]:
    """The subsets' files in the Hub's cache: the root for `read_subset`, and that of the qrels, which are MixBench25's
    where the data set has none. The folders' names are the commits.

    Raises:
        DataError: a repository can't be had.
    """
    import huggingface_hub

    def download(name, commit, patterns):
        try:
            return Path(
                huggingface_hub.snapshot_download(name, repo_type="dataset", revision=commit, allow_patterns=patterns)
            )
        except (OSError, ValueError) as error:  # errors of the Hub are OSErrors
            raise DataError(f"{name}: not to be had as a data set of the Hub (revision {commit}): {error}") from error

    root = download(hub, revision, [f"{subset}/*" for subset in subsets])
    if all((root / subset / "qrels" / "qrels.tsv").is_file() for subset in subsets):
        return root, root
    return root, download(HUB_ID, None, [f"{subset}/qrels/*" for subset in subsets])


def read_subset(root: Path, name: str, *, qrels_root: Path | None = None, check_counts: bool = True) -> Subset:
    """
    Read one subset in either layout.

    Args:
        root: folder with a folder for each subset.
        qrels_root: such a folder with the qrels; the root by default.
        check_counts: a subset that bears one of MixBench's names must be as large as the published one.

    Raises:
        DataError: (a ValueError) with file and line or row, for: a file that is missing, cut off or not as described;
            an id twice; an item with neither text nor image; an image path outside its folder; qrels of an unknown
            query or document; a query without its one relevant document, or with several.
    """
    if Path(name).name != name:
        raise DataError(f"{name!r} is no subset: name a folder in {root}")
    folder = root / name
    queries = _read_items(folder, "queries", "query_id", root)
    corpus = _read_items(folder, "mixed_corpus", "corpus_id", root)
    positives = _read_qrels((qrels_root or root) / name / "qrels" / "qrels.tsv", queries.ids, corpus.ids)
    subset = Subset(name, queries, corpus, positives)
    if check_counts and name in PUBLISHED:
        _check_counts(folder, subset)
    return subset


def _check_counts(folder, subset):
    num_queries, documents = PUBLISHED[subset.name]
    found = {"queries": len(subset.queries), **subset.corpus_counts}
    published = {"queries": num_queries, **dict(zip(MODALITIES, documents))}
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


def _read_items(folder, name, id_name, root):
    if (folder / f"{name}.jsonl").is_file():
        return _from_lines(folder / f"{name}.jsonl", id_name, root)
    if (folder / f"{name}.parquet").is_file():
        return _from_table(folder / f"{name}.parquet", id_name)
    raise DataError(f"{folder} has neither {name}.jsonl (as MixBench25) nor {name}.parquet (as MixBench2026)")


def _from_lines(path, id_name, root):
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
    files = [image and os.path.normpath(base / image) for image in images]
    for file, image, place in zip(files, images, places):
        if file is not None and not Path(file).is_relative_to(base):
            raise DataError(f"{place}: the image {image} lies outside {base}")
    return _checked(path, ids, texts, files, places)


def _image_base(folder, root, image):
    """The folder that image paths are relative to."""
    bases = [Path(os.path.abspath(base)) for base in (folder / "images", folder, root)]
    return next((base for base in bases if image is not None and (base / image).is_file()), bases[0])


def _from_table(path, id_name):
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
        raise DataError(f"{path}: the column image holds paths, not images; MixBench2026 has them inside")
    table = table.select_columns(["image"]).cast_column("image", datasets.Image(decode=False))
    images = table.data.column("image")
    sizes = pyarrow.compute.binary_length(pyarrow.compute.struct_field(images, "bytes")).to_pylist()
    names = pyarrow.compute.struct_field(images, "path").to_pylist()
    for size, name, place in zip(sizes, names, places):
        if not size and name:
            raise DataError(f"{place}: the image {name} is not inside the table, as in MixBench2026 it is")
    return _checked(
        path, columns[id_column], columns["text"], [True if size else None for size in sizes], places, table
    )


def _checked(path, ids, texts, images, places, table=None):
    if not ids:
        raise DataError(f"{path} has no rows")
    seen: dict[str, str] = {}
    for number, (value, text, image, place) in enumerate(zip(ids, texts, images, places)):
        if value is None or value == "" or not isinstance(value, (str, int)):
            raise DataError(f"{place}: the id is {value!r}; it must be a string or a whole number")
        ids[number] = str(value)
        if ids[number] in seen:
            raise DataError(f"{place}: the id {value!r} was used in {seen[ids[number]]} already")
        seen[ids[number]] = place
        if text is not None and not isinstance(text, str):
            raise DataError(f"{place}: the text must be a string or null, got {type(text).__name__}")
        texts[number] = text if text and text.strip() else None
        if texts[number] is None and not image:
            raise DataError(f"{place}: {value!r} has neither a text nor an image")
    return Items(ids, texts, images, table)


def _read_qrels(path, query_ids, corpus_ids):
    if not path.is_file():
        raise DataError(
            f"there is no {path}; MixBench2026 has none: take those of {HUB_ID} (option --qrels ROOT_OF_MIXBENCH25)"
        )
    lines = [line.rstrip("\r\n") for line in text_lines(path)]
    if not lines or lines[0].split("\t") != ["query_id", "corpus_id", "score"]:
        raise DataError(f"{path}, line 1: expected the header query_id, corpus_id, score with tabs between")
    queries, documents, positives = set(query_ids), set(corpus_ids), {}
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
                f"{place}: query {query!r} has a relevant document already, {positives[query]!r}. MixBench has one "
                "each: with several, its authors' nDCG is not the standard one. For such data use gcl evaluate mbeir"
            )
        positives[query] = document
    without = [name for name in query_ids if name not in positives]
    if without:
        raise DataError(f"{path}: {len(without)} queries have no relevant document, e.g. {without[0]!r}")
    return positives
