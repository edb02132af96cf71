"""Rows shared by the processes of a launch: the same files as by one process, and one that fails ends all."""

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = ROOT / "tests" / "retrieval" / "embed_worker.py"
ACCELERATE = ["accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
ACCELERATE += [str(ROOT / "hub_configs" / "accelerate" / "two_cpu_processes.yaml")]
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node=3"]


def run(folder, launcher, how):
    images = folder / "images"
    images.mkdir(exist_ok=True)
    name = "one" if launcher is None else "several"
    command = [
        sys.executable,
        *(["-m", *launcher] if launcher else []),
        WORKER,
        folder / name,
        folder / "log",
        images,
        how,
    ]
    return subprocess.run(
        command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what one process writes."""
    folder = tmp_path_factory.mktemp("embed")
    done = run(folder, None, "once")
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("launcher", [ACCELERATE, TORCHRUN], ids=["accelerate", "torchrun"])
def test_several_processes_write_what_one_writes(launcher, folder):
    for log in folder.glob("log-*"):
        log.unlink()
    shutil.rmtree(folder / "several", ignore_errors=True)
    done = run(folder, launcher, "once")
    assert done.returncode == 0, done.stderr[-4000:]
    one, several = ({path.name: path.read_bytes() for path in (folder / name).iterdir()} for name in ("one", "several"))
    assert one == several
    shares = [list(map(int, log.read_text().split())) for log in folder.glob("log-*")]
    assert len(shares) == (2 if launcher is ACCELERATE else 3)
    assert sum(map(sum, shares)) == sum(map(int, (folder / "log").read_text().split()))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_process_that_fails_ends_all(tmp_path):
    done = run(tmp_path, TORCHRUN, "failing")
    marks = list(tmp_path.glob("*.pid"))
    assert done.returncode != 0 and len(marks) == 3
    assert "FloatingPointError: this process can't" in done.stderr
    assert time.time() - max(mark.stat().st_mtime for mark in marks) < 60
    for mark in marks:
        with pytest.raises(ProcessLookupError):
            os.kill(int(mark.stem), 0)
    # what the others wrote is kept: the next run goes on from there
    assert not (tmp_path / "several" / "rows.npy").exists()
