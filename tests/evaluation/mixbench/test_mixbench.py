"""MixBench in both published layouts, with planted embeddings and figures worked out by hand."""

import json
import math
from io import BytesIO

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_gcl import GCLModel
from modeling_gcl.rows import load_image
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.planted import PlantedModel
from universal_gcl import cli
from universal_gcl.evaluation.mixbench.data import download_mixbench, find_subsets, read_subset
from universal_gcl.evaluation.mixbench.measure import evaluate_mixbench
from universal_gcl.evaluation.mixbench.report import mixbench_table
from universal_gcl.evaluation.mixbench.subsets import PUBLISHED
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.sources.checks import DataError

# a number is an angle in degrees: a text says it, the red of an image is it, a fused item lies between its two
CORPUS = {
    "t1": (10, None),
    "i1": (None, 20),
    "f1": (10, 50),
    "t2": (40, None),
    "i2": (None, 50),
    "f2": (40, 80),
    **{f"x{angle}": (angle, None) for angle in (200, 205, 210, 215, 220, 225)},
}
# a's order is t1 i1 f1 t2 i2, b's f2 i2 t2 f1, c's t2 first; d finds t1 twelfth, which is beyond ten
QUERIES = {"a": ((0, None), "i2"), "b": ((None, 90), "f1"), "c": ((0, 84), "t2"), "d": ((150, None), "t1")}


def direction(angle):
    return np.array([math.cos(math.radians(angle)), math.sin(math.radians(angle))])


def embed_row(row):
    vector = np.zeros(2)
    if "text" in row:
        vector += direction(float(row["text"].split()[1]))
    if "image" in row:
        vector += direction(load_image(row["image"]).getpixel((0, 0))[0])
    return vector.tolist()


@pytest.fixture
def embed(tmp_path):
    return lambda name, rows: embed_rows(PlantedModel(embed_row), None, rows, tmp_path / "embeddings" / name)


def png(angle):
    file = BytesIO()
    Image.new("RGB", (3, 2), (angle, 0, 0)).save(file, "png")
    return file.getvalue()


def items():
    return {"queries": {name: item for name, (item, _) in QUERIES.items()}, "mixed_corpus": CORPUS}


def write_lines(root, subset="made"):
    """MixBench25: .jsonl, images as files; and the qrels, which serve both layouts."""
    folder = root / subset
    (folder / "images" / "photos").mkdir(parents=True)
    (folder / "qrels").mkdir()
    for (name, of), id_name in zip(items().items(), ("query_id", "corpus_id")):
        lines = []
        for key, (text, image) in of.items():
            path = "" if image is None else f"photos/{key}.png"
            if path:
                (folder / "images" / path).write_bytes(png(image))
            lines.append({id_name: key, "text": "" if text is None else f"at {text} °", "image": path})
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = ["query_id\tcorpus_id\tscore", *(f"{query}\t{positive}\t1" for query, (_, positive) in QUERIES.items())]
    (folder / "qrels" / "qrels.tsv").write_text("\n".join(lines + ["a\tt1\t0"]) + "\n")
    return folder


