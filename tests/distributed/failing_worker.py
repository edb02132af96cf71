"""One process of several fails in the second step while the others wait for it in a collective.

Arguments: how ("bad data", "bug", "killed", "everywhere"), and for a run of train.py its arguments; without them the
step is a bare collective. Every process asserts the world size and leaves a file named by its process id behind.
"""

import os
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from universal_gcl.failures import failing_together, stop

HOW = sys.argv[1]
RANK = int(os.environ["RANK"])


def fail():
    assert dist.get_world_size() == int(os.environ["WORLD_SIZE"]) > 1
    Path(f"{os.getpid()}.pid").touch()
    if HOW == "everywhere":
        raise FloatingPointError("image_embeds hold NaN")
    if RANK == 1:
        if HOW == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise {"bad data": ValueError, "bug": KeyError}[HOW]("row 17 of photos: not an image")


def steps():
    dist.init_process_group("gloo")
    try:
        for step in range(3):
            dist.all_reduce(torch.ones(1))
            if step == 1:
                fail()
    except (ValueError, FloatingPointError) as error:
        stop(error)


def training(arguments):
    from universal_gcl import train
    from universal_gcl.training.trainer import GCLTrainer

    training_step = GCLTrainer.training_step

    def fail_in_step_two(self, *args, **kwargs):
        if self.state.global_step == 1:
            fail()
        return training_step(self, *args, **kwargs)

    GCLTrainer.training_step = fail_in_step_two
    train.main(arguments)


if __name__ == "__main__":
    with failing_together():
        training(sys.argv[2:]) if sys.argv[2:] else steps()
