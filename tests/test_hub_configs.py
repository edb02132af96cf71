"""hub_configs/: each recipe on LCS-558K runs for two steps with tiny stand-ins at the very paths that it names, and the
launches on 1, 8 and 4x8 GPUs are what accelerate reads and what the recipes' batch divides into."""

import json
import re
from pathlib import Path

import pytest
from accelerate.commands import launch
from accelerate.utils.launch import prepare_multi_gpu_env

from modeling_gcl import GCLModel
from tests.support.backbones import random_image, tiny_model, tiny_processor
from universal_gcl import train
from universal_gcl.training.batch_plan import accumulation_for
from universal_gcl.training.recipe import parse_recipe

HUB_CONFIGS = Path(__file__).parents[1] / "hub_configs"
RECIPES = sorted((HUB_CONFIGS / "lcs558k").glob("*.yaml"))
LAUNCHES = {  # processes, machines, micro-batches of a step
    "one_process": (1, 1, 32), "eight_gpus": (8, 1, 4), "four_by_eight": (32, 4, 1),
}  # fmt: skip
PAIRS = 558_000  # of LCS-558K, to the thousand
# what the paper's figures say of the parts that it trained, and for TinyCLIP, of which they say nothing, CLIP's
TRAINED = {"vista": {"image tower", "text tower", "projections"}, "clip": {"image tower", "projections", "logit_scale"}}
TRAINED["tinyclip"] = TRAINED["clip"]
TERMS = {"cl": {"loss_i→t", "loss_t→i"}}
TERMS["alignclip"] = TERMS["cl"] | {"loss_separation_i", "loss_separation_t"}
TERMS["gcl"] = TERMS["cl"] | {"loss_i→it", "loss_it→i", "loss_t→it", "loss_it→t"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, clip_folder):
    """A working directory as docs/recipes.md leaves it, tiny: LLaVA-Pretrain's files, and the converted checkpoints."""
    folder = tmp_path_factory.mktemp("lcs558k")
    data = folder / "data" / "LLaVA-Pretrain"
    colours, animals = ("red", "blue", "green"), ("dog", "cat", "bird")
    entries = []
    for number in range(18):
        image = f"{number % 2:05}/{number:09}.jpg"
        (data / "images" / image).parent.mkdir(parents=True, exist_ok=True)
        random_image(number).save(data / "images" / image)
        caption = f"{number} a {colours[number % 3]} {animals[number // 3 % 3]}"
        turns = [{"from": "human", "value": "Describe it.\n<image>"}, {"from": "gpt", "value": caption}]
        entries.append({"id": f"{number:09}", "image": image, "conversations": turns})
    (data / "blip_laion_cc_sbu_558k.json").write_text(json.dumps(entries))
    vista = folder / "build" / "vista-base"
    tiny_model("vista-base", logit_scale_init_value=50.0).save_pretrained(vista)
    tiny_processor("vista-base").save_pretrained(vista)
    (folder / "build" / "tinyclip").symlink_to(clip_folder)
    return folder


def test_there_is_a_recipe_for_each_backbone_and_loss():
    losses = ("alignclip", "cl", "gcl")
    assert {path.stem for path in RECIPES} == {f"{name}_{loss}" for name in TRAINED for loss in losses}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(path, workplace, clip_folder, monkeypatch, capsys):
    """The commands of docs/recipes.md but for the size of the batch and, of CLIP, the id that needs the Hub."""
    monkeypatch.chdir(workplace)
    backbone, loss = path.stem.split("_")
    tiny = ["--use_cpu", "--per_device_train_batch_size", "4", "--effective_batch_size", "8"]
    tiny += ["--encoder", str(clip_folder)] if backbone == "clip" else []
    train.main([str(path), *tiny, "--dataloader_num_workers", "0", "--disable_tqdm"])

    printed = capsys.readouterr().out
    negatives = 21 if loss == "gcl" else 7
    assert re.search(rf"batch: 8 pairs a step = 4 .* x 2 accumulated .* {negatives} negatives", printed)
    assert "18 pairs, 18 captions" in printed
    out = workplace / "outputs" / "lcs558k" / path.stem
    results = json.loads((out / "model" / "results.json").read_text())
    parts = {part for part, count in results["parameters"].items() if count["trained"]} - {"total"}
    assert parts == TRAINED[backbone]
    [logged] = [entry for entry in results["log_history"] if "loss" in entry]
    assert {name for name in logged if name.startswith("loss_")} == TERMS[loss]
    model = GCLModel.from_pretrained(out / "model")
    assert model.config.fusion == ("native" if backbone == "vista" else "sum")
    if backbone == "vista":
        assert logged["logit_scale"] == pytest.approx(50)
    assert (out / "checkpoint-1").is_dir()  # to go on from, before the end


def test_recipes_of_a_backbone_differ_in_their_loss_alone():
    rest = {}
    for path in RECIPES:
        settings = parse_recipe([str(path), "--use_cpu"]).settings
        assert settings["training"].pop("output_dir") == f"outputs/lcs558k/{path.stem}"
        assert f"{path.stem.split('_')[0]}_{settings['training'].pop('loss')}" == path.stem
        settings["training"].pop("separation_weight", None)
        rest.setdefault(path.stem.split("_")[0], []).append(settings)
    for settings in rest.values():
        assert len(settings) == 3 and settings[0] == settings[1] == settings[2]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_launch_is_what_accelerate_makes_of_it(name, monkeypatch):
    processes, machines, accumulation = LAUNCHES[name]
    launched = []
    for launcher in ("simple_launcher", "multi_gpu_launcher"):
        monkeypatch.setattr(launch, launcher, lambda args, launcher=launcher: launched.append((launcher, args)))
    options = ["--machine_rank", "3", "--main_process_ip", "10.0.0.1"] if machines > 1 else []
    config = str(HUB_CONFIGS / "accelerate" / f"{name}.yaml")
    parser = launch.launch_command_parser()
    launch.launch_command(parser.parse_args(["--config_file", config, *options, "train.py", str(RECIPES[0])]))
    [(launcher, args)] = launched
    assert launcher == ("simple_launcher" if processes == 1 else "multi_gpu_launcher")
    assert (args.num_processes, args.num_machines, args.mixed_precision) == (processes, machines, "no")
    if machines > 1:
        prepare_multi_gpu_env(args)
        assert (args.nproc_per_node, args.nnodes, args.node_rank) == ("8", "4", 3)
        assert (args.rdzv_endpoint, args.rdzv_backend) == ("10.0.0.1:29500", "static")
    for path in RECIPES:
        training = parse_recipe([str(path), "--use_cpu"]).training
        batch, micro_batch = training.effective_batch_size, training.per_device_train_batch_size
        assert accumulation_for(batch, micro_batch, processes, PAIRS) == accumulation
