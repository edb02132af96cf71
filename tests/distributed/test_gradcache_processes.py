"""GradCache with accumulation on two processes against one plain step on the whole batch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]


def launch(processes, out):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    run = subprocess.run(
        [*command, str(ROOT / "tests" / "distributed" / "gradcache_worker.py"), str(out)],
        cwd=out.parent, env=environment, capture_output=True, text=True, timeout=150,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-6000:]
    return torch.load(out, weights_only=True)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch(1, tmp_path_factory.mktemp("one") / "weights.pt")


@pytest.mark.parametrize("processes, cases", [(2, 12), (3, 7)])
def test_processes_in_chunks_train_as_one_without_also_after_a_shortage_of_memory(
    processes, cases, one_process, tmp_path
):
    several = launch(processes, tmp_path / "weights.pt")
    assert len(several) == cases
    for case, parameters in several.items():
        expected = one_process.get(case, one_process["gcl"])  # a shortage of memory changes nothing
        for name, parameter in parameters.items():
            torch.testing.assert_close(
                parameter, expected[name], atol=1e-5, rtol=1e-4, msg=lambda m, at=(case, name): f"{at}: {m}"
            )
