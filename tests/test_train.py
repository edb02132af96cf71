"""A training from recipe to Hub-ready folder, on a tiny CLIP and real files."""

import csv
import json
import re

import pytest
import torch
from safetensors.torch import load_file

from modeling_gcl import GCLModel, GCLProcessor
from tests.support.backbones import random_image
from tests.support.doors import run_outside
from tests.support.hub_on_loopback import TOKEN
from universal_gcl import train
from universal_gcl.evaluation.pairs.measure import evaluate_pairs
from universal_gcl.evaluation.run_record import ReadSource
from universal_gcl.publishing.hub_folder import files_for
from universal_gcl.publishing.push import check_folder
from universal_gcl.publishing.run_folder import data_source
from universal_gcl.retrieval.adapters import load_adapter
from universal_gcl.sources.arguments import SourceArguments
from universal_gcl.sources.checks import SourceReport
from universal_gcl.sources.pairs import load_pairs
from universal_gcl.training.build import build_model, is_unchanged
from universal_gcl.training.recipe import parse_recipe
from universal_gcl.training.training_arguments import GCLTrainingArguments

# mteb asks for it where images are embedded; nothing here needs it
WITHOUT_TORCHVISION = """
from mteb.models import ModelMeta
ModelMeta._check_requirements = lambda self: None
"""
# what the card's snippets leave: each way in gives the vectors of `encode`, mteb's of a fused row too
COMPARE = """
import datasets, json, mteb
from mteb._create_dataloaders import create_dataloader
from mteb.types import PromptType

metadata = mteb.get_task("EDIST2ITRetrieval").metadata
row = {"id": ["1"], "image": [Image.open("dog.jpg")], "text": ["the same dog, in snow"]}
options = {"task_metadata": metadata, "prompt_type": PromptType.document}
loader = create_dataloader(datasets.Dataset.from_dict(row), batch_size=1, **options)
by_mteb = mteb_model.encode(loader, hf_split="test", hf_subset="default", batch_size=1, **options)
found = {"query": texts, "image": images, "fused": fused, "mteb": by_mteb, "forward": output.fused_embeds}
expected = {"query": queries, "image": candidates[:1]} | dict.fromkeys(("fused", "mteb", "forward"), candidates[2:])
print(json.dumps([float((torch.as_tensor(found[name]) - expected[name]).abs().max()) for name in found]))
"""


