"""hub_configs/: the recipes on LCS-558K run for two steps with each loss, on tiny stand-ins at the paths they name.

The launches on 1, 8 and 4x8 GPUs are what accelerate reads and what the recipes' batch divides into. The recipes of
Flickr8k, with the options of runs/flickr8k.sh, are the settings that results/ was made with.
"""

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
from universal_gcl.training.losses import LOSSES
from universal_gcl.training.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
HUB_CONFIGS = ROOT / "hub_configs"
RECIPES = sorted((HUB_CONFIGS / "lcs558k").glob("*.yaml"))
LAUNCHES = {  # processes, machines, micro-batches of a step
    "one_process": (1, 1, 32), "eight_gpus": (8, 1, 4), "four_by_eight": (32, 4, 1),
}  # fmt: skip
PAIRS = 558_000  # of LCS-558K, to the thousand
# the parts that the paper trained, judging by its figures; for TinyCLIP they say nothing: as for CLIP
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


def test_there_is_a_recipe_for_each_backbone():
    assert {path.stem for path in RECIPES} == set(TRAINED)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_dry_run(path, loss, workplace, clip_folder, monkeypatch, capsys):
    """The commands of docs/recipes.md, but with a tiny batch and, for CLIP, without the id that needs the Hub."""
    monkeypatch.chdir(workplace)
    backbone = path.stem
    out = workplace / "outputs" / "lcs558k" / f"{backbone}_{loss}"
    options = ["--loss", loss, "--output_dir", str(out)]
    options += ["--use_cpu", "--bf16", "false", "--per_device_train_batch_size", "4", "--effective_batch_size", "8"]
    options += ["--encoder", str(clip_folder)] if backbone == "clip" else []
    train.main([str(path), *options, "--dataloader_num_workers", "0", "--disable_tqdm"])

    printed = capsys.readouterr().out
    negatives = 21 if loss == "gcl" else 7
    assert re.search(rf"8 pairs a step = 4 .* x 2 accumulated .* {negatives} negatives", printed)
    assert "18 pairs, 18 captions" in printed
    results = json.loads((out / "model" / "results.json").read_text())
    parts = {part for part, count in results["parameters"].items() if count["trained"]} - {"total"}
    assert parts == TRAINED[backbone]
    [logged] = [entry for entry in results["log_history"] if "loss" in entry]
    assert {name for name in logged if name.startswith("loss_")} == TERMS[loss]
    card = (out / "model" / "README.md").read_text()
    assert LOSSES[loss].description in card and LOSSES[loss].citation in card
    assert card.count("{lee2025generalized,") == 1
    assert ("| denominator | all |" in card) == (loss == "gcl")
    assert ("| separation_weight | 0.5 |" in card) == (loss == "alignclip")
    model = GCLModel.from_pretrained(out / "model")
    assert model.config.fusion == ("native" if backbone == "vista" else "sum")
    if backbone == "vista":
        assert logged["logit_scale"] == pytest.approx(50)
    assert (out / "checkpoint-1").is_dir()  # to resume from, before the end


STAGE_2 = {  # as in runs/flickr8k.sh
    "gcl": "",
    "cl": "--loss cl",
    "alignclip": "--loss alignclip",
    "gcl_no_intra": "--intra_modality false",
    "gcl_without_other_positive": "--denominator without_other_positive",
}
NATIVE_FUSION = "--encoder build/vista-minilm-efficientnet-lite0-96 --fusion native --text_pooling encoder"
RECORDED = {  # results/, without the seed → recipe and options
    "flickr8k/runs/stage1": "flickr8k_stage1.yaml",
    **{f"flickr8k/runs/{run}": f"flickr8k_stage2.yaml {options}" for run, options in STAGE_2.items()},
    "flickr8k_vista/runs/stage1": f"flickr8k_stage1.yaml {NATIVE_FUSION}",
    "flickr8k_vista/runs/gcl": "flickr8k_stage2.yaml --encoder outputs/flickr8k_vista/stage1/model",
    "flickr8k_vista/runs/cl": "flickr8k_stage2.yaml --loss cl --encoder outputs/flickr8k_vista/stage1/model",
    "flickr8k_lora/runs/full": "flickr8k_stage2.yaml",
    "flickr8k_lora/runs/lora": "flickr8k_lora.yaml",
    "flickr8k_lora/runs/fusion": "flickr8k_fusion.yaml",
    "quickstart/results": "quickstart.yaml",
}


@pytest.mark.parametrize("name", RECORDED)
def test_recipes_and_options_are_the_settings_that_results_were_made_with(name):
    recipe, *options = RECORDED[name].split()
    for path in sorted((ROOT / "results").glob(f"{name}-seed*.json")) or [ROOT / "results" / f"{name}.json"]:
        recorded = json.loads(path.read_text())["recipe"]
        settings = parse_recipe([str(HUB_CONFIGS / recipe), *options]).settings
        settings["training"] |= {key: recorded["training"][key] for key in ("seed", "output_dir")}
        settings["data"].pop("languages")  # named on the card; recipes named none when these results were made
        recorded["data"].pop("languages", None)
        assert settings == recorded, path


def test_the_script_gives_each_run_its_options():
    script = (ROOT / "runs" / "flickr8k.sh").read_text()
    assert dict(re.findall(r"""^ *\[(\w+)\]="((?:--.*)?)"$""", script, re.M)) == STAGE_2


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
