"""MMEB by the rules: sets in the original layout, made here, with results worked out by hand.

Embeddings are unit vectors in the plane whose angle can be read off: the sum of the numbers in the text, and the grey
level of the image, in degrees. So the candidate whose angle is nearest to the query's wins.
"""

import json
import re
import zipfile
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_gcl import ImageError
from modeling_gcl.rows import load_image, parse_row
from tests.support.planted import PlantedModel
from universal_gcl.evaluation.mmeb.data import Item, read_set
from universal_gcl.evaluation.mmeb.measure import evaluate_mmeb, score_queries
from universal_gcl.evaluation.mmeb.sets import CATEGORY_OF, PAPER_DIRECTIONS, chosen_sets
from universal_gcl.retrieval.embed import embed_rows

IMAGE = "<|image_1|>\nRepresent the given image.\n"


def angle(row):
    row = parse_row(row, 0)
    try:
        grey = sum(load_image(image).getpixel((0, 0))[0] for image in row.images)
    except ImageError as error:
        raise KeyError(str(error)) from error
    degrees = np.deg2rad(grey + sum(map(int, re.findall(r"\d+", row.text or ""))))
    return [np.cos(degrees), np.sin(degrees)]


@pytest.fixture
def embed(tmp_path):
    def embed(name, rows, on_error="raise"):
        return embed_rows(PlantedModel(angle), None, rows, tmp_path / "out" / "embeddings" / name, on_error=on_error)

    return embed


