"""One process of several that fails ends all of them at once, and says why on the terminal."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from universal_gcl.failures import stop

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "distributed" / "failing_worker.py"
SHIPPED = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
SHIPPED += [str(ROOT / "hub_configs" / "accelerate" / "two_cpu_processes.yaml")]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=3"]


def launch_and_fail(folder, launcher, *arguments):
    """What the terminal shows. All processes must be gone, a minute after the failure at most."""
    run = subprocess.run(
        [sys.executable, "-m", *launcher, WORKER, *arguments],
        cwd=folder, env=os.environ | {"PYTHONPATH": f"{ROOT}", "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    marks = list(folder.glob("*.pid"))
    assert run.returncode != 0 and len(marks) == (2 if launcher is SHIPPED else 3), run.stderr
    assert time.time() - max(mark.stat().st_mtime for mark in marks) < 60
    for mark in marks:
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.stem), 0)
    # those that lost a peer keep still
    assert "by peer" not in run.stderr and "lost another" not in run.stderr
    return run.stderr


@pytest.mark.parametrize(
    "how, said, summary",
    [
        ("bad data", "error: rank 1: row 17 of photos: not an image", "ValueError: row 17 of photos: not an image"),
        ("bug", "error: rank 1: \nTraceback", "KeyError: 'row 17 of photos: not an image'"),
        ("killed", "", "Signal 9 (SIGKILL) received"),
        ("everywhere", "error: rank 0: image_embeds hold NaN", "FloatingPointError: image_embeds hold NaN"),
    ],
)
def test_one_failure_ends_all(how, said, summary, tmp_path):
    terminal = launch_and_fail(tmp_path, TORCHRUN, how)
    assert said in terminal and terminal.count("error: rank") == (how != "killed")
    assert summary in terminal.rpartition("Root Cause")[2]  # the launcher's last words


def test_a_failure_in_training_ends_all(recipe, tmp_path):
    settings = ["--per_device_train_batch_size", "4", "--eval_on_start", "false", "--dataloader_num_workers", "1"]
    terminal = launch_and_fail(tmp_path, SHIPPED, "bad data", recipe, *settings)
    assert terminal.count("error: rank 1: row 17 of photos: not an image\n") == 1
    assert "ValueError: row 17 of photos: not an image\n" in terminal.rpartition("Root Cause")[2]


def test_a_single_process_exits_with_one_line():
    with pytest.raises(SystemExit, match="^error: no such file$"):
        stop(OSError("no such file"))
