"""train.py from recipe to Hub-ready folder, on a tiny CLIP and real files."""

import csv
import json
import re
import subprocess
import sys

import datasets
import pytest
import torch
import yaml
from backbones import random_image, tiny_encoder, tiny_processor, word_tokenizer
from training_runs import make_pairs
from transformers import CLIPProcessor

import train
from evaluation.pairs import evaluate_pairs
from modeling_gcl import GCLModel, GCLProcessor
from training.arguments import SourceArguments
from training.sources import load_pairs


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clip")
    tiny_encoder("clip").save_pretrained(folder)
    CLIPProcessor(tiny_processor("clip").image_processor, word_tokenizer()).save_pretrained(folder)
    return folder


def write_parquet(path, n, seed=0):
    pairs = make_pairs(n, seed)
    columns = {name: [pair[name] for pair in pairs] for name in ("id", "image", "captions")}
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path


@pytest.fixture
def recipe(clip_folder, tmp_path):
    settings = {
        "model": {"encoder": str(clip_folder), "fusion": "normalized_sum", "licence": "apache-2.0"},
        "data": {
            "train": [{"path": str(write_parquet(tmp_path / "train.parquet", 40))}],
            "eval": {"path": str(write_parquet(tmp_path / "eval.parquet", 12, seed=1))},
        },
        "training": {
            "output_dir": str(tmp_path / "out"), "num_train_epochs": 1, "per_device_train_batch_size": 8,
            "learning_rate": 1e-3, "dataloader_num_workers": 0, "use_cpu": True, "disable_tqdm": True, "seed": 5,
        },
    }  # fmt: skip
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_leaves_a_complete_folder(recipe, tmp_path, capsys):
    train.main([str(recipe)])
    folder = tmp_path / "out" / "model"
    printed = capsys.readouterr().out
    assert "text tower" in printed and "40 pairs, 160 captions" in printed
    assert re.search(r"headline +[\d.]+ → +[\d.]+", printed) and "gcl evaluate pairs" in printed

    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    code = {"configuration_gcl.py", "modeling_gcl.py", "encoding_gcl.py", "loss_gcl.py", "processing_gcl.py"}
    code |= {"rows_gcl.py", "tiles_gcl.py"}
    pictures = {f"pictures/{name}.png" for name in ("nine_way", "modality_pca", "training_curves", "result_sheet")}
    files = {"README.md", "recipe.yaml", "environment.json", "data.json", "results.json", "model.safetensors"}
    assert code | pictures | files <= names
    for name in names:
        assert name in printed

    results = json.loads((folder / "results.json").read_text())
    model, processor = GCLModel.from_pretrained(folder), GCLProcessor.from_pretrained(folder)
    pairs = load_pairs(SourceArguments(str(tmp_path / "eval.parquet")))
    assert results["after"] == json.loads(json.dumps(evaluate_pairs(model, processor, pairs)))
    untrained = GCLModel.from_encoder(results["recipe"]["model"]["encoder"], fusion="normalized_sum")
    assert results["before"] == json.loads(json.dumps(evaluate_pairs(untrained, processor, pairs)))
    assert results["seed"] == 5 and len(results["environment"]["packages"]) > 5
    assert [entry for entry in results["log_history"] if "loss_t→it" in entry]

    card = (folder / "README.md").read_text()
    assert "base_model" not in card.split("---")[1]  # a local folder is no Hub id
    snippet = re.search(r"```python\n(.*?)```", card, re.S).group(1)
    random_image(0).save(tmp_path / "dog.jpg")
    run = subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    # the recipe beside the weights repeats the run
    again = tmp_path / "again"
    train.main([str(folder / "recipe.yaml"), "--output_dir", str(again)])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, GCLModel.from_pretrained(again / "model").state_dict()[name]), name


def test_a_folder_with_broken_images_trains_and_reports_them(recipe, tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    with (photos / "metadata.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["file_name", "caption"])
        for i in range(20):
            random_image(i).save(photos / f"{i}.png")
            rows.writerow([f"{i}.png", f"a dog {i}"])
        rows.writerow(["absent.png", "a cat"])
    (photos / "3.png").write_bytes(b"not an image")
    train.main([str(recipe), "--train", str(photos), "--data.max_broken_share", "0.1", "--eval_on_start", "false"])
    printed = capsys.readouterr().out
    assert "20 pairs, 20 captions, 1 left out" in printed
    assert re.search(r"1 unreadable images were skipped: .*3\.png", printed)
    results = json.loads((tmp_path / "out" / "model" / "results.json").read_text())
    assert results["before"] is None and results["data"][0]["skipped"] and len(results["broken_images"]) == 1
    with pytest.raises(SystemExit, match="absent.png.*over data.max_broken_share"):
        train.main([str(recipe), "--train", str(photos), "--data.max_broken_share", "0.01"])
    (photos / "absent.png").write_bytes(b"nor this")
    with pytest.raises(SystemExit, match="2 of 21 images could not be read.*over data.max_broken_share"):
        train.main([str(recipe), "--train", str(photos), "--data.max_broken_share", "0.05", "--num_train_epochs", "3"])


def test_bad_input_is_one_line(recipe, tmp_path):
    for arguments, message in [
        (["--learning_rat", "1"], "learning_rate"),
        (["--train", str(tmp_path / "nowhere.parquet")], "nowhere.parquet: no such file"),
        (["--encoder", str(tmp_path / "nowhere")], "nowhere"),
        (["--freeze", "[image, text]"], "leaves nothing to train"),
        (["--per_device_train_batch_size", "64"], "fewer than one batch"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            train.main([str(recipe), *arguments])


def test_secrets_stay_out_of_the_command(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train.py", "r.yaml", "--hub_token", "hf_abc", "--seed", "1"])
    assert train.command_line().endswith("train.py r.yaml '--hub_token=***' --seed 1")
    monkeypatch.setattr(sys, "argv", ["train.py", "r.yaml", "--training.hub-token=hf_abc", "--seed", "1"])
    assert "hf_abc" not in train.command_line() and train.command_line().endswith("--seed 1")
