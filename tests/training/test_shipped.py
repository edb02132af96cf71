"""Recipes and data that come with the package: by name, from any folder, as a clone and as a wheel hold them."""

import os
import re
from pathlib import Path

import pytest

from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.training.arguments import DataArguments
from universal_gcl.training.build import read_eval_pairs
from universal_gcl.training.data import build_dataset
from universal_gcl.training.recipe import RecipeError, parse_recipe
from universal_gcl.training.shipped import find_data, find_recipe, shipped_folder, shipped_recipes

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """A working directory outside the clone."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_recipe_of_the_repository_has_a_name():
    folder = ROOT / "hub_configs"
    files = [path for path in folder.rglob("*.yaml") if path.parent.name != "accelerate"]
    assert shipped_recipes() == sorted(path.relative_to(folder).with_suffix("").as_posix() for path in files)
    assert {"finetune", "quickstart", "lcs558k/clip"} <= set(shipped_recipes())
    for name in shipped_recipes():
        assert parse_recipe([name, "--use_cpu", "--bf16", "false"]).data.train


def test_a_file_wins_over_a_name(elsewhere):
    assert find_recipe("finetune") == shipped_folder() / "finetune.yaml"
    (elsewhere / "finetune").write_text((shipped_folder() / "quickstart.yaml").read_text())
    assert find_recipe("finetune") == Path("finetune")


@pytest.mark.parametrize("name", ["quickstrat", "hub_configs/quickstart.yaml", "nowhere.yaml", "."])
def test_a_wrong_name_lists_the_right_ones(name):
    with pytest.raises(RecipeError, match=re.escape(name)) as error:
        parse_recipe([name])
    assert ", quickstart" in str(error.value) and str(Path.cwd()) in str(error.value)
    assert ("Did you mean quickstart?" in str(error.value)) == ("quickst" in name)


def test_data_under_hub_configs_is_found_in_the_package(elsewhere):
    path = "hub_configs/quickstart/openmoji_test.parquet"
    assert os.path.samefile(find_data(path), ROOT / path)
    (elsewhere / path).parent.mkdir(parents=True)
    (elsewhere / path).touch()
    assert find_data(path) == path  # the working directory's own wins
    for other in ("photos", "quickstart/openmoji_test.parquet", "hub_configs/nowhere.parquet", "/hub_configs/a"):
        assert find_data(other) == other


def test_sources_are_reported_by_the_path_in_the_recipe(monkeypatch):
    """Not by the installation's, which is the user's own business."""
    path = "hub_configs/quickstart/openmoji_test.parquet"
    data = DataArguments(train=[SourceArguments(path, limit=5)], eval=SourceArguments(path, limit=2))
    dataset, reports = build_dataset(data, seed=0)
    pairs, read = read_eval_pairs(data)
    assert (len(dataset), len(pairs)) == (5, 2)
    assert [report.path for report in (*reports, read.report)] == [path, path]
    assert dataset.names == [path]
