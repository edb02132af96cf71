"""FSDP2 and ZeRO-1 on two processes against one on the whole batch: weights, temperature, losses, embeddings."""

import importlib.util
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel

from tests.support.launches import LAUNCH, ROOT, launch, run_checked

WORKER = ROOT / "tests" / "distributed" / "sharding_worker.py"


def run_workers(folder, kind):
    launch(WORKER, folder, 12, kind, processes=1 if kind == "none" else 2, cwd=folder, DS_ACCELERATOR="cpu")


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    run_workers(folder, "none")
    return folder


@pytest.mark.parametrize("kind", ["fsdp2", "zero1"])
def test_shared_out_work_trains_as_one_process(kind, one_process, tmp_path):
    if kind == "zero1" and importlib.util.find_spec("deepspeed") is None:
        pytest.skip("DeepSpeed is not installed")
    run_workers(tmp_path, kind)
    runs = sorted(path.stem for path in tmp_path.glob("*.pt"))
    assert len(runs) == (11 if kind == "fsdp2" else 6)
    for run in runs:
        # mixed precision rounds weights in FSDP2, single products under autocast
        tolerance = 0.02 if run == "bf16" else 1e-5
        expected = torch.load(one_process / f"{run}.pt") | load_file(one_process / run / "model.safetensors")
        found = torch.load(tmp_path / f"{run}.pt") | load_file(tmp_path / run / "model.safetensors")
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(
                tensor, expected[name], atol=tolerance, rtol=tolerance, msg=lambda m, at=(run, name): f"{at}: {m}"
            )


def test_train_py_runs_from_the_shipped_fsdp2_config(recipe, tmp_path):
    """One writer, a folder that loads by its own code, evaluation before and after."""
    (tmp_path / "train_on_gloo.py").write_text(
        "import sys\nfrom tests.distributed import gloo_as_gpus\nfrom universal_gcl import train\n"
        "gloo_as_gpus.install()\ntrain.main(sys.argv[1:])\n"
    )
    config = ROOT / "hub_configs" / "accelerate" / "fsdp2.yaml"
    settings = ["--per_device_train_batch_size", "4", "--max_steps", "3", "--save_strategy", "epoch"]
    script = tmp_path / "train_on_gloo.py"
    run = run_checked([*LAUNCH, config, "--num_processes", "2", script, recipe, *settings], cwd=tmp_path)
    assert run.stdout.count("Done in ") == 1
    folder = tmp_path / "out" / "model"
    results = json.loads((folder / "results.json").read_text())
    assert results["before"]["num_pairs"] == results["after"]["num_pairs"] == 12
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(model).__name__ == "GCLModel" and "| world_size | 2 |" in (folder / "README.md").read_text()
    # a checkpoint is such a folder too
    checkpoint = AutoModel.from_pretrained(tmp_path / "out" / "checkpoint-3", trust_remote_code=True)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, checkpoint.state_dict()[name]), name
