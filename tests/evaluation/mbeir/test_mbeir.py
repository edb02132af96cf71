"""M-BEIR by hand: both layouts, planted embeddings, and each rule that changes a figure."""

import json
import math
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.mbeir_folders import PROMPTS, made_benchmark, planted_vector, write_mirrors, write_original
from tests.support.planted import PlantedModel
from universal_gcl.cli import app
from universal_gcl.evaluation.mbeir.measure import evaluate_mbeir, open_source, read_mbeir
from universal_gcl.evaluation.mbeir.report import mbeir_table
from universal_gcl.evaluation.mbeir.tasks import TASKS, choose_tasks, clean_text, instructed_text
from universal_gcl.retrieval.embed import embed_rows
from universal_gcl.sources.tables import read_parquet


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return write_original(tmp_path_factory.mktemp("original"), made_benchmark())


@pytest.fixture
def root(original, tmp_path):
    """A copy that a test may break."""
    shutil.copytree(original, tmp_path / "M-BEIR")
    return tmp_path / "M-BEIR"


def run(source, out, names=None, scopes=("local", "global"), skip_unreadable=False, limit=None, **options):
    tasks = choose_tasks(names)
    benchmark = read_mbeir(source, tasks, scopes=scopes, limit=limit, **options)
    model = PlantedModel(planted_vector)

    def embed(name, rows):
        model.calls.append(name)
        return embed_rows(model, None, rows, out / "embeddings" / name, on_error="skip" if skip_unreadable else "raise")

    options = {"scopes": scopes, "skip_unreadable": skip_unreadable, "limit": limit}
    return evaluate_mbeir(benchmark, tasks, embed, out, **options), model.calls


