"""Runs a script in one process or, under torchrun, in several, and fails with its errors if it fails.

There is no time limit: a slow machine is no fault, and where a hang is the subject the test sets a limit itself.
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
# followed by one of hub_configs/accelerate/
LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]


def environment(**more):
    """The variables of this process, the repository importable, and one thread for each process."""
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | more


def launch(script, *arguments, processes=1, cwd=None, options=(), **variables):
    """Run `script` with `arguments` in `processes` processes; `options` are Python's own."""
    command = [sys.executable, *options]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    return run_checked([*command, script, *arguments], cwd=cwd, **variables)


def run_checked(command, cwd=None, **variables):
    """Run a command to its end; returns the finished process, whose output is text."""
    run = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=environment(**variables), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-6000:]
    return run
