"""Lets accelerate take gloo processes for GPUs: it knows FSDP on accelerators only, and runs DDP on CPUs instead.

Call `install` before any TrainingArguments is made. All that runs from there is the real FSDP2 or DeepSpeed.
"""

import os

import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType


def _gloo(self, *args, **kwargs):
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    return "gloo", DistributedType.MULTI_GPU


def install():
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    PartialState._prepare_backend = _gloo
