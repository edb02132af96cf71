"""The card says what the facts say, has no gaps, and its metadata survives huggingface_hub."""

import re
from dataclasses import replace

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from universal_gcl.publishing import model_card
from universal_gcl.publishing.card_facts import DataSource
from universal_gcl.publishing.hub_folder import write_card
from universal_gcl.publishing.model_card import duration, losses

REQUIRED = (
    "title", "model_name", "base_model", "command", "environment", "size", "licence", "loss", "recipe",
    "training_arguments", "data", "train_runtime", "trained_parameters", "seed",
)  # fmt: skip


def test_tells_the_facts(facts, tmp_path):
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "nine_way.png").write_bytes(b"png")
    text = write_card(tmp_path, replace(facts, pictures={"nine_way": "pictures/nine_way.png"})).read_text()
    for expected in (
        "# gcl-small\n",
        'AutoModel.from_pretrained("someone/gcl-small", trust_remote_code=True)',
        "30,990 image-caption pairs with Generalized",
        "27,146,749 parameters, of which\n1,234 were trained",
        "| nlphuji/flickr30k | 29,000 | 3 | abc123 | not stated by the source |",
        "| quickstart/openmoji_train.parquet | 1,990 | 0 | not versioned | CC BY-SA 4.0 |",
        "accelerate launch train.py hub_configs/quickstart.yaml --learning_rate 1e-4\n",
        "It took 1 h 2 min 5 s on",
        "| batch size | 64 × 2 \\| all |",
        "| seed | 7 |",
        "![Hit@10 of the nine directions, before and after](pictures/nine_way.png)",
        "Evaluated on OpenMoji, test (60 pairs), before and after",
        "The weights: apache-2.0. The pairs are CC BY-SA 4.0.\n\n## Citation",
        "2509.25638",
        f"| torch | {facts.environment['packages']['torch']} |",
        f"| image processing | {facts.environment['image_backend']} |",
    ):
        assert expected in text, expected
    hits = [
        100 * result["nine_way"]["t→i"]["global"]["hit@10"] for result in (facts.results_before, facts.results_after)
    ]
    row = next(line for line in text.splitlines() if line.startswith("| t→i |"))
    assert [cell.split(" / ")[1] for cell in row.strip("| ").split(" | ")[1:]] == [f"{hit:.1f}" for hit in hits]
    assert hits[0] < hits[1]
    assert yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]) == facts.recipe


def test_leaves_no_gap(facts, tmp_path):
    text = write_card(tmp_path, facts).read_text()
    assert not re.search(r"more information needed|\{\{|\{%|\bNone\b(?!,)|\bTODO\b|nan\b", text, re.IGNORECASE)
    assert not re.search(r"\n{4,}", text)
    tables = re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE)
    assert len(tables) == 5
    for table in tables:
        bars = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(bars) == 1 and re.match(r"\|[-:| ]+\|$", table.splitlines()[1]), table


def test_metadata_survives_the_hub_library(facts, tmp_path):
    data = ModelCard.load(write_card(tmp_path, facts)).data.to_dict()
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "feature-extraction"
    assert data["license"] == "apache-2.0" and data["language"] == ["en"]
    assert data["base_model"] == ["sentence-transformers/all-MiniLM-L6-v2"]
    assert data["datasets"] == ["nlphuji/flickr30k"]
    name, results = model_index_to_eval_results(data["model-index"])
    assert name == "gcl-small"
    assert {result.dataset_type for result in results} == {"openmoji-test"}
    values = {result.metric_name: result.metric_value for result in results}
    assert len(values) == len(results) == 14
    after = facts.results_after
    assert values["headline hit@10, mean of both pools"] == pytest.approx(100 * after["headline"]["mean"], abs=0.05)
    assert values["hit@10 it→t, local pool"] == pytest.approx(
        100 * after["nine_way"]["it→t"]["local"]["hit@10"], abs=0.05
    )
    assert values["nDCG@10, mixed-modality search"] == pytest.approx(100 * after["mixed"]["ndcg@10"], abs=0.05)


@pytest.mark.parametrize("name", REQUIRED)
def test_missing_fact_is_named(facts, tmp_path, name):
    for empty in (None, {} if name == "recipe" else ""):
        with pytest.raises(ValueError, match=rf"needs CardFacts\.{name}\b"):
            write_card(tmp_path, replace(facts, **{name: empty}))
    assert not list(tmp_path.iterdir())


def test_zero_is_no_missing_fact(facts, tmp_path):
    assert write_card(tmp_path, replace(facts, seed=0, train_runtime=0.0, trained_parameters=0)).is_file()


def test_a_loss_of_ones_own_is_described_and_cited(facts, tmp_path):
    citation = "@article{me2026triplet,\n  title = {Triplets}\n}\n"
    own = {"loss": "triplet", "loss_description": "triplets (arXiv 2601.00001)", "loss_citation": citation}
    text = write_card(tmp_path, replace(facts, **own)).read_text()
    assert "image-caption pairs with triplets (arXiv 2601.00001)." in text
    citations = re.search(r"```bibtex\n(.*?)```", text, re.DOTALL)[1]
    assert citations.count("@") == 2 and citations.endswith("}\n\n@article{me2026triplet,\n  title = {Triplets}\n}\n")
    assert "@article" not in write_card(tmp_path, facts).read_text()