@pytest.fixture(scope="module")
def evaluated(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    return *run(open_source(original), out), out


def ranks(out, task, scope):
    lines = (out / "records" / f"{task}.{scope}.jsonl").read_text().splitlines()
    return [json.loads(line)["ranks"] for line in lines]


def test_cleaned_texts_and_ties_in_mscoco(evaluated):
    result, _, out = evaluated
    # 9:11 and 9:12 are equal: the positive of the second query comes after its double
    assert ranks(out, "mscoco_task0", "local") == [[1], [2]]
    local = result["tasks"]["mscoco_task0"]["local"]
    assert (local["hit@1"], local["hit@5"], local["mrr@3"], local["candidates"]) == (0.5, 1, 0.75, 3)
    assert local["ndcg@5"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert result["tasks"]["mscoco_task0"]["pool"] == "mscoco_task0_test"


def test_oven_and_infoseek_share_positives(evaluated):
    result, _, out = evaluated
    assert ranks(out, "oven_task8", "local") == [[7]] and ranks(out, "oven_task8", "global") == [[1, 8]]
    task = result["tasks"]["oven_task8"]
    assert (task["local"]["hit@5"], task["local"]["hit@10"], task["local"]["recall@10"]) == (0, 1, 0.5)
    assert (task["local"]["positives_outside"], task["global"]["positives_outside"]) == (1, 0)
    assert (task["global"]["hit@1"], task["global"]["recall@10"]) == (1, 1)


def test_the_reference_image_stays_in_the_pool(evaluated):
    result, _, out = evaluated
    # the query lies at 6°, the reference at 0°, another image at 10°, the target at 16°
    assert ranks(out, "cirr_task7", "local") == [[3]]
    assert result["tasks"]["cirr_task7"]["local"]["hit@1"] == 0


def test_a_missing_modality_counts_for_nothing(evaluated, tmp_path):
    out = evaluated[2]
    ids = json.loads((out / "embeddings" / "candidates" / "oven_task8" / "ids.json").read_text())
    rows = np.load(out / "embeddings" / "candidates" / "oven_task8" / "rows.npy")
    vectors = np.load(out / "embeddings" / "candidates" / "oven_task8" / "vectors-00000.npy")
    image_only = [math.cos(math.radians(30)), math.sin(math.radians(30))]
    for name in ("5:20", "5:21"):  # text null, and text of quotes only
        np.testing.assert_allclose(vectors[rows[ids.index(name)]], image_only, atol=1e-3)
    fused = [math.cos(math.radians(35)), math.sin(math.radians(35))]
    np.testing.assert_allclose(vectors[rows[ids.index("5:22")]], fused, atol=1e-3)


def test_each_pool_is_embedded_once_and_the_average_is_plain(evaluated):
    result, calls, _ = evaluated
    assert len(calls) == len(set(calls)) == 32
    assert [name.split("/")[1] for name in calls[16:]] == [task.name for task in TASKS]
    assert result["average"]["local"] == pytest.approx(15 / 16)  # all but oven_task8
    assert result["average"]["global"] == 1
    assert (
        result["tasks"]["cirr_task7"]["global"]["candidates"]
        == sum(result["candidates"].values())
        == 13 * 1 + 3 + 7 + 1 + 3
    )
    assert result["images"]["missing"] == 0 and result["empty"] == {}


def test_the_table_has_the_papers_rows_and_columns(evaluated):
    result = evaluated[0]
    local, world = (mbeir_table(result, scope).splitlines() for scope in ("local", "global"))
    assert local[2].split()[:3] == ["local", "pool", "hit"] and "CLIP-SF" in local[0]
    assert local[1].split() == ["CL+", "CL+", "GCL+", "CL+", "GCL+"] and local[2].split()[-1] == "Pairwise"
    assert local[3].split()[:6] == ["VisualNews", "t→i", "@5", "100.00", "16.04", "10.01"]
    assert [line.split()[2] for line in local[3:19]] == [f"@{10 if 'Fashion' in line else 5}" for line in local[3:19]]
    assert local[17].split()[:5] == ["OVEN", "it→it", "@5", "0.00", "37.45"]
    assert world[16].split() == "CIRR it→i @50 100.00 23.62 43.81 24.27 31.13 18.06 0.43 21.25".split()
    assert local[19].split()[:4] == ["average", "of", "16", "93.75"]
    assert local[19].split()[-3:] == ["28.50", "29.51", "30.42"]  # the paper prints 28.51 for the first
    assert max(map(len, local[:20])) <= 100
    markdown = mbeir_table(result, "local", markdown=True).splitlines()
    assert markdown[2].startswith("| VisualNews t→i | @5 | 100.00 | 16.04 |") and "oven_task8 1" in markdown[-1]


def test_both_layouts_give_the_same_result(evaluated, tmp_path):
    names = ["mscoco_task0", "cirr_task7", "oven_task8", "webqa_task1"]
    mirrors = write_mirrors(tmp_path / "mirrors", {name: made_benchmark()[name] for name in names})
    result, _ = run(open_source(mirrors), tmp_path / "out", names, scopes=("local",))
    for name in names:
        assert result["tasks"][name]["local"] == evaluated[0]["tasks"][name]["local"]
        embedded = [out / "embeddings" / "candidates" for out in (evaluated[2], tmp_path / "out")]
        pool = result["tasks"][name]["pool"]
        first, second = (np.load(folder / pool / "vectors-00000.npy") for folder in embedded)
        np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        (None, ""),
        ("  ", ""),
        ('""', ""),
        ('"a dog"\r', "A dog."),
        (' a "dog" \r\n', 'A "dog.'),
        ("why?", "Why?"),
        ("Stop!", "Stop!"),
        ("éa.", "Éa."),
        ('" a', " a."),  # blanks go before quotes do
    ],
)
def test_texts_are_cleaned_as_uniir_does(text, cleaned):
    assert clean_text(text) == cleaned


def test_instructions_come_before_queries_only(original):
    source = open_source(original)
    off, on = (
        read_mbeir(source, choose_tasks(list(PROMPTS)), scopes=("local",), instructions=given)
        for given in (False, True)
    )
    (news, (_, plain)), (_, (_, told)) = ([task.queries[0] for task in benchmark.tasks] for benchmark in (off, on))
    assert plain["text"] == "Make it blue!" and told["text"] == "Pick an image. make it blue!"
    assert set(news[1]) == {"image"}
    prompted = on.tasks[0].queries[0][1]
    assert set(prompted) == {"image", "text"}  # an image query has the prompt for its text
    assert prompted["text"] in ("Find the caption of this photo.", "What is the news.")
    for pool in on.pools:
        assert list(on.pools[pool]) == list(off.pools[pool])
    with pytest.raises(ValueError, match="no instruction for nights_task4"):
        read_mbeir(source, choose_tasks(["nights_task4"]), scopes=("local",), instructions=True)


def test_prompts_are_drawn_by_query():
    drawn = {qid: instructed_text(["a", "b", "c", "d"], "x", qid) for qid in map(str, range(200))}
    assert set(drawn.values()) == {"A. x.", "B. x.", "C. x.", "D. x."}
    assert drawn["7"] == instructed_text(["a", "b", "c", "d"], "x", "7")


