"""mteb's own classes of MIEB tasks on local parquet files: figures worked out by hand, the ranking of our search."""

import io
import json
import logging
import math
import sys

import datasets
import mteb
import numpy as np
import pytest
import torch
from mteb.mocks import ALL_MOCK_TASK_TEST_GRID
from mteb.models.model_meta import ModelMeta
from mteb.models.sentence_transformer_wrapper import _batch_to_modality_dicts
from mteb.types import PromptType
from PIL import Image

from modeling_gcl import GCLModel
from tests.support.backbones import random_image, tiny_encoder, tiny_model, tiny_processor
from universal_gcl import cli
from universal_gcl.evaluation.mteb.model import GCLEncoder
from universal_gcl.evaluation.mteb.tasks import measure_tasks, select_tasks, tasks_table
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.search import exact_top_k

WORDS = ("dog", "cat", "bird", "house", "sky", "grass")
FEATURES = datasets.Features(
    {name: datasets.Value("string") for name in ("id", "modality", "text")} | {"image": datasets.Image()}
)
CARD = "---\nconfigs:\n{}---\n"
CONFIG = "- config_name: {0}\n  data_files:\n  - split: test\n    path: {0}/*.parquet\n"


def one_colour(grey):
    return Image.new("RGB", (4, 4), (grey, 0, 0))


def as_png(image):
    file = io.BytesIO()
    image.save(file, "PNG")
    return {"bytes": file.getvalue(), "path": None}


@pytest.fixture
def local_task(tmp_path, monkeypatch):
    """Lets mteb's class of a task read a folder laid out like `mteb/mbeir_*` on the Hub."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def make(name, queries, corpus, qrels):
        """`queries`, `corpus`: id → (text, image), each or None; `qrels`: (query, candidate) of positives."""
        folder = tmp_path / name
        tables = {
            part: datasets.Dataset.from_list(
                [
                    {"id": key, "modality": "?", "text": text, "image": image and as_png(image)}
                    for key, (text, image) in rows.items()
                ],
                features=FEATURES,
            )
            for part, rows in (("query", queries), ("corpus", corpus))
        }
        lines = [{"query-id": query, "Q0": 0, "corpus-id": candidate, "score": 1} for query, candidate in qrels]
        tables["qrels"] = datasets.Dataset.from_list(lines)
        for part, table in tables.items():
            (folder / part).mkdir(parents=True)
            table.to_parquet(folder / part / "test-00000-of-00001.parquet")
        (folder / "README.md").write_text(CARD.format("".join(map(CONFIG.format, tables))))
        cls = type(mteb.get_task(name))
        local = {"path": str(folder), "revision": "local"}
        monkeypatch.setattr(cls, "metadata", cls.metadata.model_copy(update={"dataset": local}))
        return mteb.get_task(name)

    return make


@pytest.fixture
def planted():
    """An encoder whose vectors are points on a circle: (text or None, red of the image or None) → degrees. `rows` is
    what it was given."""

    def make(degrees, **options):
        model = tiny_model("clip", fusion="sum")

        def encode(rows, processor, batch_size, truncate_dim):
            made.rows += rows
            images = [row.get("image") and row["image"].getpixel((0, 0))[0] for row in rows]
            angles = torch.tensor([degrees[row.get("text") or None, image] for row, image in zip(rows, images)])
            return torch.stack([angles.deg2rad().cos(), angles.deg2rad().sin()], dim=1)

        model.encode = encode
        made = GCLEncoder(model, tiny_processor("clip"), "planted/table", **options)
        made.rows = []
        return made

    return make


def cirr():
    """The first query's positive is third of 12 images, the second's is last."""
    degrees = {("a red dog", 100): 0.0, ("a blue cat", 101): 110.0} | {
        (None, place): 10.0 * place for place in range(12)
    }
    queries = {"8:1": ("a red dog", one_colour(100)), "8:2": ("a blue cat", one_colour(101))}
    corpus = {f"8:{30 + place}": (None, one_colour(place)) for place in range(12)}
    return degrees, ("CIRRIT2IRetrieval", queries, corpus, [("8:1", "8:32"), ("8:2", "8:30")])


def edis():
    """Fused candidates of which the first and the third are positives; by their texts alone, the last and the third of
    the five."""
    degrees = {("Snow.", None): 0.0} | {(f"title {place}", place): 10.0 * place for place in range(5)}
    degrees |= {(f"title {place}", None): 10.0 * (5 - place) for place in range(5)}
    corpus = {f"3:{place}": (f"title {place}", one_colour(place)) for place in range(5)}
    return degrees, ("EDIST2ITRetrieval", {"3:q": ("Snow.", None)}, corpus, [("3:q", "3:0"), ("3:q", "3:2")])


def webqa():
    """Second and twelfth of 12 are positives; the first has no image and the second a blank text."""
    degrees = {("Which bird?", None): 0.0, ("passage 0", None): 0.0, (None, 1): 10.0}
    degrees |= {(f"passage {place}", place): 10.0 * place for place in range(2, 12)}
    corpus = {"2:0": ("passage 0", None), "2:1": (" ", one_colour(1))}
    corpus |= {f"2:{place}": (f"passage {place}", one_colour(place)) for place in range(2, 12)}
    return degrees, ("WebQAT2ITRetrieval", {"2:q": ("Which bird?", None)}, corpus, [("2:q", "2:1"), ("2:q", "2:11")])


def pictures(name):
    """Noise as images, for a model with random weights; each query's positive is the first candidate."""
    images = list(map(random_image, range(9)))
    queries = {f"q{n}": (f"the red {word}", images[n]) for n, word in enumerate(WORDS)}
    corpus = {f"c{n}": (None, image) for n, image in enumerate(images)}
    if name == "EDIST2ITRetrieval":
        queries = {key: (text, None) for key, (text, _) in queries.items()}
        corpus = {f"c{n}": (f"a blue {WORDS[n % 6]} runs", image) for n, image in enumerate(images)}
    return name, queries, corpus, [(key, "c0") for key in queries]