def test_missing_keys_are_named(facts, tmp_path):
    with pytest.raises(ValueError, match=r"CardFacts\.size\['n_embedding_parameters'\]"):
        write_card(tmp_path, replace(facts, size={"n_parameters": 1}))
    environment = {key: value for key, value in facts.environment.items() if key != "git"}
    with pytest.raises(ValueError, match=r"CardFacts\.environment\['git'\]"):
        write_card(tmp_path, replace(facts, environment=environment))
    with pytest.raises(ValueError, match=r"needs CardFacts\.eval_data and results_after together"):
        write_card(tmp_path, replace(facts, results_after=None))
    with pytest.raises(FileNotFoundError, match=r"pictures\['nine_way'\] is 'gone\.png'"):
        write_card(tmp_path, replace(facts, pictures={"nine_way": "gone.png"}))


def test_wrong_facts_are_refused(facts, tmp_path):
    with pytest.raises(ValueError, match="loss_description.*'triplet'.*gcl, cl, alignclip"):
        write_card(tmp_path, replace(facts, loss="triplet", loss_description=""))
    with pytest.raises(ValueError, match="'not a/hub/id' is no id on the Hub"):
        write_card(tmp_path, replace(facts, data=[DataSource(source="not a/hub/id", pairs=1, on_hub=True)]))
    with pytest.raises(ValueError, match="not comparable"):
        write_card(tmp_path, replace(facts, results_after=facts.results_after | {"num_pairs": 61}))
    with pytest.raises(ValueError, match="More information needed"):
        write_card(tmp_path, replace(facts, licence_note="More information needed"))


def test_unknown_template_variable_is_an_error(facts, tmp_path, monkeypatch):
    (tmp_path / "template.md").write_text("{{ facts.model_name }} {{ facts.nothing }}")
    monkeypatch.setattr(model_card, "TEMPLATE", tmp_path / "template.md")
    with pytest.raises(Exception, match="no attribute 'nothing'"):
        write_card(tmp_path, facts)


def test_without_evaluation(facts, tmp_path):
    text = write_card(tmp_path, replace(facts, eval_data=None, results_before=None, results_after=None)).read_text()
    assert "this model was not evaluated" in text and "Share of each modality" not in text
    assert "model-index" not in ModelCard(text).data.to_dict()


def test_one_caption_a_pair(facts, evaluate_random, tmp_path):
    """Directions that such data cannot measure are neither in the metadata nor an error."""
    results = [evaluate_random(noise, captions=1) for noise in (1.5, 0.5)]
    for result in results:
        result["mixed"] = {"ndcg@10": None, "seed": 0, "note": "one caption a pair"}
    path = write_card(tmp_path, replace(facts, results_before=results[0], results_after=results[1]))
    names = {result.metric_name for result in ModelCard.load(path).data.eval_results}
    assert names == {
        "headline hit@10, mean of both pools",
        *(f"headline hit@10, {pool} pool" for pool in ("local", "global")),
        *(f"hit@10 {direction}, {pool} pool" for direction in ("t→i", "i→t") for pool in ("local", "global")),
    }


def test_losses_are_told(facts, tmp_path):
    before, after = facts.results_after, facts.results_before  # the wrong way round: training made it worse
    told = losses(before, after)
    was, now = (100 * result["nine_way"]["i→t"]["local"]["hit@10"] for result in (before, after))
    assert f"i→t in the local pool: {was:.1f} → {now:.1f}" in told
    assert losses(before, before) == []
    text = write_card(tmp_path, replace(facts, results_before=before, results_after=after)).read_text()
    assert f"  - {told[0]}\n" in text
    assert "No direction lost" in write_card(tmp_path, facts).read_text()


@pytest.mark.parametrize(
    ("version", "git", "expected"),
    [
        ("0.2.0", {"sha": "abc", "dirty": False}, "0.2.0, git commit abc"),
        ("0.2.0", {"sha": "abc", "dirty": True}, "0.2.0, git commit abc, with uncommitted changes"),
        ("0.2.0", {"sha": None, "dirty": None}, "0.2.0"),  # an installation
        (None, {"sha": "abc", "dirty": False}, "version not recorded, git commit abc"),  # before version 0.2
    ],
)
def test_the_version_that_trained(version, git, expected, facts, tmp_path):
    environment = facts.environment | {"git": git}
    environment.pop("version", None)
    if version is not None:
        environment["version"] = version
    text = write_card(tmp_path, replace(facts, environment=environment)).read_text()
    assert f"| universal-gcl | {expected} |" in text


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min"), (61, "1 min 1 s"), (7200, "2 h")])
def test_duration(seconds, text):
    assert duration(seconds) == text


def test_a_run_evaluated_only_after_training_says_so(facts, tmp_path):
    text = write_card(tmp_path, replace(facts, results_before=None)).read_text()
    assert "after this training." in text and "before and after this training" not in text
    assert "| modality | after, % |" in text
    assert "was not evaluated before training" in text
    with pytest.raises(ValueError, match="results_after if it has results_before"):
        write_card(tmp_path, replace(facts, results_after=None, eval_data=None))


def test_cuts_are_named_only_where_they_were_trained(tmp_path, facts):
    write_card(tmp_path, facts)
    assert "truncate_dim" not in (tmp_path / "README.md").read_text()
    facts.matryoshka_dims = [256, 128, 64]
    write_card(tmp_path, facts)
    text = (tmp_path / "README.md").read_text()
    assert "first 128, 64 dimensions: `model.encode(..., truncate_dim=128)`" in text