def test_rows_are_read_when_asked_for_and_kept_in_8_bytes(original):
    benchmark = read_mbeir(open_source(original), choose_tasks(["cirr_task7"]), scopes=("local",))
    rows = benchmark.pools["cirr_task7"]
    assert rows.keys.nbytes == 8 * len(rows) == 24
    assert [name for name, _ in rows] == ["8:10", "8:11", "8:12"]


def test_a_smoke_run_keeps_the_positives_and_says_so(original, tmp_path):
    result, _ = run(open_source(original), tmp_path, ["mscoco_task0", "oven_task8"], limit=1)
    assert result["tasks"]["mscoco_task0"]["queries"] == 1 and result["limit"] == 1
    # the first candidate and the positive; of InfoSeek the first and OVEN's positive
    assert result["candidates"]["oven_task8"] == 2 and result["candidates"]["infoseek_task8"] == 2
    assert result["candidates"]["mscoco_task0_test"] == 1
    table = mbeir_table(result, "global")
    assert "A smoke run: the first 1 queries" in table and "average of 2" in table
    assert table.splitlines()[5].split()[4:] == ["–"] * 7


def test_data_of_ones_own_in_the_same_layout(tmp_path):
    made = made_benchmark()["mscoco_task0"]
    root = write_original(tmp_path / "own", {"birds_task0": made})
    result, calls = run(open_source(root), tmp_path / "out", ["birds_task0"])
    assert calls == ["candidates/birds_task0", "queries/birds_task0"]
    assert result["tasks"]["birds_task0"]["global"]["hit@1"] == 0.5
    assert [line.split() for line in mbeir_table(result, "local").splitlines()[:2]] == [
        ["local", "pool", "hit", "ours"], ["birds", "t→i", "@5", "100.00"],
    ]  # fmt: skip
    with pytest.raises(ValueError, match="birds_task0: not tasks of M-BEIR, so they have no part in its global pool"):
        choose_tasks(["birds_task0", "cirr_task7"])


def test_missing_images_are_counted_before_anything_is_embedded(root, tmp_path):
    (root / "mbeir_images" / "dog.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 of 4 images are missing, e.g. .*dog.png; .*--skip-unreadable"):
        run(open_source(root), tmp_path / "out", ["cirr_task7"], scopes=("local",))
    assert not (tmp_path / "out").exists()
    options = {"scopes": ("local",), "skip_unreadable": True}
    result, _ = run(open_source(root), tmp_path / "out", ["cirr_task7"], **options)
    assert result["images"] == {"rows": 4, "missing": 1, "examples": [str(root / "mbeir_images" / "dog.png")]}
    assert list(result["skipped"]["candidates/cirr_task7"]) == ["8:12"]
    assert ranks(tmp_path / "out", "cirr_task7", "local") == [[2]]  # the image that was second has gone
    assert "1 rows could not be read" in mbeir_table(result, "local")


def test_a_text_with_nothing_left_has_no_embedding(root, tmp_path):
    edit(root / "query/test/mbeir_mscoco_task0_test.jsonl", "is it a cat?", '\\"\\"')
    result, _ = run(open_source(root), tmp_path / "out", ["mscoco_task0"], scopes=("local",))
    assert result["empty"] == {"mscoco_task0": ["9:2"]} and result["tasks"]["mscoco_task0"]["queries"] == 2
    assert result["tasks"]["mscoco_task0"]["local"]["hit@5"] == 0.5
    assert "1 rows are empty" in mbeir_table(result, "local")


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_bytes(text.replace(old, new, 1).encode(errors="surrogateescape"))  # "\udce9" is a byte that is not UTF-8