SECOND = 1 / math.log2(3)  # what a positive of rank 2 adds to DCG; rank 3: 1/2
EXPECTED = {
    "CIRRIT2IRetrieval": (cirr, {"ndcg_at_10": (0.5 + 0) / 2, "hit_rate_at_5": 0.5, "recall_at_20": 1.0}),
    "EDIST2ITRetrieval": (edis, {"ndcg_at_10": 1.5 / (1 + SECOND), "hit_rate_at_1": 1.0, "recall_at_1": 0.5}),
    "WebQAT2ITRetrieval": (webqa, {"ndcg_at_10": SECOND / (1 + SECOND), "hit_rate_at_1": 0.0, "recall_at_10": 0.5}),
}


@pytest.mark.parametrize("name", EXPECTED)
def test_figures_by_hand(name, local_task, planted, tmp_path):
    make, expected = EXPECTED[name]
    degrees, data = make()
    task = local_task(*data)
    encoder = planted(degrees)
    (result,) = measure_tasks(encoder, [task], tmp_path / "out", batch_size=4)
    scores = result["scores"]["test"]["default"]
    assert {figure: scores[figure] for figure in expected} == pytest.approx(expected, abs=1e-5)
    assert result["score"] == scores["ndcg_at_10"] and result["metric"] == "ndcg_at_10"
    assert result["dataset"] == {"path": task.metadata.dataset["path"], "revision": "local"}
    assert len(encoder.rows) == len(data[1]) + len(data[2]) and not any("instruction" in row for row in encoder.rows)
    assert tasks_table([result]).split()[-4:] == [
        name,
        result["direction"],
        "ndcg_at_10",
        f"{100 * result['score']:.2f}",
    ]
    measure_tasks(encoder, [task], tmp_path / "out")
    assert len(encoder.rows) == len(data[1]) + len(data[2])  # mteb had stored the result


def test_a_meta_of_texts_alone_is_refused_since_mteb_goes_on_without_the_images(local_task, planted, caplog):
    degrees, data = edis()
    task = local_task(*data)
    encoder = planted(degrees)
    encoder.mteb_model_meta = encoder.mteb_model_meta.model_copy(
        update={"modalities": ModelMeta.create_empty().modalities}
    )
    assert encoder.mteb_model_meta.modalities == ["text"]  # mteb's default
    with pytest.raises(ValueError, match=r"must have the modalities \['text', 'image'\], but has \['text'\]"):
        mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)

    class Unchecked(GCLEncoder):  # embeds what mteb's wrapper of sentence-transformers picks out of a batch
        def encode(self, inputs, **options):
            rows = [row for batch in inputs for row in _batch_to_modality_dicts(batch, self.mteb_model_meta.modalities)]
            return self.model.encode(rows, self.processor, batch_size=8, truncate_dim=None)

    encoder.__class__ = Unchecked
    with caplog.at_level(logging.WARNING, logger="mteb"):
        result = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)
    assert all(set(row) == {"text"} for row in encoder.rows[-6:])
    positives = 1 / math.log2(6) + 0.5  # ranks 5 and 3
    assert result.task_results[0].get_score() == pytest.approx(positives / (1 + SECOND), abs=1e-5)


