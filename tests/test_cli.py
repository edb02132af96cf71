"""The gcl command, through its console script's main."""

import json
import logging
import os
import re
import subprocess
import sys
from importlib.metadata import version

import pytest
import torch
from transformers import AutoModel

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.training_runs import write_parquet
from universal_gcl import cli
from universal_gcl.evaluation.commands.options import sessions
from universal_gcl.evaluation.pairs.embeddings import PairEmbeddings
from universal_gcl.publishing.push import check_folder
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.pairs import load_pairs


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gcl", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    return stop.value.code


@pytest.fixture
def model_folder(tmp_path):
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "model")
    tiny_processor("clip").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_the_version_is_printed(monkeypatch, capsys):
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"gcl {version('universal-gcl')}\n"


def test_a_reader_that_leaves_early_ends_the_command_in_silence():
    """As in `gcl train --help | head`."""
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "universal_gcl", "train", "--help"]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (done.returncode, done.stderr) == (1, "")


def test_train_is_a_command(recipe, tmp_path, monkeypatch, capsys):
    """Without a launcher; the record and the card name what was typed."""
    options = ["--max_steps", "2", "--eval_on_start=false", "--data.train.0.limit", "20", "--logging_steps", "1"]
    assert run(monkeypatch, "train", recipe, *options) == 0
    model = tmp_path / "out" / "model"
    typed = f"gcl train {recipe} {' '.join(options)}"
    assert json.loads((model / "results.json").read_text())["command"] == typed
    card = (model / "README.md").read_text()
    assert f"\n{typed}\n" in card
    assert "| max_steps | 2 |" in card and "| num_train_epochs |" not in card
    printed = capsys.readouterr()
    assert "step 2/2" in printed.out and "\nDone in " in printed.out
    for noise in ("Loading weights", "Writing model shards", "Map:", "Generating", "PAD/BOS/EOS", "gemm_4bit"):
        assert noise not in printed.err
    monkeypatch.setattr(logging.getLogger("transformers.trainer_utils"), "filters", [])