QUERIES, POOL, QRELS = (
    "query/test/mbeir_cirr_task7_test.jsonl",
    "cand_pool/local/mbeir_cirr_task7_cand_pool.jsonl",
    "qrels/test/mbeir_cirr_task7_test_qrels.txt",
)
INSTRUCTIONS = "instructions/query_instructions.tsv"


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        (POOL, 'null}\n{"did": "8:12"', 'null}\n{"did": "8:1', "line 3: not valid JSON .*cut off"),
        (POOL, '{"did": "8:11"', '{"id": "8:11"', "line 2: no key 'did'; the keys are id, txt"),
        (POOL, '"modality": "image"', '"modality": "sound"', "line 1: the modality is 'sound', not one of image, text"),
        (POOL, '"mbeir_images/blue.png"', "null", "line 2: '8:11' is of modality image, but its image is null"),
        (POOL, "mbeir_images/blue", "../blue", "line 2: ../blue.png lies outside"),
        (POOL, "mbeir_images/blue", "a/../../blue", "line 2: .* lies outside"),
        (POOL, "mbeir_images/blue", "/blue", "line 2: /blue.png lies outside"),
        (POOL, "8:12", "8:10", "line 3: the id '8:10' is also used in .*line 1;"),
        (POOL, '"8:12"', "812", "line 3: did must be a non-empty string"),
        (QUERIES, '"make it blue!"', "7", "line 1: query_txt must be a string or null, got int"),
        (QRELS, "8:11", "8:99", "line 1: the positive '8:99' of '8:1' is in no pool"),
        (QRELS, "8:11", "5:99", "line 1: the positive '5:99' of '8:1' is in no pool"),
        (QRELS, "8:1 ", "8:7 ", "line 1: there is no query '8:7'"),
        (QRELS, "8:11 1", "8:11 0", "1 queries have no positives in the qrels, e.g. '8:1'"),
        (QRELS, " 7\n", "\n", "line 1: '8:1 0 8:11 1' is not"),
        (POOL, '{"did": "8:10"', "[" * 50_000, "line 1: not valid JSON .*recursion"),
        (QRELS, "8:11", "8:\udce9", "line 1: not UTF-8"),
        (INSTRUCTIONS, "pick", "\udce9", "line 3: not UTF-8"),
    ],
)
def test_bad_files_are_refused_with_their_line(root, file, old, new, message):
    edit(root / file, old, new)
    with pytest.raises(ValueError, match=message):
        read_mbeir(open_source(root), choose_tasks(["cirr_task7"]), scopes=("local",), instructions=True)


def test_byte_order_marks_are_no_part_of_ids_and_empty_files_are_named(root):
    for file in (QUERIES, POOL, QRELS, INSTRUCTIONS):
        (root / file).write_bytes(b"\xef\xbb\xbf" + (root / file).read_bytes())
    options = {"scopes": ("local",), "instructions": True}
    assert read_mbeir(open_source(root), choose_tasks(["cirr_task7"]), **options).tasks[0].positives == {
        "8:1": ["8:11"]
    }
    for file in (POOL, QUERIES):
        (root / file).write_text("")
        with pytest.raises(ValueError, match=f"{file} has no rows; is the file cut off"):
            read_mbeir(open_source(root), choose_tasks(["cirr_task7"]), **options)


def test_a_link_inside_the_root_may_lead_elsewhere(root, tmp_path):
    shutil.move(root / "mbeir_images", tmp_path / "disk")
    (root / "mbeir_images").symlink_to(tmp_path / "disk")
    assert read_mbeir(open_source(root), choose_tasks(["cirr_task7"]), scopes=("local",)).missing == []


def test_positives_of_the_sharing_data_sets_must_be_in_some_pool(root):
    edit(root / "qrels/test/mbeir_oven_task8_test_qrels.txt", "6:10", "6:99")
    tasks = choose_tasks(["oven_task8"])
    read_mbeir(open_source(root), tasks, scopes=("local",))  # InfoSeek's pool was not read
    with pytest.raises(ValueError, match="line 2: the positive '6:99' of '5:1' is in no pool"):
        read_mbeir(open_source(root), tasks)


def test_what_is_not_there_is_named(root, tmp_path):
    edit(root / "cand_pool/local/mbeir_nights_task4_cand_pool.jsonl", "4:2009", "8:10")
    with pytest.raises(ValueError, match="1 ids are in several pools, e.g. '8:10' in nights_task4 and cirr_task7"):
        read_mbeir(open_source(root), choose_tasks(["cirr_task7"]))
    (root / "cand_pool/local/mbeir_nights_task4_cand_pool.jsonl").unlink()
    (root / "cand_pool/local/mbeir_mscoco_task3_test_cand_pool.jsonl").unlink()
    message = "2 files are missing: .*mscoco_task3_test_cand.*nights_task4.*The global pool is that of all 16 tasks"
    with pytest.raises(FileNotFoundError, match=message):
        read_mbeir(open_source(root), choose_tasks(["cirr_task7"]))
    with pytest.raises(FileNotFoundError, match="holds neither cand_pool/"):
        open_source(tmp_path)
    with pytest.raises(ValueError, match="'cirr' is not a task: choose from visualnews_task0"):
        choose_tasks(["cirr"])