def write_set(root, name, rows, parts=1):
    (root / name).mkdir(parents=True)
    for part in range(parts):
        table = pa.Table.from_pylist(rows[len(rows) * part // parts : len(rows) * (part + 1) // parts])
        pq.write_table(table, root / name / f"test-{part:05}-of-{parts:05}.parquet")


def write_image(path, grey):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (4, 4), grey).save(path)


def row(text, image, texts, images):
    return {"qry_text": text, "qry_img_path": image, "tgt_text": texts, "tgt_img_path": images}


@pytest.fixture
def root(tmp_path):
    """Three sets of version 1, their images unpacked."""
    root = tmp_path / "MMEB-eval"
    for name in ("VisDial", "NIGHTS", "OK-VQA"):
        for grey in (10, 12, 20, 40, 60, 90):
            write_image(root / "images" / name / f"{grey}.png", grey)
    write_image(root / "images" / "VisDial" / "40 again.png", 40)

    def visdial(text, *greys):
        return row(text, "", [IMAGE] * len(greys), [f"VisDial/{grey}.png" for grey in greys])

    write_set(
        root,
        "VisDial",
        [
            visdial("Represent the dialogue, find the image: 10\n", 12, 40, 90),  # right
            visdial("Represent the dialogue, find the image: 50\n", 90, 40, 12),  # second, the first is third
            visdial("Represent the dialogue, find the image: 41\n", 40, "40 again", 90),  # a tie: the first, right
            visdial("Represent the dialogue, find the image: 41\n", 90, 40, "40 again"),  # a tie: the second
        ],
        parts=2,
    )
    find = "<|image_1|>\nFind a day-to-day image that looks similar to the provided image.\n"
    write_set(
        root,
        "NIGHTS",
        [
            row(find, "NIGHTS/60.png", "", ["NIGHTS/40.png", "NIGHTS/10.png"]),  # right
            row(find, "NIGHTS/12.png", "", ["NIGHTS/60.png", "NIGHTS/10.png", "NIGHTS/90.png"]),  # second of 3
        ],
    )
    ask = "<|image_1|>\nRepresent the given image with the following question: {}?\n"
    write_set(
        root,
        "OK-VQA",
        [
            row(ask.format(20), "OK-VQA/40.png", ["60", "20", "40"], ["", "", ""]),  # right: 40 + 20
            row(ask.format(5), "OK-VQA/10.png", ["15", "15"], ["", ""]),  # the same answer twice: right
            row(ask.format("how many"), "OK-VQA/90.png", ["20"], [""]),  # a single candidate: right
        ],
    )
    return root


def records(out, name):
    lines = (out / "records" / f"{name}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_version_1_by_hand(root, embed, tmp_path):
    sets = ["VisDial", "NIGHTS", "OK-VQA"]
    result = evaluate_mmeb(root, embed, tmp_path / "out", sets=sets)
    assert {name: one["precision@1"] for name, one in result["sets"].items()} == {
        "VisDial": 0.5, "NIGHTS": 0.5, "OK-VQA": 1.0,
    }  # fmt: skip
    averages = {"retrieval": 0.5, "VQA": 1.0, "all": pytest.approx(2 / 3)}
    assert result["averages"] == averages and result["skipped"] == {}
    assert (result["version"], result["instructions"], result["limit"]) == (1, True, None)
    visdial, nights, vqa = (result["sets"][name] for name in sets)
    # of one file with two names both are candidates, an image with an instruction is fused
    assert visdial == {
        "category": "retrieval", "precision@1": 0.5, "queries": 4, "candidates": 12, "distinct_candidates": 4,
        "query_kinds": {"t": 4}, "candidate_kinds": {"it": 4}, "missing_queries": 0, "missing_candidates": 0,
    }  # fmt: skip
    assert (nights["query_kinds"], nights["candidate_kinds"]) == ({"it": 2}, {"i": 4})  # "" is a list of ""
    assert (vqa["query_kinds"], vqa["candidate_kinds"]) == ({"it": 3}, {"t": 4})
    assert (nights["candidates"], nights["distinct_candidates"]) == (5, 4)
    assert (vqa["candidates"], vqa["distinct_candidates"]) == (6, 4)

    found = records(tmp_path / "out", "VisDial")
    assert [(one["query"], one["predicted"], one["rank"]) for one in found] == [
        (0, 0, 1),
        (1, 1, 3),
        (2, 0, 1),
        (3, 1, 3),
    ]
    assert [one["candidates"] for one in found] == [3] * 4
    cos = [np.cos(np.deg2rad(angle)) for angle in (2, 30, 40, 10)]
    assert found[0]["margin"] == pytest.approx(cos[0] - cos[1], abs=2e-3)
    assert found[1]["margin"] == pytest.approx(cos[2] - cos[3], abs=2e-3)
    assert found[2]["margin"] == 0
    assert records(tmp_path / "out", "OK-VQA")[2] == {
        "query": 2, "predicted": 0, "rank": 1, "margin": None, "candidates": 1,
    }  # fmt: skip


def test_limit_takes_the_first_queries_and_their_candidates_only(root, embed, tmp_path):
    result = evaluate_mmeb(root, embed, tmp_path / "out", sets=["VisDial"], limit=1)
    assert result["limit"] == 1 and result["sets"]["VisDial"]["precision@1"] == 1
    assert (result["sets"]["VisDial"]["queries"], result["sets"]["VisDial"]["distinct_candidates"]) == (1, 3)


@pytest.mark.parametrize("below", ["", "MMEB/"])
def test_images_are_read_from_the_archive_as_it_is(root, embed, tmp_path, below):
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for path in sorted((root / "images").rglob("*.png")):
            archive.write(path, below + path.relative_to(root / "images").as_posix())
    packed = read_set(root, "NIGHTS", image_root=tmp_path / "images.zip")
    plain = read_set(root, "NIGHTS")
    assert packed.query_rows()[0][1]["image"] == plain.query_rows()[0][1]["image"].read_bytes()
    (root / "images").rename(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="such as NIGHTS/60.png, are in none of .*images.zip"):
        read_set(root, "NIGHTS")
    (tmp_path / "images.zip").rename(root / "images.zip")
    result = evaluate_mmeb(root, embed, tmp_path / "out", sets=["NIGHTS"])
    assert result["sets"]["NIGHTS"]["precision@1"] == 0.5


def test_damage_within_the_archive_is_an_unreadable_image(root, embed, tmp_path):
    archive = root / "images.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for grey in (10, 12, 40, 60):  # not 90
            file.write(root / "images" / "NIGHTS" / f"{grey}.png", f"NIGHTS/{grey}.png")
    data = bytearray(archive.read_bytes())
    data[data.index(b"IDAT") + 6] ^= 0xFF  # of the first, 10.png
    archive.write_bytes(data)
    with pytest.raises(ImageError, match=r"set NIGHTS: row '0\.1 NIGHTS/10\.png': .*not a readable image"):
        evaluate_mmeb(root, embed, tmp_path / "out", sets=["NIGHTS"], limit=1)
    rows = read_set(root, "NIGHTS").candidate_rows()
    with pytest.raises(ImageError, match=r"row '1\.2 NIGHTS/90\.png': .*images\.zip:NIGHTS/90\.png: no such file"):
        embed("missing", [rows[n] for n in (0, 2, 3)])
    archive.write_bytes(data[:-100])
    with pytest.raises(ValueError, match="images.zip: not a readable zip archive"):
        read_set(root, "NIGHTS")


def test_missing_images_are_named_or_counted_and_miss(root, embed, tmp_path):
    (root / "images" / "NIGHTS" / "40.png").unlink()  # the first candidate of query 0
    (root / "images" / "NIGHTS" / "12.png").write_bytes(b"no image")  # query 1
    (root / "images" / "OK-VQA" / "10.png").unlink()  # query 1
    (root / "images" / "VisDial" / "90.png").unlink()  # a candidate, the first one of query 1 and 3
    with pytest.raises(ImageError, match=r"MMEB's set NIGHTS: row '1 NIGHTS/12\.png': .*12\.png: not a readable image"):
        evaluate_mmeb(root, embed, tmp_path / "out", sets=["NIGHTS"])
    with pytest.raises(ImageError, match=r"MMEB's set VisDial: row '0\.2 VisDial/90\.png': .*90\.png: no such file"):
        evaluate_mmeb(root, embed, tmp_path / "out", sets=["VisDial"])

    def skipping(name, rows):
        return embed("skipped/" + name, rows, "skip")

    result = evaluate_mmeb(root, skipping, tmp_path / "out", sets=["NIGHTS", "VisDial", "OK-VQA"])
    nights, visdial = result["sets"]["NIGHTS"], result["sets"]["VisDial"]
    assert (nights["missing_queries"], nights["missing_candidates"], nights["precision@1"]) == (1, 1, 0)
    assert (visdial["missing_queries"], visdial["missing_candidates"], visdial["precision@1"]) == (0, 1, 0.5)
    assert result["sets"]["OK-VQA"]["precision@1"] == 2 / 3  # of all queries
    stores = ["queries/NIGHTS", "candidates/NIGHTS", "candidates/VisDial", "queries/OK-VQA"]
    assert list(result["skipped"]) == stores
    assert list(result["skipped"]["candidates/NIGHTS"]) == ["0.0 NIGHTS/40.png"]
    missing = {"rank": None, "margin": None}
    assert records(tmp_path / "out", "NIGHTS") == [
        {"query": 0, "predicted": 1, **missing, "candidates": 2},
        {"query": 1, "predicted": None, **missing, "candidates": 3},
    ]
    assert records(tmp_path / "out", "VisDial")[0]["predicted"] == 0


def row_2(instruction, text, image, texts, images=None, target=""):
    return {
        "qry_inst": instruction, "qry_text": text, "qry_img_path": image, "tgt_inst": target, "tgt_text": texts,
        "tgt_img_path": images,
    }  # fmt: skip


@pytest.fixture
def root_2(tmp_path):
    """Four sets of version 2, their images as upstream's script unpacks them."""
    root = tmp_path / "instruct"
    for name in ("ImageNet-1K", "EDIS", "RefCOCO-Matching", "CIRR"):
        for grey in (10, 20, 40, 60):
            write_image(root / "image-tasks" / name / f"{grey}.png", grey)
    classify = "<|image_1|>\nRepresent the given image for classification \n"
    labels = ["40 labels", "20 labels", "10"]
    write_set(root, "ImageNet-1K", [row_2(classify, "", "ImageNet-1K/40.png", labels, [""], "not for texts: 500")])
    find, show = "Find a news image that matches the provided caption: ", "<|image_1|> Represent with 100 words: "
    write_set(
        root,
        "EDIS",
        [
            row_2(find, "130 and", "EDIS/none.png", ["10 a", "20 b"], ["EDIS/20.png", "EDIS/40.png"], show),
            # the text of query 0 stays with this image: 120 + 10, not 120 + 50, which would be nearer
            row_2(find, "170", "", ["50 c", "5 d"], ["EDIS/20.png", "EDIS/60.png"], show),
        ],
    )
    match = "<|image_1|> Select the portion that matches: "
    write_set(
        root,
        "RefCOCO-Matching",
        [
            row_2(match, "40", "RefCOCO-Matching/10.png", ['"60"', "60", "7"], ["RefCOCO-Matching/20.png"] * 3, IMAGE),
            row_2(match, "20", "RefCOCO-Matching/10.png", ["7", "60"], ["RefCOCO-Matching/20.png"] * 2, IMAGE),
        ],
    )
    given = row_2("<|image_1|> Given 3, find:", "17", "CIRR/20.png", [""], ["CIRR/40.png", "CIRR/20.png"], IMAGE + "2")
    # of images without a text, judged by the first, later texts are not read, but tell candidates apart
    write_set(root, "CIRR", [given, given | {"tgt_text": ["", "500"]}])
    return root


def test_version_2_joins_instruction_and_text_as_upstream(root_2, embed, tmp_path):
    sets = ["ImageNet-1K", "EDIS", "RefCOCO-Matching", "CIRR"]
    read = {name: read_set(root_2, name, version=2) for name in sets}
    imagenet, edis, refcoco, cirr = read.values()
    assert imagenet.queries == [Item("Represent the given image for classification", "", "ImageNet-1K/40.png")]
    assert imagenet.candidates == [Item("", "40 labels", ""), Item("", "20 labels", ""), Item("", "10", "")]
    show = "Represent with 100 words:"
    assert edis.queries[0] == Item("Find a news image that matches the provided caption:", "130 and", "")
    assert edis.candidates == [
        Item(show, "10 a", "EDIS/20.png"),
        Item(show, "20 b", "EDIS/40.png"),
        Item(show, "5 d", "EDIS/60.png"),
    ]
    assert [own.tolist() for own in edis.own] == [[0, 1], [0, 2]] and edis.first_seen[2] == (1, 1)
    # told apart by image and text, less its quotes
    assert [item.text for item in refcoco.candidates] == ['"60"', "7"]
    assert [own.tolist() for own in refcoco.own] == [[0, 0, 1], [1, 0]]
    assert cirr.candidates == [Item("Represent the given image.\n2", "", f"CIRR/{grey}.png") for grey in (40, 20, 20)]
    assert [own.tolist() for own in cirr.own] == [[0, 1], [0, 2]]
    assert parse_row(edis.candidate_rows()[0][1], 0).text == "Represent with 100 words: 10 a"
    assert parse_row(cirr.candidate_rows()[0][1], 0).text == "Represent the given image.\n2"

    result = evaluate_mmeb(root_2, embed, tmp_path / "out", sets=sets, version=2)
    assert {name: one["precision@1"] for name, one in result["sets"].items()} == {
        # 40 is label 40; 130 is nearest to 100 + 10 + 20, 170 to 100 + 5 + 60; 50 is between 80 and 27, 30 next to 27
        "ImageNet-1K": 1.0, "EDIS": 0.5, "RefCOCO-Matching": 0.5, "CIRR": 1.0,
    }  # fmt: skip
    assert [one["predicted"] for one in records(tmp_path / "out", "RefCOCO-Matching")] == [2, 0]
    assert result["version"] == 2 and result["sets"]["CIRR"]["candidate_kinds"] == {"it": 3}


def test_version_2_without_instructions(root_2, embed, tmp_path):
    cirr = read_set(root_2, "CIRR", version=2, instructions=False)
    assert cirr.queries[0] == Item("", "17", "CIRR/20.png") and cirr.candidates[0].kind == "i"
    result = evaluate_mmeb(root_2, embed, tmp_path / "out", sets=["CIRR", "EDIS"], version=2, instructions=False)
    assert result["instructions"] is False
    # 20 + 17 is next to 40; without the 100, the text of 130 and 170 is next to the largest sums
    assert result["sets"]["CIRR"]["precision@1"] == 1 and result["sets"]["EDIS"]["precision@1"] == 0


def spoil(root, **values):
    write_set(root, "GQA", [row("a", "", ["b"], [""]), row("a", "", ["b"], [""]) | values])


@pytest.mark.parametrize(
    "values, message",
    [
        ({"tgt_text": [], "tgt_img_path": []}, "row 1: the query has no candidates"),
        (
            {"tgt_text": ["a", "b"], "tgt_img_path": ["x", "y", "z"]},
            "row 1: tgt_text has 2 candidates and tgt_img_path 3",
        ),
        ({"qry_img_path": "../secret.png"}, r"row 1: \.\./secret\.png lies outside"),
        ({"qry_img_path": "/etc/passwd"}, "row 1: /etc/passwd lies outside"),
        ({"tgt_img_path": ["GQA/../../x.png"]}, r"row 1: GQA/\.\./\.\./x\.png lies outside"),
        ({"tgt_text": [None]}, 'row 1: tgt_text must be a list of strings, or ""'),
        ({"tgt_text": [""]}, "GQA: row '1.0': has neither an image nor a text"),
        ({"qry_text": " <|image_1|> "}, "GQA: row '1': has neither an image nor a text"),
    ],
)
def test_bad_rows_are_named(tmp_path, embed, values, message):
    spoil(tmp_path, **values)
    with pytest.raises(ValueError, match=message):
        evaluate_mmeb(tmp_path, embed, tmp_path / "out", sets=["GQA"])


def test_bad_files_are_named(root, root_2, embed, tmp_path):
    def fails(message, root=root, name="VisDial", **options):
        with pytest.raises(ValueError, match=message):
            read_set(root, name, **options)

    fails("has no set EDIS: EDIS/test-", name="EDIS")
    fails("VisDial/test-00000-of-00002.parquet is of version 1 of MMEB: use --version 1", version=2)
    fails("test-00000-of-00001.parquet is of version 2 of MMEB", root_2, "EDIS")
    fails("versions 1 and 2, not 3", version=3)
    fails("leaving them out needs version 2", instructions=False)
    fails("limit of queries is 0", limit=0)
    fails("are in none of .*nowhere", image_root=tmp_path / "nowhere")
    (root / "VisDial" / "test-00001-of-00002.parquet").unlink()
    fails("holds 1 of the 2 files")
    path = root / "NIGHTS" / "test-00000-of-00001.parquet"
    pq.write_table(pq.read_table(path).drop_columns("tgt_text"), path)
    fails("has no column tgt_text, only qry_text", name="NIGHTS")
    path.write_bytes(path.read_bytes()[:-9])
    fails("NIGHTS/test-00000-of-00001.parquet: not a readable parquet file .*cut off", name="NIGHTS")
    # all files are looked for before anything is embedded
    with pytest.raises(ValueError, match="holds 1 of the 2"):
        evaluate_mmeb(root, embed, tmp_path / "out", sets=["OK-VQA", "VisDial"])
    with pytest.raises(ValueError, match="NIGHTS/test-00000-of-00001.parquet: not a readable"):
        evaluate_mmeb(root, embed, tmp_path / "out", sets=["OK-VQA", "NIGHTS"])
    assert not (tmp_path / "out").exists()


def test_names_of_sets():
    assert chosen_sets(["paper"]) == list(PAPER_DIRECTIONS) and len(PAPER_DIRECTIONS) == 12
    assert chosen_sets(["all"]) == list(CATEGORY_OF) and len(CATEGORY_OF) == 36
    assert chosen_sets(["GQA", "paper", "OVEN"]) == ["GQA", *PAPER_DIRECTIONS]
    for name, message in (
        ("MSVD", "MSVD is a set of videos"),
        ("ViDoRe_arxivqa", "visual documents"),
        ("COCO", "'COCO'"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen_sets(["GQA", name])
    with pytest.raises(ValueError, match="no set"):
        chosen_sets([])


class Arrays:
    """What `score_queries` takes of a store."""

    def __init__(self, vectors, rows):
        self.vectors, self.rows = vectors, rows


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 7), st.sampled_from([1, 3, 64]))
def test_scores_are_those_of_exact_arithmetic(seed, num_candidates, width):
    """Against fractions and the order of Python's sort; few vectors for many candidates, so that many tie."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(4, width))
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16)
    vectors[3] = vectors[2][::-1]  # the same numbers, summed in another order
    queries = Arrays(np.stack([vectors[0], np.full(width, width**-0.5)]).astype(np.float16), np.array([0, 1, -1]))
    candidates = Arrays(vectors, rng.integers(-1, 4, 6))
    own = [rng.integers(0, 6, num_candidates) for _ in range(3)]
    for number, (record, places) in enumerate(zip(score_queries(queries, candidates, own), own)):
        row = queries.rows[number]
        exact = {
            place: sum(Fraction(float(a)) * Fraction(float(b)) for a, b in zip(queries.vectors[row], vectors[vector]))
            for place, vector in enumerate(candidates.rows[places].tolist())
            if vector >= 0 and row >= 0
        }
        best = sorted(exact, key=lambda place: (-exact[place], place))
        assert record["query"] == number and record["candidates"] == num_candidates
        assert record["predicted"] == (best[0] if best else None)
        if 0 not in exact:
            assert record["rank"] is None and record["margin"] is None
            continue
        assert record["rank"] == 1 + sum(score > exact[0] for score in exact.values())
        others = [score for place, score in exact.items() if place]
        assert record["margin"] == (float(exact[0] - max(others)) if others else None)