def write_tables(root, subset="made"):
    """MixBench2026: .parquet, images inside, no qrels."""
    (root / subset).mkdir(parents=True)
    for name, of in items().items():
        columns = {
            "id": list(of),
            "text": [None if text is None else f"at {text} °" for text, _ in of.values()],
            "image": [None if image is None else {"bytes": png(image), "path": "x.png"} for _, image in of.values()],
        }
        types = {"id": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
        table = datasets.Dataset.from_dict(columns, features=datasets.Features(types))
        table.to_parquet(root / subset / f"{name}.parquet")


@pytest.mark.parametrize("layout", ["MixBench25", "MixBench2026"])
def test_both_layouts_by_hand(layout, embed, tmp_path):
    root = tmp_path / "data"
    write_lines(root if layout == "MixBench25" else tmp_path / "other")
    if layout == "MixBench2026":
        write_tables(root)
    subset = read_subset(root, "made", qrels_root=None if layout == "MixBench25" else tmp_path / "other")
    result = evaluate_mixbench([subset], embed, tmp_path / "out")
    made = result["subsets"]["made"]
    assert (made["direction"], made["queries"], made["candidates"]) == ("t→mixed", 4, 12)
    assert made["corpus"] == {"image,text": 2, "image": 2, "text": 8}
    fifth, fourth = 1 / math.log2(6), 1 / math.log2(5)
    assert made["ndcg@10"] == pytest.approx((fifth + fourth + 1 + 0) / 4) == result["mean"]["ndcg@10"]
    assert (made["hit@1"], made["hit@5"], made["hit@10"], made["hit@50"]) == (0.25, 0.75, 0.75, 1)
    assert made["recall@5"] == 0.75 and made["mrr@12"] == pytest.approx((1 / 5 + 1 / 4 + 1 + 1 / 12) / 4)
    by_target = {
        name: (of["queries"], of["ndcg@10"], of["hit@1"], of["hit@10"]) for name, of in made["by_target"].items()
    }
    assert by_target == {
        "image,text": (1, pytest.approx(fourth), 0, 1),
        "image": (1, pytest.approx(fifth), 0, 1),
        "text": (2, 0.5, 0.5, 0.5),
    }
    line = mixbench_table(result["subsets"]).splitlines()[1].split()
    assert line == ["made", f"{100 * made['ndcg@10']:.1f}", f"{100 * fourth:.1f}", f"{100 * fifth:.1f}", "50.0"]


def test_a_limit_keeps_the_corpus_whole(embed, tmp_path):
    write_lines(tmp_path / "data")
    result = evaluate_mixbench([read_subset(tmp_path / "data", "made")], embed, tmp_path / "out", limit=2)
    made = result["subsets"]["made"]
    assert (result["limit"], made["queries"], made["candidates"]) == (2, 2, 12)
    assert made["ndcg@10"] == pytest.approx((1 / math.log2(6) + 1 / math.log2(5)) / 2)
    assert made["by_target"]["text"] == {"queries": 0, "ndcg@10": None, "hit@1": None, "hit@10": None}
    assert mixbench_table(result["subsets"]).splitlines()[1].split()[-1] == "–"


def test_published_subsets_must_be_complete(tmp_path):
    write_lines(tmp_path, "OVEN")
    with pytest.raises(DataError, match="not the published OVEN: it has 4 of 1000 queries, 2 of 334 image,text doc"):
        read_subset(tmp_path, "OVEN")
    assert len(read_subset(tmp_path, "OVEN", check_counts=False).queries) == 4
    assert sum(sum(documents.values()) for _, documents in PUBLISHED.values()) == 984 + 4421 + 981 + 1000


def test_subsets_are_found(tmp_path):
    for name, write in {"own": write_lines, "OVEN": write_tables, "MSCOCO": write_lines}.items():
        write(tmp_path, name)
    assert find_subsets(tmp_path) == ["MSCOCO", "OVEN", "own"]
    with pytest.raises(DataError, match="has no SUBSET/mixed_corpus.jsonl"):
        find_subsets(tmp_path / "own")


@pytest.mark.parametrize("base", ["made", "."])
def test_images_beside_the_lists_or_below_the_root(base, tmp_path):
    folder = write_lines(tmp_path)
    (folder / "images" / "photos").rename(tmp_path / base / "photos")
    row = read_subset(tmp_path, "made").corpus[1][1]
    assert load_image(row["image"]).getpixel((0, 0)) == (20, 0, 0)


@pytest.mark.parametrize(
    ("file", "line", "message"),
    [
        ("mixed_corpus.jsonl", '{"corpus_id": "z", "te', r"mixed_corpus.jsonl, line 13: not valid JSON .* cut off"),
        ("mixed_corpus.jsonl", '{"corpus_id": "t1", "text": "x"}', "13: the id 't1' is also used in .*, line 1"),
        ("mixed_corpus.jsonl", '{"corpus_id": "z", "text": " ", "image": ""}', "line 13: 'z' has neither a text"),
        ("mixed_corpus.jsonl", '{"corpus_id": "z", "image": "../../../x.png"}', "line 13: .*x.png lies outside"),
        ("mixed_corpus.jsonl", '{"corpus_id": "z", "text": 3}', "line 13: the text must be a string or null, got int"),
        ("mixed_corpus.jsonl", '{"corpus_id": "z", "image": 3}', "line 13: the image must be a path or null, got int"),
        ("mixed_corpus.jsonl", '{"text": "x"}', "line 13: expected an object with corpus_id"),
        ("mixed_corpus.jsonl", '{"corpus_id": null, "text": "x"}', "line 13: the id is None"),
        ("queries.jsonl", '{"query_id": "z", "text": "x"}', "qrels.tsv: 1 queries have no relevant document, e.g. 'z'"),
        ("qrels/qrels.tsv", "a\tnowhere\t1", "line 7: there is no document 'nowhere'"),
        ("qrels/qrels.tsv", "z\tt1\t1", "line 7: there is no query 'z'"),
        ("qrels/qrels.tsv", "a\tt1\t1", "line 7: query 'a' already has a relevant document, 'i2'. .* not the standard"),
        ("qrels/qrels.tsv", "a\tt1\t2", "line 7: expected a query id, a corpus id and a score of 0 or 1"),
        ("qrels/qrels.tsv", "a t1 1", "line 7: expected a query id"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(file, line, message, tmp_path):
    folder = write_lines(tmp_path)
    (folder / file).write_text((folder / file).read_text() + line + "\n")
    with pytest.raises(DataError, match=message):
        read_subset(tmp_path, "made")


def test_missing_files_are_named(tmp_path):
    folder = write_lines(tmp_path)
    (folder / "qrels" / "qrels.tsv").write_text("a\tt1\t1\n")
    with pytest.raises(DataError, match="line 1: expected the header query_id, corpus_id, score"):
        read_subset(tmp_path, "made")
    (folder / "qrels" / "qrels.tsv").unlink()
    with pytest.raises(DataError, match=r"no .*qrels.tsv. MixBench2026 has no qrels: use those of mixed-modality"):
        read_subset(tmp_path, "made")
    (folder / "queries.jsonl").unlink()
    with pytest.raises(DataError, match="has neither queries.jsonl .* nor queries.parquet"):
        read_subset(tmp_path, "made")


def test_bad_tables_are_named(tmp_path):
    write_tables(tmp_path)
    file = tmp_path / "made" / "queries.parquet"
    rows = {"id": ["a"], "text": ["x"], "image": ["photo.png"]}
    for columns, message in {
        ("id", "text"): "no column 'image'; columns: id, text",
        ("id", "text", "image"): "the column image holds paths",
    }.items():
        datasets.Dataset.from_dict({name: rows[name] for name in columns}).to_parquet(file)
        with pytest.raises(DataError, match=message):
            read_subset(tmp_path, "made")
    outside = datasets.Dataset.from_dict(rows | {"image": [{"bytes": None, "path": "photo.png"}]})
    outside.to_parquet(file)
    with pytest.raises(DataError, match="row 0: the image photo.png is not inside the table"):
        read_subset(tmp_path, "made")
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(DataError, match="queries.parquet: not a readable parquet file"):
        read_subset(tmp_path, "made")


def test_an_image_that_is_gone_is_named(embed, tmp_path):
    folder = write_lines(tmp_path / "data")
    (folder / "images" / "photos" / "i2.png").unlink()
    subset = read_subset(tmp_path / "data", "made")
    with pytest.raises(ValueError, match=r"row 'i2': .*i2.png: no such file"):
        evaluate_mixbench([subset], embed, tmp_path / "out")


def test_the_command_measures_what_the_model_encodes(tmp_path):
    write_lines(tmp_path / "data")
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "model")
    tiny_processor("clip").save_pretrained(tmp_path / "model")
    arguments = ["evaluate", "mixbench", tmp_path / "model", "--root", tmp_path / "data", "--out", tmp_path / "out"]
    arguments += ["--subsets", "made, made", "--variant", "plain", "--variant", "sum"]
    done = CliRunner().invoke(cli.app, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    subset = read_subset(tmp_path / "data", "made")
    for fusion in ("plain", "sum"):
        written = json.loads((tmp_path / "out" / fusion / "results.json").read_text())
        assert (written["protocol"], written["subsets"], written["variant"]) == ("mixbench", ["made"], fusion)
        options = {} if fusion == "plain" else {"fusion": fusion}
        model = GCLModel.from_pretrained(tmp_path / "model", **options).eval()
        queries, corpus = (
            model.encode([row for _, row in items], tiny_processor("clip")) for items in (subset.queries, subset.corpus)
        )
        # stored as float16; its tokenizer knows no numbers, so that texts are equal, and come in their order
        scores, gain = queries.half().double() @ corpus.half().double().T, 0.0
        for name, order in zip(subset.queries.ids, scores.argsort(dim=1, descending=True, stable=True).tolist()):
            rank = 1 + order.index(subset.corpus.ids.index(subset.positives[name]))
            gain += 1 / math.log2(1 + rank) if rank <= 10 else 0
        assert written["result"]["mean"]["ndcg@10"] == pytest.approx(gain / 4)
        assert f"{100 * gain / 4:.1f}" in done.output


def test_one_of_root_and_hub(tmp_path):
    done = CliRunner().invoke(cli.app, ["evaluate", "mixbench", "model", "--out", str(tmp_path)])
    assert done.exit_code and str(done.exception) == "give either --root or --hub"


def test_qrels_come_from_the_other_data_set_where_one_has_none(tmp_path, monkeypatch):
    write_tables(tmp_path / "MixBench2026" / "commit")
    write_lines(tmp_path / "MixBench25" / "commit")
    calls = []

    def snapshot_download(name, *, repo_type, revision, allow_patterns):
        calls.append((name, repo_type, revision, allow_patterns))
        return str(tmp_path / name.split("/")[1] / "commit")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    root, qrels = download_mixbench("mixed-modality-search/MixBench2026", ["made"], "main")
    assert calls == [
        ("mixed-modality-search/MixBench2026", "dataset", "main", ["made/*"]),
        ("mixed-modality-search/MixBench25", "dataset", None, ["made/qrels/*"]),
    ]
    assert len(read_subset(root, "made", qrels_root=qrels).positives) == 4
    assert download_mixbench("mixed-modality-search/MixBench25", ["made"])[1] == tmp_path / "MixBench25" / "commit"