def test_the_keys_of_a_recipe_are_the_help_of_train(monkeypatch, capsys):
    assert run(monkeypatch, "train", "--help") == 0
    printed = capsys.readouterr().out
    assert printed.startswith("usage: gcl train RECIPE") and "--training.learning_rate " in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((), "no recipe given"),
        (("quickstrat",), "quickstrat: no such recipe.*finetune.*lcs558k/clip.*Did you mean quickstart"),
        (("finetune", "--learning_rat", "1"), "did you mean --learning_rate"),
        (("finetune", "--encoder", "build/none"), "there is no folder build/none in .*make the folder first"),
    ],
)
def test_train_says_what_is_wrong(arguments, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert re.match(f"error: .*{message}", run(monkeypatch, "train", *arguments), re.DOTALL)


def test_evaluate_pairs_writes_what_it_prints(model_folder, tmp_path, monkeypatch, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", 12)
    assert run(monkeypatch, "evaluate", "pairs", model_folder, data, "--out", tmp_path / "out") == 0
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert f"{100 * result['after']['headline']['local']:.1f}" in capsys.readouterr().out
    assert result["after"]["num_pairs"] == 12 and result["environment"]["packages"]["torch"]
    for name in ("nine_way.png", "modality_pca.png", "result_sheet.png", "embeddings.safetensors"):
        assert (tmp_path / "out" / name).stat().st_size > 1000


def test_embeddings_are_cut_when_asked(model_folder, tmp_path, monkeypatch, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", 12)
    stored = json.loads((model_folder / "config.json").read_text())
    (model_folder / "config.json").write_text(json.dumps(stored | {"matryoshka_dims": [24, 6]}))
    for name, options in {"whole": (), "6": ("--truncate-dim", 6), "7": ("--truncate-dim", 7)}.items():
        assert run(monkeypatch, "evaluate", "pairs", model_folder, data, *options, "--out", tmp_path / name) == 0
        warned = "was trained for [24, 6] dimensions, not to be cut to 7" in capsys.readouterr().err
        assert warned == (name == "7")
    whole, cut = (PairEmbeddings.load(tmp_path / name / "embeddings.safetensors") for name in ("whole", "6"))
    assert json.loads((tmp_path / "6" / "results.json").read_text())["truncate_dim"] == 6
    for role in ("queries", "candidates"):
        for name, matrix in getattr(cut, role).items():
            expected = torch.nn.functional.normalize(torch.tensor(getattr(whole, role)[name][:, :6]), dim=-1)
            torch.testing.assert_close(torch.tensor(matrix), expected, atol=1e-6, rtol=1e-5)


def test_centring_takes_its_means_from_other_pairs(model_folder, tmp_path, monkeypatch):
    data, calibration = write_parquet(tmp_path / "a.parquet", 12), write_parquet(tmp_path / "b.parquet", 20, seed=9)
    run(monkeypatch, "evaluate", "pairs", model_folder, data, "--out", tmp_path / "plain")
    arguments = (model_folder, data, "--variant", "centring", "--centre-on", calibration, "--out", tmp_path / "centred")
    assert run(monkeypatch, "evaluate", "pairs", *arguments) == 0
    gaps = {}
    for name in ("plain", "centred"):
        embeddings = PairEmbeddings.load(tmp_path / name / "embeddings.safetensors")
        image, text = (torch.tensor(embeddings.candidates[m]).mean(0) for m in ("i", "t"))
        gaps[name] = (image - text).norm().item()
    assert gaps["centred"] < 0.5 * gaps["plain"]


def test_stored_means_are_an_option_of_the_checkpoint(model_folder, tmp_path, monkeypatch):
    calibration = write_parquet(tmp_path / "b.parquet", 20, seed=9)
    assert run(monkeypatch, "convert", "centring", model_folder, calibration, tmp_path / "with_means") == 0
    assert (tmp_path / "with_means" / "modules.json").is_file()  # loads in sentence-transformers too
    check_folder(tmp_path / "with_means")  # as it is pushed
    card = (tmp_path / "with_means" / "README.md").read_text()
    assert "made from\n**model** without training" in card and "20 pairs of b.parquet" in card
    assert "gcl convert centring" in card and "## Conversion" in card and "hyper-parameter" not in card
    assert str(tmp_path / "with_means") in card and "license" not in card.split("---")[1]
    plain, centred = (AutoModel.from_pretrained(tmp_path / "with_means", centring=on).eval() for on in (False, True))
    assert AutoModel.from_pretrained(tmp_path / "with_means").config.centring is False
    again = run(monkeypatch, "convert", "centring", model_folder, calibration, tmp_path / "with_means")
    assert "with_means exists and is not an empty folder" in again
    processor = tiny_processor("clip")
    rows = [{"image": row["image"]} for row in load_pairs(SourceArguments(str(calibration)))]
    before = GCLModel.from_encoder(model_folder).encode(rows, processor)
    torch.testing.assert_close(plain.encode(rows, processor), before)
    expected = torch.nn.functional.normalize(before - before.mean(0), dim=-1)
    torch.testing.assert_close(centred.encode(rows, processor), expected)
    centring = ("--variant", "centring", "--out", tmp_path / "out")
    assert run(monkeypatch, "evaluate", "pairs", tmp_path / "with_means", calibration, *centring) == 0
    stored = json.loads((tmp_path / "out" / "results.json").read_text())
    assert stored["centring"] is True and stored["centre_on"] is None
    assert "has no modality means" in run(monkeypatch, "evaluate", "pairs", model_folder, calibration, *centring)
    # the means of other pairs win over those stored
    given = (*centring, "--centre-on", calibration)
    assert run(monkeypatch, "evaluate", "pairs", model_folder, calibration, *given) == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["after"] == stored["after"]


def test_several_variants_in_one_command(model_folder, tmp_path, monkeypatch, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", 12)
    variants = ("plain", "sum", "normalized_sum+centring")
    options = [word for name in variants for word in ("--variant", name)]
    out = ("--centre-on", data, "--out", tmp_path / "out")
    assert run(monkeypatch, "evaluate", "pairs", model_folder, data, *options, *out) == 0
    results = [json.loads((tmp_path / "out" / name / "results.json").read_text()) for name in variants]
    assert [result["centre_on"] for result in results] == [None, None, str(data)]
    assert [result["fusion"] for result in results[1:]] == ["sum", "normalized_sum"]
    printed = capsys.readouterr().out
    assert all(name in printed for name in variants)


def test_summary_of_seeds(model_folder, tmp_path, monkeypatch, capsys):
    data = write_parquet(tmp_path / "pairs.parquet", 12)
    for seed in (0, 1):
        run(monkeypatch, "evaluate", "pairs", model_folder, data, "--out", tmp_path / str(seed))
    runs = [f"tiny={tmp_path / str(seed) / 'results.json'}" for seed in (0, 1)]
    assert run(monkeypatch, "evaluate", "summary", *runs, "--out", tmp_path / "summary") == 0
    assert "| tiny | 2 |" in capsys.readouterr().out
    compared = run(monkeypatch, "evaluate", "compare", *(run.split("=")[1] for run in runs), "--out", tmp_path / "c")
    assert compared == 0 and (tmp_path / "c" / "nine_way.png").is_file()
    assert "| before | after |" in (tmp_path / "c" / "compare.md").read_text()
    assert run(monkeypatch, "evaluate", "summary", "tiny=nowhere.json", "--out", tmp_path / "summary") == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["evaluate", "pairs", "model", "nowhere/at/all"], "nowhere/at/all"),
        (["convert", "towers", "out", "--image-size", "50"], "multiple of 32"),
        (["evaluate", "mmeb", "model", "--root", ".", "--out", "out", "--subsets", ", "], "', ' names nothing"),
        (
            ["evaluate", "mixbench", "model", "--root", ".", "--out", "out", "--subsets", "../x"],
            "'../x' is not a subset",
        ),
    ],
)
def test_errors_are_one_line(arguments, message, monkeypatch):
    code = run(monkeypatch, *arguments)
    assert code.startswith("error: ") and message in code


def test_a_variant_is_measured_once():
    with pytest.raises(ValueError, match="--variant is given twice: plain, plain"):
        next(sessions("model", None, ["plain", "plain"]))


def test_help_keeps_its_brackets(monkeypatch, capsys):
    """Which typer reads as markup."""
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, "convert", "mbeir", "--help") == 0
    assert '"targets": [ids]}' in capsys.readouterr().out


def test_weights_that_are_cut_off_are_one_line(model_folder, tmp_path, monkeypatch):
    weights = model_folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    said = run(monkeypatch, "convert", "to-clip", model_folder, tmp_path / "clip")
    assert said.startswith("error: a .safetensors file of the model is damaged or cut off (")
    assert not (tmp_path / "clip").exists()
