"""Two processes against one on the whole batch: weights, temperature, loss and embeddings."""

import json

import pytest
import torch

from tests.support.launches import LAUNCH, ROOT, launch, run_checked

WORKER = ROOT / "tests" / "distributed" / "train_worker.py"


def trained_by(processes, out, total_batch=12):
    launch(WORKER, out, total_batch, processes=processes, cwd=out.parent)
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return trained_by(1, tmp_path_factory.mktemp("one") / "weights.pt")


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_trains_as_one(processes, one_process, tmp_path):
    several = trained_by(processes, tmp_path / "weights.pt")
    assert several.keys() == one_process.keys() and len(several) == 8
    torch.testing.assert_close(several.pop("encode"), one_process["encode"], atol=1e-5, rtol=0)
    for loss, parameters in several.items():
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter, one_process[loss][name], atol=1e-5, rtol=1e-4, msg=lambda m, at=(loss, name): f"{at}: {m}"
            )


def test_train_py_runs_from_the_shipped_config_on_two_processes(recipe, tmp_path):
    """Evaluation shared out, one writer, and the world size that was asked for."""
    settings = ["--per_device_train_batch_size", "4", "--max_steps", "3", "--model.freeze", "[text]"]
    config = ROOT / "hub_configs" / "accelerate" / "two_cpu_processes.yaml"
    run = run_checked([*LAUNCH, config, ROOT / "train.py", recipe, *settings], cwd=tmp_path)
    assert run.stdout.count("Done in ") == 1 and run.stdout.count("text tower") == 1
    card = (tmp_path / "out" / "model" / "README.md").read_text()
    assert "| world_size | 2 |" in card and "accelerate launch --multi_gpu --num_processes 2 " in card
    results = json.loads((tmp_path / "out" / "model" / "results.json").read_text())
    assert results["after"]["num_pairs"] == 12 and results["log_history"][1]["step"] == 1