@pytest.mark.parametrize("name", ["CIRRIT2IRetrieval", "EDIST2ITRetrieval"])
def test_the_ranking_is_that_of_exact_search(name, local_task, tmp_path):
    data = pictures(name)
    _, queries, corpus, _ = data
    task = local_task(*data)
    model, processor = tiny_model("clip", fusion="sum"), tiny_processor("clip")
    encoder = GCLEncoder(model, processor, "tiny/clip")
    mteb.evaluate(
        encoder, task, cache=None, prediction_folder=tmp_path, encode_kwargs={"batch_size": 4}, show_progress_bar=False
    )
    (file,) = tmp_path.glob("*predictions.json")
    found = json.loads(file.read_text())["default"]["test"]
    embeds = [
        model.encode([{"text": text, "image": image} for text, image in side.values()], processor)
        for side in (queries, corpus)
    ]
    scores, places = exact_top_k(*embeds, len(corpus))
    assert list(found) == list(queries)
    for query, ranking in enumerate(found.values()):
        assert sorted(ranking, key=ranking.get, reverse=True) == [f"c{place}" for place in places[query].tolist()]
        assert np.allclose(sorted(ranking.values(), reverse=True), scores[query], atol=1e-6)


PROMPT = "Identify the news photo for the given caption."


@pytest.mark.parametrize("prompt", [{"query": PROMPT}, PROMPT])  # mteb has a bare one for either side
def test_instructions_go_before_queries_only(prompt, local_task, planted, tmp_path):
    degrees, data = edis()
    task = local_task(*data)
    assert task.metadata.prompt == {"query": PROMPT}
    task.metadata = task.metadata.model_copy(update={"prompt": prompt})
    encoder = planted(degrees, instructions=True)
    measure_tasks(encoder, [task], tmp_path)
    instructed = [row for row in encoder.rows if "instruction" in row]
    assert [(row["text"], row["instruction"]) for row in instructed] == [("Snow.", PROMPT)]
    (file,) = tmp_path.glob("results/planted__table/*/experiments/instructions_True/EDIST2ITRetrieval.json")
    assert json.loads(file.read_text())["dataset_revision"] == "local"


@pytest.mark.parametrize(
    "kind",
    ["MockZeroShotClassification", "MockImageTextPairClassification", "MockVisionCentricQA", "MockImageClassification"],
)
def test_other_kinds_of_tasks_are_embedded_too(kind):
    (task,) = [task for task in ALL_MOCK_TASK_TEST_GRID if task.metadata.name == kind]
    encoder = GCLEncoder(tiny_model("clip", fusion="sum"), tiny_processor("clip"), "tiny/clip")
    result = mteb.evaluate(encoder, task, cache=None, show_progress_bar=False)
    assert math.isfinite(result.task_results[0].get_score())


class Batches(list):
    dataset = range(3)


@pytest.mark.parametrize(
    ("side", "batch", "message"),
    [
        (
            "document",
            {"id": ["d"], "text": ["a"]},
            "test, document: has no column 'image', though its rows have image and text",
        ),
        ("document", {"text": ["a"], "image": [None], "audio": [0]}, "holds audio, but a GCL model"),
        (None, {"label": [3]}, "test: has neither a column 'text' nor a column 'image', but 'label'"),
        ("query", {"id": ["7", "8"], "text": ["a", " "]}, "query, rows numbered from '7' on: row 1 has neither"),
    ],
)
def test_what_cannot_be_embedded_is_named(side, batch, message):
    encoder = GCLEncoder(tiny_model("clip", fusion="sum"), tiny_processor("clip"), "tiny/clip")
    metadata = mteb.get_task("EDIST2ITRetrieval").metadata
    with pytest.raises(ValueError, match=message):
        encoder.encode(
            Batches([batch]), task_metadata=metadata, hf_split="test", hf_subset="default",
            prompt_type=side and PromptType(side),
        )  # fmt: skip


def test_an_embedding_that_is_not_finite_is_named(planted):
    encoder = planted({("a", None): 0.0, ("b", None): math.nan})
    with pytest.raises(FloatingPointError, match="query: the embedding of '8' is not finite"):
        encoder.encode(
            Batches([{"id": ["7"], "text": ["a"]}, {"id": ["8"], "text": ["b"]}]),
            task_metadata=mteb.get_task("EDIST2ITRetrieval").metadata,
            hf_split="test", hf_subset="default", prompt_type=PromptType.query,
        )  # fmt: skip


