"""Own data in M-BEIR's layout: its results are those of the nine-way evaluation and of hand calculation."""

import hashlib
import json
import math
from io import BytesIO
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from modeling_gcl import GCLModel
from modeling_gcl.rows import load_image
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.planted import PlantedModel
from tests.support.training_runs import write_parquet
from universal_gcl import cli
from universal_gcl.conversion.mbeir_folder import write_composed, write_pairs
from universal_gcl.evaluation.mbeir.measure import evaluate_mbeir, open_source, read_mbeir
from universal_gcl.evaluation.mbeir.tasks import choose_tasks
from universal_gcl.evaluation.pairs.measure import evaluate_pairs
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.sources.checks import DataError
from universal_gcl.sources.files import FEATURES


def png(red):
    file = BytesIO()
    Image.new("RGB", (3, 2), (red, 0, 0)).save(file, "png")
    return file.getvalue()


def make_pairs(counts):
    """One pair for each number of captions, as from `load_pairs`. M-BEIR's cleaning doesn't change the captions."""
    rows = {
        "id": [f"p{n}" for n in range(len(counts))],
        "image": [{"bytes": png(n), "path": None} for n in range(len(counts))],
        "captions": [[f"{n} caption {c}." for c in range(count)] for n, count in enumerate(counts)],
    }
    return datasets.Dataset.from_dict(rows, features=FEATURES)


def noise(name):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return np.random.default_rng(seed).normal(size=12)


def lean_to_its_pair(row):
    """A vector that depends on the row's content, moved towards a direction that all rows of a pair share."""
    red = str(load_image(row["image"]).getpixel((0, 0))[0]) if "image" in row else None
    pair = red or row["text"].split()[0]
    return (noise(f"{red} {row.get('text')}") + 0.8 * noise(f"pair {pair}")).tolist()


def evaluate(root, model, out):
    source = open_source(root)
    tasks = choose_tasks(None, *source.present())
    benchmark = read_mbeir(source, tasks)
    return evaluate_mbeir(
        benchmark, tasks, lambda name, rows: embed_rows(model, None, rows, out / "embeddings" / name), out
    )


def test_pairs_are_measured_as_the_nine_way_evaluation_does(tmp_path):
    pairs, model = make_pairs([5, 4, 6] * 10), PlantedModel(lean_to_its_pair)
    made = write_pairs(pairs, tmp_path / "root", name="made", dataset_id=10)
    assert made == {f"made_task{n}": 30 for n in (0, 1, 2, 3, 6)}
    result = evaluate(tmp_path / "root", model, tmp_path / "out")
    expected = evaluate_pairs(model, None, pairs)
    assert result["candidates"] == {"made_task0": 30, "made_task3": 90, "made_task2": 30}
    assert {task["direction"] for task in result["tasks"].values()} == set(expected["headline_directions"])
    for task in result["tasks"].values():
        for scope in ("local", "global"):
            rates = {f"hit@{k}": task[scope][f"hit@{k}"] for k in (1, 5, 10)}
            assert rates == pytest.approx(expected["nine_way"][task["direction"]][scope]), task["direction"]
    local, everywhere = expected["headline"]["local"], expected["headline"]["global"]
    assert 0.2 < everywhere < local < 0.95  # neither is trivial
    line = json.loads((tmp_path / "root/query/test/mbeir_made_task6_test.jsonl").read_text().splitlines()[1])
    image = line.pop("query_img_path")
    assert (tmp_path / "root" / image).read_bytes() == png(1)
    assert line == {
        "qid": "10:10",
        "query_txt": "1 caption 1.",
        "query_modality": "image,text",
        "query_src_content": '{"id": "p1"}',
        "pos_cand_list": ["10:7", "10:8"],
        "neg_cand_list": [],
        "task_id": 6,
    }


COMPOSED = [
    {"ref": "p2", "text": "22 more.", "targets": ["p3"], "title": "x"},
    {"ref": "p5", "text": "5 less.", "targets": ["p4", "p1"]},
]


def write_queries(path, queries=COMPOSED):
    path.write_text("".join(json.dumps(query) + "\n" for query in queries))
    return path


def test_composed_queries_by_hand(tmp_path):
    """Images lie at 0, 10, … 50 degrees; a query lies half-way between its image and its text."""

    def embed(row):
        angles = [10 * load_image(row["image"]).getpixel((0, 0))[0]]
        angles += [float(row["text"].split()[0])] if "text" in row else []
        return [sum(f(math.radians(angle)) for angle in angles) for f in (math.cos, math.sin)]

    queries = write_queries(tmp_path / "queries.jsonl")
    write_composed(make_pairs([1] * 6), queries, tmp_path / "root", name="made", dataset_id=11)
    result = evaluate(tmp_path / "root", PlantedModel(embed), tmp_path / "out")
    local = result["tasks"]["made_task7"]["local"]
    # at 21 degrees p2, the query's own image, comes before p3; at 27.5 the order is p3, p2, p4, p1
    records = [json.loads(line) for line in (tmp_path / "out/records/made_task7.local.jsonl").read_text().splitlines()]
    assert [record["ranks"] for record in records] == [[2], [3, 4]]
    assert (local["candidates"], local["hit@1"], local["hit@5"]) == (6, 0, 1)
    assert result["tasks"]["made_task7"]["global"]["hit@5"] == 1


