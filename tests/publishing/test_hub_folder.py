"""Everything the folder promises is in it, and a failure leaves no card that says it is complete."""

import json

import pytest
import yaml

from universal_gcl.publishing.hub_folder import write_hub_folder

RECIPE = "model:\n  encoder: towers  # a comment\n"


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "README.md").write_text("an older card")
    return folder


def test_gathers_everything(folder, facts, tmp_path):
    (tmp_path / "heat.png").write_bytes(b"heat")
    (folder / "pictures").mkdir()
    (folder / "pictures" / "modality_pca.png").write_bytes(b"pca")
    pictures = {"nine_way": tmp_path / "heat.png", "modality_pca": folder / "pictures" / "modality_pca.png"}
    results = {"before": facts.results_before, "after": facts.results_after}
    assert write_hub_folder(folder, facts=facts, recipe_text=RECIPE, results=results, pictures=pictures) == folder
    assert {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()} == {
        "config.json",
        "README.md",
        "card.json",
        "recipe.yaml",
        "environment.json",
        "data.json",
        "results.json",
        "pictures/nine_way.png",
        "pictures/modality_pca.png",
    }
    assert (folder / "recipe.yaml").read_text() == RECIPE
    assert json.loads((folder / "environment.json").read_text()) == facts.environment
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    assert "t→i" in (folder / "results.json").read_text(encoding="utf-8")
    first = json.loads((folder / "data.json").read_text())[0]
    assert (first["source"], first["pairs"], first["skipped"], first["revision"]) == (
        "nlphuji/flickr30k",
        29000,
        3,
        "abc123",
    )
    card = (folder / "README.md").read_text()
    assert "](pictures/nine_way.png)" in card and "](pictures/modality_pca.png)" in card
    assert (folder / "pictures" / "nine_way.png").read_bytes() == b"heat"


def test_writing_again_replaces(folder, facts):
    for runtime in (60, 120):
        facts.train_runtime = runtime
        write_hub_folder(folder, facts=facts, recipe_text=RECIPE, results={})
    assert "It took 2 min" in (folder / "README.md").read_text()
    assert not list(folder.rglob("*.partial"))


def test_bad_input_is_named(folder, facts, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"save_pretrained"):
        write_hub_folder(tmp_path, facts=facts, recipe_text=RECIPE, results={})
    with pytest.raises(ValueError, match="recipe_text is not YAML"):
        write_hub_folder(folder, facts=facts, recipe_text="a: [", results={})
    with pytest.raises(TypeError, match="must be a YAML mapping, got str"):
        write_hub_folder(folder, facts=facts, recipe_text="hub_configs/quickstart.yaml", results={})
    assert (folder / "README.md").read_text() == "an older card"  # refused before anything is touched
    with pytest.raises(FileNotFoundError, match=r"pictures\['nine_way'\].*gone\.png does not exist"):
        write_hub_folder(
            folder, facts=facts, recipe_text=RECIPE, results={}, pictures={"nine_way": tmp_path / "gone.png"}
        )


def test_failure_leaves_no_card(folder, facts):
    with pytest.raises(ValueError, match=r"results\.json cannot be written"):
        write_hub_folder(folder, facts=facts, recipe_text=RECIPE, results={"loss": float("nan")})
    assert not (folder / "README.md").exists()
    assert not (folder / "results.json").exists()
    facts.command = ""
    with pytest.raises(ValueError, match=r"CardFacts\.command"):
        write_hub_folder(folder, facts=facts, recipe_text=RECIPE, results={})
    assert not (folder / "README.md").exists()
    assert yaml.safe_load((folder / "recipe.yaml").read_text()) == {"model": {"encoder": "towers"}}