def test_tasks_by_name():
    names = [task.metadata.name for task in select_tasks(["MIEB(lite)", "CIRRIT2IRetrieval", "CIRRIT2IRetrieval"])]
    assert len(set(names)) == len(names) > 40 and "CIRRIT2IRetrieval" in names
    with pytest.raises(ValueError, match=r"has no task or benchmark 'CIRRIT2I'.*CIRRIT2IRetrieval"):
        select_tasks(["CIRRIT2I"])
    with pytest.raises(ValueError, match="have audio or video, .*: Clotho"):
        select_tasks(["ClothoA2TRetrieval"])


@pytest.fixture
def model_folder(tmp_path):
    folder = tmp_path / "my model"
    GCLModel.from_encoder(tiny_encoder("clip"), fusion="sum").save_pretrained(folder)
    tiny_processor("clip").save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


def test_the_meta_describes_the_checkpoint(model_folder):
    model = GCLModel.from_pretrained(model_folder)

    def encoder(**options):
        return GCLEncoder(model, tiny_processor("clip"), model_folder, **options)

    def meta(**options):
        return encoder(**options).mteb_model_meta

    plain = meta()
    assert (plain.name, plain.license, plain.embed_dim, plain.max_tokens) == ("local/my model", "apache-2.0", 24, 16)
    assert plain.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    assert plain.modalities == ["text", "image"] and plain.experiment_kwargs is None
    assert plain.similarity_fn_name.value == "dot"
    cut = meta(truncate_dim=6, settings={"variant": "sum"})
    assert cut.embed_dim == 6 and cut.experiment_kwargs == {"variant": "sum", "truncate_dim": 6}
    assert cut.revision == plain.revision
    embeds = encoder(truncate_dim=6).encode(
        Batches([{"text": ["a dog"]}]), task_metadata=mteb.get_task("CIFAR10ZeroShot").metadata, hf_split="test",
        hf_subset="default",
    )  # fmt: skip
    assert embeds.shape == (1, 6)
    with torch.no_grad():
        model.encoder.text_projection.weight[0, 0] += 1
    assert meta().revision != plain.revision


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gcl", "evaluate", "mteb", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


def test_the_command_writes_what_it_prints_and_goes_on(local_task, model_folder, tmp_path, monkeypatch, capsys):
    names = ["CIRRIT2IRetrieval", "EDIST2ITRetrieval"]
    for name in names:
        local_task(*pictures(name))
    out = tmp_path / "out"
    options = [model_folder, "--out", out, "--variant", "plain", "--variant", "normalized_sum"]
    assert run(monkeypatch, *options, "--tasks", names[0]) == 0
    counted = []
    monkeypatch.setattr(GCLModel, "encode", count_rows(GCLModel.encode, counted))
    assert run(monkeypatch, *options, "--tasks", names[0], "--tasks", names[1]) == 0
    assert sum(counted) == 2 * (6 + 9)  # EDIS's alone, for two variants
    printed = capsys.readouterr().out
    for variant in ("plain", "normalized_sum"):
        written = json.loads((out / variant / "results.json").read_text())
        assert (written["protocol"], written["variant"], written["tasks"]) == ("mteb", variant, names)
        assert [result["task"] for result in written["result"]] == names and written["mteb"] == mteb.__version__
        for result in written["result"]:
            (file,) = (out / variant / "results").rglob(f"{result['task']}.json")
            assert json.loads(file.read_text())["scores"]["test"][0]["main_score"] == result["score"]
            assert ("experiments" in file.parts) == (variant != "plain")
            assert f"ndcg_at_10  {100 * result['score']:.2f}\n" in printed


def count_rows(encode, counted):
    def counting(self, rows, *arguments, **options):
        counted.append(len(rows))
        return encode(self, rows, *arguments, **options)

    return counting


def test_the_command_says_what_it_needs(model_folder, tmp_path, monkeypatch):
    options = [model_folder, "--out", tmp_path / "out", "--tasks", "CIRRIT2I"]
    assert "has no task or benchmark 'CIRRIT2I'" in run(monkeypatch, *options)
    monkeypatch.setattr(Processes, "__init__", lambda self: vars(self).update(rank=0, size=2))
    options[-1] = "CIRRIT2IRetrieval"
    assert "in one process" in run(monkeypatch, *options)
    monkeypatch.setitem(sys.modules, "mteb", None)
    assert "pip install 'universal-gcl[mteb]'" in run(monkeypatch, *options)
    assert not (tmp_path / "out").exists()
