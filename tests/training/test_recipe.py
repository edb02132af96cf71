"""Recipes: YAML, overrides, conversion, and the messages for what is wrong."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.training.arguments import DataArguments, ModelArguments
from universal_gcl.training.recipe import SECTIONS, RecipeError, parse_recipe
from universal_gcl.training.recipe_help import field_docs
from universal_gcl.training.recipe_values import read_yaml, write_yaml
from universal_gcl.training.training_arguments import GCLTrainingArguments

RECIPE = """\
model:
  encoder: some/encoder
  freeze: [text]
data:
  train:
    - path: photos
      limit: 10
    - photos.parquet
  eval: {path: dev.jsonl, image_root: images}
training:
  learning_rate: 1e-5
  eval_strategy: no
  lr_scheduler_kwargs: {min_lr: 1e-7}
  direction_weights: {i->it: 1}
  use_cpu: true
"""


@pytest.fixture
def write(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def write(text=RECIPE):
        (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8")
        return "recipe.yaml"

    return write


def test_recipe_fills_the_three_sections(write):
    recipe = parse_recipe([write()])
    assert recipe.model == ModelArguments("some/encoder", freeze=["text"])
    assert recipe.data == DataArguments(
        train=[SourceArguments("photos", limit=10), SourceArguments("photos.parquet")],
        eval=SourceArguments("dev.jsonl", image_root="images"),
    )
    assert recipe.training.learning_rate == 1e-5
    assert recipe.training.eval_strategy == "no"
    assert recipe.training.lr_scheduler_kwargs == {"min_lr": 1e-7}
    assert recipe.training.direction_weights == {"i→it": 1.0}


def test_command_line_wins(write):
    overrides = (
        "--learning_rate 2e-5 --training.seed=3 --max_steps -1 --bf16 false --logging-first-step --freeze image "
        "--model.revision 1234567 --data.eval.limit 5 --data.train.1.limit 7 --crop_scale null --report_to none"
    )
    recipe = parse_recipe([write(), *overrides.split(), "--direction_weights", "{i->t: 0.5}"])
    assert recipe.training.learning_rate == 2e-5
    assert recipe.training.seed == 3
    assert recipe.training.max_steps == -1
    assert recipe.training.logging_first_step is True
    assert recipe.training.direction_weights == {"i→t": 0.5}
    assert recipe.model.freeze == ["image"]
    assert recipe.model.revision == "1234567"
    assert recipe.data.eval == SourceArguments("dev.jsonl", image_root="images", limit=5)
    assert [source.limit for source in recipe.data.train] == [10, 7]
    assert recipe.data.crop_scale is None


def test_command_line_replaces_sources(write):
    recipe = parse_recipe([write(), "--train", "other", "--data.eval", "{path: dev, limit: 2}"])
    assert recipe.data.train == [SourceArguments("other")]
    assert recipe.data.eval == SourceArguments("dev", limit=2)


@pytest.mark.parametrize(
    "path",
    ["photos #1", "2024", "@x", "a: b", "[old] photos", "{x", "*", "no", "1e5", "a, b", "[a]: b", "x\ty: ["],
)
def test_sources_on_the_command_line_are_paths_as_typed(write, path):
    recipe = parse_recipe([write(), f"--train={path}", f"--eval={path}", f"--data.train.0={path}"])
    assert recipe.data.train == [SourceArguments(path)]
    assert recipe.data.eval == SourceArguments(path)


def test_sources_on_the_command_line_as_list_and_mapping(write):
    recipe = parse_recipe([write(), "--train", "[a, {path: 'b c', limit: 3}]", "--eval", "null"])
    assert recipe.data.train == [SourceArguments("a"), SourceArguments("b c", limit=3)]
    assert recipe.data.eval is None
    assert parse_recipe([write(), "--train", "{path: b, limit: 3}"]).data.train == [SourceArguments("b", limit=3)]


@pytest.mark.parametrize(
    "option, expected",
    [
        (["--resume_from_checkpoint"], True),
        (["--resume_from_checkpoint", "true"], True),
        (["--resume_from_checkpoint", "false"], False),
        (["--resume_from_checkpoint", "null"], None),
        (["--resume_from_checkpoint", "out/checkpoint-5"], "out/checkpoint-5"),
        (["--resume_from_checkpoint", "2024"], "2024"),
        (["--resume_from_checkpoint", "@x: ["], "@x: ["),
        (["--resume_from_checkpoint", "--seed", "1"], True),
        ([], None),
    ],
)
def test_resuming_from_the_last_checkpoint_or_a_path(write, option, expected):
    assert parse_recipe([write(), *option]).training.resume_from_checkpoint == expected


@pytest.mark.parametrize(
    "value, expected", [("true", True), ("out/checkpoint-5", "out/checkpoint-5"), ("'true'", "true")]
)
def test_resuming_in_the_recipe(write, value, expected):
    recipe = parse_recipe([write(f"{RECIPE}  resume_from_checkpoint: {value}\n")])
    assert recipe.training.resume_from_checkpoint == expected


@pytest.mark.parametrize(
    "encoding, line", [("latin-1", 2), ("utf-16", 1)], ids=lambda value: value if isinstance(value, str) else ""
)
def test_recipes_in_other_encodings(write, tmp_path, encoding, line):
    write()
    text = RECIPE.replace("some/encoder", "some/café").replace("photos.parquet", "fotos_é.parquet")
    (tmp_path / "recipe.yaml").write_text(text, encoding=encoding)
    with pytest.raises(RecipeError, match=f"recipe.yaml, line {line}: not UTF-8. Save it as UTF-8"):
        parse_recipe(["recipe.yaml"])
    (tmp_path / "recipe.yaml").write_text(text, encoding="utf-8-sig")
    assert parse_recipe(["recipe.yaml"]).model.encoder == "some/café"


def test_saved_recipe_holds_what_was_set_and_reads_back(write, tmp_path):
    recipe = parse_recipe([write(), "--run_name", "no", "--model.revision", "1e5", "--hub_token", "secret"])
    text = recipe.to_yaml()
    assert recipe.training.hub_token == "secret"
    assert "secret" not in text and "secret" not in str(recipe.settings)
    assert set(yaml.safe_load(text)["training"]) == {
        *("learning_rate", "eval_strategy", "lr_scheduler_kwargs", "direction_weights", "use_cpu", "run_name")
    }
    assert yaml.safe_load(text)["training"]["run_name"] == "no", "other readers of YAML must see text too"
    (tmp_path / "saved.yaml").write_text(text, encoding="utf-8")
    again = parse_recipe(["saved.yaml"])
    assert (again.model, again.data, again.to_yaml()) == (recipe.model, recipe.data, text)


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("  freeze:", "  freezes:", r"recipe.yaml, line 3: unknown key model.freezes; did you mean freeze\?"),
        ("training:", "trainng:", r"recipe.yaml, line 10: unknown key 'trainng'; did you mean training\?"),
        ("      limit:", "      limt:", r"recipe.yaml, line 7: unknown key data.train.0.limt; did you mean limit\?"),
        ("  freeze: [text]", "  use_cpu: true", r"line 3: unknown key model.use_cpu; use_cpu belongs to training:"),
        ("1e-5", "fast", r"line 11: training.learning_rate expects a number, not 'fast'"),
        ("use_cpu: true", "use_cpu: 1", r"line 15: training.use_cpu expects true or false, not 1"),
        ("limit: 10", "limit: 1.5", r"line 7: data.train.0.limit expects a whole number, not 1.5"),
        ("some/encoder", "123", r"line 2: model.encoder expects text \(quote it\), not 123"),
        ("{i->it: 1}", "3", "line 14: training.direction_weights expects a mapping, not 3"),
        ("{i->it: 1}", "{i->x: 1}", "recipe.yaml: training.direction_weights: 'i→x' is not one of"),
        ("  encoder: some/encoder\n", "", "recipe.yaml: model.encoder is missing"),
        ("    - path: photos\n      limit", "    - limit", "recipe.yaml: data.train.0.path is missing"),
        ("  use_cpu: true", "  learning_rate: 1", "line 15: key 'learning_rate' is already set in line 11"),
        ("freeze: [text]", "freeze: [text", "recipe.yaml, line 4: not valid YAML"),
        (RECIPE, "- a", "recipe.yaml: a recipe must be a mapping with the keys model, data, training"),
        (RECIPE, "", "recipe.yaml: a recipe must be a mapping"),
        (RECIPE, "[" * 20_000, "recipe.yaml: nested too deeply"),
        (RECIPE, "[a]: b", "recipe.yaml, line 1: a key must be one word"),
        (
            "  use_cpu: true",
            "  per_device_train_batch_size: 0",
            "recipe.yaml: training.per_device_train_batch_size is 0",
        ),
    ],
)
def test_errors_in_the_file(write, old, new, message):
    assert RECIPE.count(old) >= 1
    with pytest.raises(RecipeError, match=message):
        parse_recipe([write(RECIPE.replace(old, new, 1))])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--learning_rat", "1"], r"--learning_rat: unknown option; did you mean --learning_rate\?"),
        (["--model.fusions", "sum"], r"--model.fusions: unknown key model.fusions; did you mean fusion\?"),
        (["--data.train.0.limt", "1"], r"unknown key data.train.0.limt; did you mean limit\?"),
        (["--data.train.5.limit", "1"], "the recipe has only 2 entries there; the first is 0"),
        (["--data.train.5", "x"], "the recipe has only 2 entries there; the first is 0"),
        (
            ["--data.train.path", "x"],
            "data.train is a list. Use --train for the whole list, or --data.train.0.path for its",
        ),
        (["--train.path", "x"], "data.train is a list. Use --train for the whole list, or --data.train.0.path for its"),
        (["--crop_scale.0", "0.5"], "the recipe has only 0 entries there"),
        (["--train", "{path: x, limt: 5}"], r"--train: unknown key data.train.0.limt; did you mean limit\?"),
        (["--train", "[2024]"], "--train: data.train.0 expects a path or a mapping, not 2024"),
        (["--training.seed.x", "1"], "training.seed has no parts"),
        (["--learning_rate", "fast"], "--learning_rate: training.learning_rate expects a number, not 'fast'"),
        (["--learning_rate"], "--learning_rate: a value is missing"),
        (["--freeze", "text", "image"], "'image' is not an option. .* several values as a list"),
        (["--freeze", "[text"], "--freeze, line 1: not valid YAML"),
        (["--fusion", "sam"], "model.fusion: 'sam' is not one of"),
    ],
)
def test_errors_on_the_command_line(write, arguments, message):
    with pytest.raises(RecipeError, match=message):
        parse_recipe([write(), *arguments])


@pytest.mark.parametrize("argv", [[], ["--seed", "1"]])
def test_no_recipe(argv):
    with pytest.raises(RecipeError, match="no recipe given\nusage"):
        parse_recipe(argv)


def test_missing_recipe(tmp_path):
    with pytest.raises(RecipeError, match="no such recipe"):
        parse_recipe([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    "path", sorted(Path(__file__).parents[2].glob("hub_configs/*.yaml")), ids=lambda path: path.stem
)
def test_shipped_recipes_parse(path):
    assert parse_recipe([str(path), "--use_cpu", "--bf16", "false"]).data.train


def test_bare_names_are_never_ambiguous():
    names = [entry.name for cls in SECTIONS.values() for entry in dataclasses.fields(cls)]
    assert len(names) == len(set(names))


def test_checkpointing_has_both_names(write):
    arguments = parse_recipe([write(), "--gradient_checkpointing"]).training
    assert arguments.gradient_checkpointing is True


@pytest.mark.parametrize("cls", [ModelArguments, DataArguments, SourceArguments])
def test_docstrings_describe_every_field(cls):
    described = [name for fields in field_docs(cls).values() for name, _, text in fields if text]
    assert described == [entry.name for entry in dataclasses.fields(cls)]


def test_docstring_describes_every_training_field_of_ours():
    described = {name for fields in field_docs(GCLTrainingArguments).values() for name, _, text in fields if text}
    assert described == set(GCLTrainingArguments.__dict__["__annotations__"])


def test_stated_defaults_are_the_defaults():
    for cls in (ModelArguments, DataArguments, SourceArguments, GCLTrainingArguments):
        kinds = {name: kind for fields in field_docs(cls).values() for name, kind, _ in fields}
        for entry in dataclasses.fields(cls):
            if "defaults to" in kinds.get(entry.name, ""):
                default = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
                stated, _ = read_yaml(kinds[entry.name].split("defaults to ")[1], entry.name)
                assert stated == default, entry.name


def test_help_lists_own_and_inherited_keys(capsys):
    with pytest.raises(SystemExit):
        parse_recipe(["--help"])
    text = capsys.readouterr().out
    for key in ("--model.freeze", "--data.max_broken_share", "--training.denominator", "--training.max_grad_norm"):
        assert text.count(f"{key} ") == 1
    assert text.count("--training.learning_rate ") == 1, "a redefined field is told once, with our default"
    assert "defaults to 1e-5" in text
    for section in ("model", "data", "peft"):
        for entry in dataclasses.fields(SECTIONS[section]):
            assert text.count(f"--{section}.{entry.name} ") == 1
    assert "--training.auto_find_batch_size " in text, "transformers documents it without a colon"
    assert "finetune, flickr8k_fusion" in text


# PyYAML folds exotic line breaks (NEL, LS, PS) in unquoted text; no path or name holds them
printable = st.characters(codec="utf-8", exclude_categories=("Cc", "Zl", "Zp"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(printable, max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(printable, min_size=1), inner, max_size=3),
    max_leaves=8,
)
awkward = st.sampled_from(["no", "1e5", "0x10", "012", "1_000", "2024-01-01", "12:30", "~", "on", ".inf", "-"])


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), plain | awkward))
def test_yaml_reads_back_what_was_written(value):
    assert read_yaml(write_yaml(value), "x")[0] == value
