"""Two processes against one on the whole batch: weights, temperature, loss and embeddings."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "train_worker.py"


def launch(processes, out, total_batch=12):
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [*command, str(WORKER), str(out), str(total_batch)],
        cwd=out.parent, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-4000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("one") / "weights.pt")


@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_trains_as_one(processes, one_process, tmp_path):
    several = launch(processes, tmp_path / "weights.pt")
    assert several.keys() == one_process.keys()
    torch.testing.assert_close(several.pop("encode"), one_process["encode"], atol=1e-5, rtol=0)
    for loss, parameters in several.items():
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter, one_process[loss][name], atol=1e-5, rtol=1e-4, msg=lambda m, at=(loss, name): f"{at}: {m}"
            )
