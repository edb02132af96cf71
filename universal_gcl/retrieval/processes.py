"""The processes of a launch (accelerate, torchrun), and how they exchange Python objects."""

import os
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# One process may finish its share hours before another. If a process dies, the wait ends at once.
_PATIENCE = timedelta(days=30)


def world_size() -> int:
    """Number of processes; 1 if `torch.distributed` is not initialised."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def own_rank() -> int:
    """Number of this process, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def gather_objects(value: Any, group: Any = None) -> list:
    """The values of all processes, in rank order, on all of them. Waits for all.

    Args:
        value: anything that pickle takes.
        group (`ProcessGroup`, *optional*): the processes; all of them by default.
    """
    if world_size() == 1:
        return [value]
    values: list = [None] * dist.get_world_size(group)
    dist.all_gather_object(values, value, group=group)
    return values


class Processes:
    """
    The processes of a launch as workers that share a job whose results are files. There are `size` of them, and this
    one is number `rank`. Every process must make it and call its methods, in the same order.

    A launch of several processes initialises `torch.distributed` if that is not done yet, and adds a gloo group.
    """

    size: int
    rank: int

    def __init__(self) -> None:
        self._group = None
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            self._group = dist.new_group(backend="gloo", timeout=_PATIENCE)
        self.size, self.rank = world_size(), own_rank()

    def gather(self, value: Any) -> list:
        """The values of all processes, in rank order, on all of them. Waits for all."""
        return gather_objects(value, self._group)

    def collect(self, value: Any) -> list | None:
        """The values of all processes, in rank order, on process 0; None on the others."""
        if self.size == 1:
            return [value]
        values: list | None = [None] * self.size if self.rank == 0 else None
        dist.gather_object(value, values, dst=0, group=self._group)
        return values


def own_device() -> torch.device:
    """This process's GPU (a launch has one process for each GPU of a machine), or the CPU if there is no GPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
