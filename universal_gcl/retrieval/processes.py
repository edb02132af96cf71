"""The processes of a launch (accelerate, torchrun) as sharers of a job whose results are files."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

# one process may have done its share hours before another; one that died ends the wait at once
_PATIENCE = timedelta(days=30)


class Processes:
    """`size` processes, of which this is `rank`. With one, nothing needs torch.distributed; with several, a gloo group
    is made, beside that which may exist already. To be made and called by all processes, in the same order."""

    def __init__(self):
        self.size, self.rank, self._group = int(os.environ.get("WORLD_SIZE", 1)), 0, None
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
            self.rank = dist.get_rank()

    def gather(self, value) -> list:
        """What each process has, in rank order; on all of them. Waits for all."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        dist.all_gather_object(values, value, group=self._group)
        return values

    def collect(self, value) -> list | None:
        """As `gather`, but on process 0 only; None on the others."""
        if self.size == 1:
            return [value]
        values = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values


def own_device() -> torch.device:
    """This process's GPU, in a launch one for each process of a machine; the CPU where there is none."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