def test_bad_mirrors_are_refused(tmp_path):
    data = {"cirr_task7": made_benchmark()["cirr_task7"]}
    data["cirr_task7"]["candidates"][1] = ("8:11", None, None)
    source = open_source(write_mirrors(tmp_path, data))
    with pytest.raises(ValueError, match="row 1: '8:11' is of modality image, but its image is null"):
        read_mbeir(source, choose_tasks(["cirr_task7"]), scopes=("local",))
    corpus, qrels = (tmp_path / "mbeir_cirr_task7" / f"{part}-00000-of-00001.parquet" for part in ("corpus", "qrels"))
    paths = [{"bytes": content, "path": "/etc/hosts"} for content in (None, b"", None)]
    for file, column, values, message in (
        (corpus, "image", paths, "row 0: the image /etc/hosts is not inside the table"),
        (corpus, "image", paths[1:2] * 3, "row 0: the image /etc/hosts is not inside the table"),
        (corpus, "text", [1, 2, 3], "the column text holds .*int64.*, not strings"),
        (qrels, "score", ["1"], "row 0: the score must be a number, got '1'"),
        (qrels, "score", [None], "row 0: the score must be a number, got None"),
    ):
        whole = pq.read_table(file)
        pq.write_table(whole.set_column(whole.column_names.index(column), column, pa.array(values)), file)
        with pytest.raises(ValueError, match=message):
            read_mbeir(source, choose_tasks(["cirr_task7"]), scopes=("local",))
        pq.write_table(whole, file)
    part = corpus.rename(corpus.with_name("corpus-00000-of-00002.parquet"))
    with pytest.raises(ValueError, match=f"holds 1 of the 2 files such as {part.name}: fetch the rest"):
        read_mbeir(source, choose_tasks(["cirr_task7"]), scopes=("local",))
    part.rename(corpus)
    (tmp_path / "mbeir_cirr_task7" / "query-00000-of-00001.parquet").unlink()
    with pytest.raises(FileNotFoundError, match=r"1 files are missing: .*query-\*.parquet"):
        read_mbeir(source, choose_tasks(["cirr_task7"]), scopes=("local",))


def test_data_sets_of_the_hub_are_named_by_task(evaluated, tmp_path, monkeypatch):
    mirrors = write_mirrors(tmp_path, {"cirr_task7": made_benchmark()["cirr_task7"]})
    asked = []

    def read(of):
        asked.append((of.path, of.name, of.split))
        return read_parquet(mirrors / of.path.split("/")[1] / f"{of.name}-00000-of-00001.parquet"), "c0ffee"

    monkeypatch.setattr("universal_gcl.evaluation.mbeir.mirrors.read_hub", read)
    source = open_source(hub="MRBench")
    result, _ = run(source, tmp_path / "out", ["cirr_task7"], scopes=("local",))
    assert result["tasks"]["cirr_task7"]["local"] == evaluated[0]["tasks"]["cirr_task7"]["local"]
    splits = {"query": "test", "corpus": "corpus", "qrels": "test"}  # as on the cards of MRBench's data sets
    assert set(asked) == {("MRBench/mbeir_cirr_task7", name, split) for name, split in splits.items()}
    assert source.settings["commits"] == {"MRBench/mbeir_cirr_task7": "c0ffee"}


def test_the_command(original, tmp_path):
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "model")
    tiny_processor("clip").save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--root", original, "--out", out, "--tasks", "cirr_task7,mscoco_task0", "--scope", "local"]
    arguments += ["--limit", 1, "--variant", "plain", "--variant", "sum"]
    done = CliRunner().invoke(app, ["evaluate", "mbeir", *map(str, [tmp_path / "model", *arguments])])
    assert done.exit_code == 0, done.output
    assert "MSCOCO t→i" in done.output and "A smoke run" in done.output
    written = json.loads((out / "sum" / "results.json").read_text())
    assert (written["protocol"], written["limit"], written["layout"]) == ("mbeir", 1, "original")
    assert written["tasks"] == ["mscoco_task0", "cirr_task7"] and written["instructions"] is False
    assert 0 <= written["result"]["average"]["local"] <= 1
    assert (out / "plain" / "table.md").read_text().startswith("| local pool | hit | ours | VISTA pretrained |")