def test_a_run_leaves_a_complete_folder(recipe, tmp_path, capsys, hub, monkeypatch):
    train.main([str(recipe)])
    folder = tmp_path / "out" / "model"
    printed = capsys.readouterr().out
    assert "text tower" in printed and "40 pairs, 160 captions" in printed
    images = re.search(r"^train: images by (.*)$", printed, re.M).group(1)
    assert "within 2 grey levels of CLIPImageProcessor" in images
    step = r"^step 1/5   epoch 0.20   loss [\d.]+   1/τ [\d.]+   lr [\d.e+-]+   \d+ pairs/s   [\d:]+ left$"
    assert re.search(step, printed, re.M)
    assert len(re.findall(r"^evaluated: hit@10 [\d.]+ % \(local pool", printed, re.M)) == 2
    end = printed[printed.index("\nDone in ") :]
    assert re.search(r"^hit@10, both pools +[\d.]+ → +[\d.]+ % +[+-][\d.]+$", end, re.M)
    assert f"gcl evaluate pairs {folder}" in end and len(end.strip().splitlines()) <= 10
    assert "{'" not in printed  # no dictionaries

    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    code = {"configuration_gcl.py", "modeling_gcl.py", "encoding.py", "loss.py", "processing_gcl.py"}
    code |= {"rows.py", "tiles.py", "logsumexp.py", "kernels.py", "own_backbones.py", "video.py"}
    pictures = {f"pictures/{name}.png" for name in ("nine_way", "modality_pca", "training_curves", "result_sheet")}
    files = {
        "README.md",
        "card.json",
        "recipe.yaml",
        "environment.json",
        "data.json",
        "results.json",
        "model.safetensors",
    }
    sentence_transformers = {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"}
    assert code | pictures | files | sentence_transformers <= names

    results = json.loads((folder / "results.json").read_text())
    model, processor = GCLModel.from_pretrained(folder), GCLProcessor.from_pretrained(folder)
    pairs = load_pairs(SourceArguments(str(tmp_path / "eval.parquet")))
    assert results["after"] == json.loads(json.dumps(evaluate_pairs(model, processor, pairs)))
    untrained = GCLModel.from_encoder(results["recipe"]["model"]["encoder"], fusion="normalized_sum")
    assert results["before"] == json.loads(json.dumps(evaluate_pairs(untrained, processor, pairs)))
    assert results["environment"]["training_images"] == images
    assert results["seed"] == 5 and len(results["environment"]["packages"]) > 5
    assert [entry for entry in results["log_history"] if "loss_t→it" in entry]
    headlines = [(e["step"], e["eval_headline_mean"]) for e in results["log_history"] if "eval_headline_mean" in e]
    assert headlines == [(0, results["before"]["headline"]["mean"]), (5, results["after"]["headline"]["mean"])]

    card = (folder / "README.md").read_text()
    assert "base_model" not in card.split("---")[1]  # a local folder is no Hub id
    snippets = re.findall(r"```python\n(.*?)```", card, re.S)
    assert len(snippets) == 4
    random_image(0).save(tmp_path / "dog.jpg")
    printed = run_outside(WITHOUT_TORCHVISION + "\n".join(snippets) + COMPARE, tmp_path)
    assert max(json.loads(printed.splitlines()[-1])) < 1e-5
    # the recipe beside the weights repeats the run; the finished folder is what is pushed
    again = tmp_path / "again"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    train.main([str(folder / "recipe.yaml"), "--output_dir", str(again), "--push_to_hub", "org/tiny"])
    pushed = hub.files("org/tiny")
    assert pushed.keys() - {".gitattributes"} == names and f"{hub.url}/org/tiny/commit/" in capsys.readouterr().out
    assert pushed["model.safetensors"] == (again / "model" / "model.safetensors").read_bytes()
    assert b"push_to_hub" not in pushed["recipe.yaml"]  # a stranger may not push there
    assert len(hub.repos["org/tiny"]["main"]) == 2
    card = pushed["README.md"].decode()
    assert card.count('"org/tiny"') == 6
    assert not [
        name for name, content in pushed.items() if str(tmp_path).encode() in content
    ]  # the user's own business
    assert "# tiny\n" in card and "org/tiny" not in (again / "model" / "README.md").read_text()
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
    assert re.search(r"Skipped 1 unreadable image; .* The first: .*3\.png", printed)
    results = json.loads((tmp_path / "out" / "model" / "results.json").read_text())
    assert results["before"] is None and results["data"][0]["skipped"] and len(results["broken_images"]) == 1
    with pytest.raises(SystemExit, match="absent.png.*over data.max_broken_share"):
        train.main([str(recipe), "--train", str(photos), "--data.max_broken_share", "0.01"])
    (photos / "absent.png").write_bytes(b"nor this")
    with pytest.raises(SystemExit, match="2 of 21 images could not be read.*over data.max_broken_share"):
        train.main([str(recipe), "--train", str(photos), "--data.max_broken_share", "0.05", "--num_train_epochs", "3"])


def test_an_effective_batch_finds_its_chunk_and_says_so(recipe, tmp_path, capsys):
    train.main([str(recipe), "--effective_batch_size", "16", "--eval_on_start", "false"])
    line = (
        "batch: 16 pairs a step = 8 a micro-batch x 2 accumulated x 1 process, embedded in chunks of 8; "
        "each query sees 45 negatives"
    )
    assert line in capsys.readouterr().out
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "| effective_batch_size | 16 |" in card and "| grad_cache_chunk | 8 |" in card
    results = json.loads((tmp_path / "out" / "model" / "results.json").read_text())
    assert results["recipe"]["training"]["effective_batch_size"] == 16
    assert "grad_cache_chunk" not in results["recipe"]["training"]  # found anew where the recipe is run again
    assert any("share_encoder" in entry for entry in results["log_history"])


def test_bad_input_is_one_line(recipe, tmp_path):
    for arguments, message in [
        (["--learning_rat", "1"], "learning_rate"),
        (["--train", str(tmp_path / "nowhere.parquet")], "nowhere.parquet: no such file"),
        (["--encoder", str(tmp_path / "nowhere")], "nowhere"),
        (["--freeze", "[image, text]"], "leaves only the temperature to train"),
        (["--per_device_train_batch_size", "64"], "fewer than one batch"),
        (["--effective_batch_size", "20"], "use 16 or 24, or per_device_train_batch_size 5"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}"):
            train.main([str(recipe), *arguments])


def test_what_cannot_be_evaluated_stops_before_training(recipe, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    random_image(0).save(photos / "good.png")
    (photos / "bad.png").write_bytes(b"junk")
    for name in ("good", "bad"):
        (photos / f"{name}.txt").write_text("a dog")
    with pytest.raises(SystemExit, match="photos, bad.png: .*not a readable image.*Repair or remove it"):
        train.main([str(recipe), "--eval", str(photos), "--eval_on_start", "false"])


def test_half_precision_checkpoints_are_trained_in_float32(recipe, clip_folder, tmp_path):
    GCLModel.from_encoder(clip_folder, dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    GCLProcessor.from_encoder(clip_folder).save_pretrained(tmp_path / "half")
    model, processor = build_model(parse_recipe([str(recipe), "--encoder", str(tmp_path / "half")]).model, 8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert processor(text=["a " * 30], return_tensors="pt")["input_ids"].shape == (1, 8)


def test_the_card_names_hub_data_and_hides_absolute_folders():
    arguments = SourceArguments("org/pairs", name="en", licence="cc0-1.0")
    hub = data_source(ReadSource(arguments, SourceReport("org/pairs", "abc123", "train", 7)))
    assert hub.on_hub and (hub.source, hub.name, hub.revision, hub.licence) == ("org/pairs", "en", "abc123", "cc0-1.0")
    local = data_source(ReadSource(SourceArguments("/home/me/photos"), SourceReport("/home/me/photos", pairs=7)))
    assert not local.on_hub and local.source == "photos"


def test_what_can_not_be_pushed_is_not_trained(recipe, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(SystemExit, match="does not accept the token"):
        train.main([str(recipe), "--push_to_hub", "org/tiny"])
    assert not (tmp_path / "out").exists()


def test_a_push_that_fails_leaves_the_model_and_says_how_to_push_it(hub, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ConnectionError("org/tiny was not pushed")

    monkeypatch.setattr(train, "push_folder", refuse)
    arguments = GCLTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(SystemExit, match="org/tiny was not pushed.*gcl push out/model org/tiny"):
        train.push("out/model", "org/tiny", arguments)


def test_lora_saves_adapter_and_merged_model(recipe, tmp_path, hub, monkeypatch):
    """On a CLIP the adapter's base is saved beside it; on the GCL checkpoint that this is, there is nothing to save."""
    train.main([str(recipe), "--peft.r", "4", "--fusion", "gated_sum", "--learning_rate", "1e-2"])
    out = tmp_path / "out"
    results = json.loads((out / "model" / "results.json").read_text())
    assert results["recipe"]["peft"] == {"r": 4} and results["peak_memory"] > 1e8
    total = results["parameters"]["total"]
    assert 0 < total["trained"] < total["parameters"] / 3
    pairs, processor = (
        load_pairs(SourceArguments(str(tmp_path / "eval.parquet"))),
        GCLProcessor.from_pretrained(out / "base"),
    )
    for state, model in {
        "before": GCLModel.from_pretrained(out / "base"),
        "after": load_adapter(out / "model" / "adapter").merge_and_unload(),
    }.items():
        assert results[state] == json.loads(json.dumps(evaluate_pairs(model.eval(), processor, pairs))), state
    assert results["before"] != results["after"]
    check_folder(out / "base")
    card = (out / "model" / "README.md").read_text()
    assert f"a LoRA adapter of {total['trained']:,} parameters was trained and merged" in card and "- lora\n" in card
    assert "| peft.r | 4 |" in card and "| peft.lora_alpha | 32.0 |" in card
    transformers, _, adapter, _ = re.findall(r"```python\n(.*?)```", card, re.S)
    compare = "print(float((adapted_queries - queries).abs().max()), adapted.peft_type.value)"
    random_image(0).save(tmp_path / "dog.jpg")
    difference, kind = run_outside(transformers + adapter + compare, tmp_path).split()[-2:]
    assert float(difference) < 1e-5 and kind == "LORA"
    pushed = files_for(out / "model", "org/tiny", "org/tiny-base")["README.md"]
    assert 'AutoModel.from_pretrained("org/tiny-base"' in pushed and str(out) not in pushed.split("## Training")[0]

    again = ["--encoder", str(out / "base"), "--output_dir", str(tmp_path / "again"), "--eval_on_start", "false"]
    again += ["--push_to_hub", "org/dora"]
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    train.main([str(recipe), "--fusion", "null", "--learning_rate", "1e-2", "--peft.use_dora", "--bf16", *again])
    assert not (tmp_path / "again" / "base").exists()
    config = json.loads((tmp_path / "again" / "model" / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(out / "base") and config["use_dora"]
    assert set(hub.repos) == {"org/dora", "org/dora-base"}
    assert b'AutoModel.from_pretrained("org/dora-base"' in hub.files("org/dora")["README.md"]
    assert hub.files("org/dora-base")["model.safetensors"] == (out / "base" / "model.safetensors").read_bytes()

    # a run that starts from its own output overwrites it: the adapter sits on a copy of the start
    own = ["--encoder", str(out / "model"), "--fusion", "null", "--eval_on_start", "false", "--eval", "null"]
    start = load_file(out / "model" / "model.safetensors")
    train.main([str(recipe), "--peft.r", "4", "--learning_rate", "1e-2", *own])
    assert all(torch.equal(load_file(out / "base" / "model.safetensors")[name], start[name]) for name in start)
    load_adapter(out / "model" / "adapter")

    # a full training over it leaves no adapter that is of other weights
    train.main([str(recipe), *own])
    assert not (out / "model" / "adapter").exists() and "LoRA" not in (out / "model" / "README.md").read_text()


def test_a_revision_is_no_base_of_an_adapter(recipe):
    """AutoModel would load the newest one under it."""
    model = parse_recipe([str(recipe), "--fusion", "null", "--revision", "v1"]).model
    assert not is_unchanged(model)
