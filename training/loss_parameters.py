"""The parameters that a loss owns (a learned bias, a projection).

Trainer and DistributedDataParallel optimise, clip, average and save the parameters of one model. `LossParameters` does
the same for those of the loss; `parameter_trainer.ParameterTrainer` calls it at the right moments.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from universal_gcl.retrieval.processes import world_size

LOSS_WEIGHTS = "loss.pt"  # in a checkpoint


class LossParameters:
    """
    Args:
        loss: the loss; an `nn.Module` may have parameters and buffers, anything else has none. It is moved to the
            accelerator's device.
        accelerator (`accelerate.Accelerator`): the accelerator of this process.

    Raises:
        ValueError: the loss has trained parameters, but FSDP2 or DeepSpeed shard the work.
    """

    def __init__(self, loss: Any, accelerator: Accelerator) -> None:
        self.module: nn.Module | None = None
        if isinstance(loss, nn.Module):
            loss.to(accelerator.device)  # buffers that are not saved too
            self.module = loss if loss.state_dict() else None
        kind = accelerator.distributed_type
        if self.trained and kind in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            raise ValueError(
                f"{type(loss).__name__} has parameters of its own, which can't be trained with {kind.value}: use "
                "hub_configs/accelerate/eight_gpus.yaml (DDP), or freeze them (requires_grad_(False))"
            )

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that require a gradient."""
        return [] if self.module is None else [p for p in self.module.parameters() if p.requires_grad]

    def with_model(self, model: nn.Module) -> nn.Module:
        """A module whose parameters are those of `model` and the trained ones of the loss."""
        return nn.ModuleList([model, self.module]) if self.module is not None and self.trained else model

    def start(self) -> None:
        """Give all processes the values of rank 0. Every process must call it, before training."""
        if self.module is not None and world_size() > 1:
            for tensor in self._tensors():
                dist.broadcast(tensor.data, src=0)

    def clear_gradients(self) -> None:
        """Remove the gradients. Call it before the first backward pass of an optimiser step."""
        for parameter in self.trained:
            parameter.grad = None

    def average_gradients(self) -> None:
        """Average the gradients over the processes, as DistributedDataParallel does for the model's. Every process must
        call it, after the last backward pass of an optimiser step. Parameters without a gradient get zeros."""
        for parameter in self.trained:
            if parameter.grad is None:  # other processes may have one, and wait for this process
                parameter.grad = torch.zeros_like(parameter)
            if world_size() > 1:
                dist.all_reduce(parameter.grad)
                parameter.grad /= world_size()

    def check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raise ValueError unless `optimizer` has the trained parameters."""
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        if any(id(parameter) not in held for parameter in self.trained):
            raise ValueError(
                f"{type(self.module).__name__} has parameters of its own, which the given optimizer does not have: add "
                "them to it, or let GCLTrainer make the optimizer"
            )

    def save(self, folder: str | Path) -> None:
        """Write parameters and buffers into a checkpoint."""
        if self.module is not None:
            torch.save(self.module.state_dict(), Path(folder) / LOSS_WEIGHTS)

    def load(self, folder: str | Path) -> None:
        """
        Read parameters and buffers from a checkpoint.

        Raises:
            ValueError: the checkpoint was written with a loss that has other parameters, or none.
        """
        path = Path(folder) / LOSS_WEIGHTS
        if path.is_file() != (self.module is not None):
            raise ValueError(
                f"{folder} was trained with a loss {'with' if path.is_file() else 'without'} parameters of its own: "
                "resume it with the same loss"
            )
        if self.module is None:
            return
        state = torch.load(path, map_location="cpu", weights_only=True)
        try:
            self.module.load_state_dict(state)
        except RuntimeError as error:
            raise ValueError(f"{path} does not fit {type(self.module).__name__}: {error}") from error

    def _tensors(self) -> Iterator[torch.Tensor]:
        assert self.module is not None
        yield from self.module.parameters()
        yield from self.module.buffers()