def test_two_data_sets_share_a_root(tmp_path):
    write_pairs(make_pairs([4] * 3), tmp_path, name="first", dataset_id=10)
    queries = write_queries(tmp_path / "queries.jsonl", COMPOSED[:1])
    for name, dataset_id, message in (
        ("first", 11, "already has a data set first"),
        ("second", 10, "mbeir_first_task0_cand_pool.jsonl, line 1 already has the dataset_id 10"),
        ("se/cond", 11, "the name 'se/cond' must consist of letters"),
        ("second", 9, "dataset_id 9 is one of M-BEIR's own: choose 10 or more"),
    ):
        with pytest.raises(DataError, match=message):
            write_composed(make_pairs([1] * 4), queries, tmp_path, name=name, dataset_id=dataset_id)
    write_composed(make_pairs([1] * 4), queries, tmp_path, name="second", dataset_id=11)
    result = evaluate(tmp_path, PlantedModel(lean_to_its_pair), tmp_path / "out")
    assert list(result["tasks"]) == [
        "first_task0",
        "first_task1",
        "first_task2",
        "first_task3",
        "first_task6",
        "second_task7",
    ]
    assert result["tasks"]["second_task7"]["local"]["candidates"] == 4
    assert result["tasks"]["second_task7"]["global"]["candidates"] == 3 + 6 + 3 + 4


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"targets": ["p9"]}, "line 2: there is no image 'p9'"),
        ({"ref": "p9"}, "line 2: there is no image 'p9'"),
        ({"ref": "p1"}, "line 2: 'p1' is one of its own targets"),
        ({"targets": []}, "line 2: targets must be one or more different ids"),
        ({"targets": ["p1", "p1"]}, "line 2: targets must be one or more different ids"),
        ({"text": " "}, "line 2: expected"),
        ({"ref": None}, "line 2: expected"),
        ("cut", "line 2: not valid JSON"),
    ],
)  # fmt: skip
def test_bad_queries_are_named_and_nothing_is_written(query, message, tmp_path):
    path = write_queries(tmp_path / "queries.jsonl", COMPOSED[:1])
    with path.open("a") as file:
        line = (
            '{"ref": "p0", "te' if query == "cut" else json.dumps({"ref": "p0", "text": "x", "targets": ["p1"]} | query)
        )
        file.write(line + "\n")
    with pytest.raises(DataError, match=message):
        write_composed(make_pairs([1] * 4), path, tmp_path / "root", name="made", dataset_id=11)
    assert list((tmp_path / "root").iterdir()) == []


def test_bad_pairs_are_named(tmp_path):
    with pytest.raises(DataError, match="pair 'p1' has 3 captions, but needs 4 or more"):
        write_pairs(make_pairs([4, 3]), tmp_path, name="made", dataset_id=10)
    with pytest.raises(DataError, match="there are no pairs to write"):
        write_pairs([], tmp_path, name="made", dataset_id=10)
    cut = BytesIO()
    Image.effect_noise((64, 64), 50).save(cut, "JPEG")
    for content in (b"no image", cut.getvalue()[:-500]):
        broken = [{"id": "a", "image": {"bytes": content, "path": None}, "captions": ["x"] * 4}]
        with pytest.raises(DataError, match="pair 'a': image of bytes: not a readable image"):
            write_pairs(broken, tmp_path, name="made", dataset_id=10)
    empty = write_queries(tmp_path / "queries.jsonl", [])
    with pytest.raises(DataError, match="queries.jsonl has no rows"):
        write_composed(make_pairs([1]), empty, tmp_path, name="made", dataset_id=10)
    assert [path.name for path in Path(tmp_path).iterdir()] == ["queries.jsonl"]


def test_tasks_and_pools_are_those_that_are_there():
    chosen = choose_tasks(None, ["made_task6", "made_task1"], ["made_task2", "made_task3", "made_task6", "other_task1"])
    assert [(task.name, task.pool) for task in chosen] == [("made_task1", "made_task3"), ("made_task6", "made_task6")]
    assert choose_tasks(["made_task7"], [], ["made_task3", "other_task0"])[0].pool == "made_task7"
    assert choose_tasks(None, ["cirr_task7"]) == choose_tasks(None)
    with pytest.raises(ValueError, match="made_task0.*one kind.*--tasks"):
        choose_tasks(None, ["cirr_task7", "made_task0"])


def test_the_commands_make_and_measure_a_folder(tmp_path):
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "model")
    tiny_processor("clip").save_pretrained(tmp_path / "model")
    data, root = write_parquet(tmp_path / "pairs.parquet", 6), tmp_path / "root"
    queries = write_queries(tmp_path / "queries.jsonl", [{"ref": "pair 0", "text": "red.", "targets": ["pair 3"]}])
    for arguments in (
        ["convert", "mbeir", data, root, "--name", "made", "--dataset-id", 10],
        ["convert", "mbeir", data, root, "--name", "asked", "--dataset-id", 11, "--composed", queries],
        ["evaluate", "mbeir", tmp_path / "model", "--root", root, "--out", tmp_path / "out"],
    ):
        done = CliRunner().invoke(cli.app, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["tasks"] == ["asked_task7", *(f"made_task{n}" for n in (0, 1, 2, 3, 6))]
    assert written["result"]["tasks"]["asked_task7"]["global"]["candidates"] == 6 + 6 + 12 + 6
    assert "average of 6" in done.output
