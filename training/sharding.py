"""What FSDP2 and DeepSpeed ZeRO-1 need in addition to `accelerator.prepare`.

Notable features:
- scalar parameters, which neither of them accepts, stay whole on every rank, and the temperature stays in float32;
- FSDP2 shards the backbone layer by layer, for any backbone;
- `whole_parameters` gathers a sharded model once, after which ranks can embed different numbers of batches;
- a sharded model is saved as a folder that `from_pretrained` loads anywhere.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from universal_gcl.retrieval.processes import world_size


def prepare_sharding(model: Any, accelerator: Accelerator) -> None:
    """
    Get a model ready for `accelerator.prepare` under FSDP2 or DeepSpeed. Call it once, before the optimiser is made.

    Args:
        model (`GCLModel`): moved to the accelerator's device, in place. Not changed under DDP and in one process.
        accelerator (`accelerate.Accelerator`): its FSDP2 plugin is changed in place.
    """
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    # an evaluation before training needs the model on the device, and both accept contiguous parameters only
    model.to(accelerator.device)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    scalars = nn.ParameterList(parameter for parameter in model.parameters() if parameter.ndim == 0)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for parameter in scalars:
            # DeepSpeed 0.19 broadcasts parameters as bytes, which fails on scalars; with this mark it skips them. All
            # ranks load them from one checkpoint anyway.
            parameter.ds_optim_param = True
        return
    plugin = accelerator.state.fsdp_plugin
    # fully_shard refuses scalars; a sharded temperature would also be cast to bfloat16 in mixed precision
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), scalars]
    for parameter in scalars:
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_average_gradient)
    if not plugin.transformer_cls_names_to_wrap:
        plugin.transformer_cls_names_to_wrap = layer_classes(model)


def layer_classes(model: Any) -> list[str]:
    """Sorted names of the module classes that FSDP2 shards as units: those that transformers would not split, without
    those that hold the token embeddings, which accelerate shards as a unit of their own."""
    embeddings = model.get_input_embeddings()
    holders = {type(module).__name__ for module in model.modules() if embeddings in module.modules()}
    return sorted(set(model._no_split_modules) - holders)


def _average_gradient(parameter: Any) -> None:
    """Average the gradient over the processes, as FSDP2 does for the parameters that it shards. With accumulation it
    averages the sum so far, which gives the same result in the end."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


def tell_optimizer(parameter: nn.Parameter) -> None:
    """Call it after changing `parameter` in place: the next step would restore the copy in DeepSpeed's optimiser."""
    if getattr(parameter, "_hp_mapping", None) is not None:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, parameter.data)


@contextmanager
def whole_parameters(model: nn.Module, accelerator: Accelerator) -> Iterator[None]:
    """A context in which every rank holds all parameters of an FSDP2 model, so that forward passes don't communicate,
    and ranks can do different numbers of them. Every rank must enter it. Other models stay unchanged."""
    units: list[Any] = [module for module in model.modules() if _is_sharded(module)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # accelerate doesn't reshard the root, because the backward pass needs it again at once
            again = accelerator.state.fsdp_plugin.reshard_after_forward and unit is not model
            unit.set_reshard_after_forward(again, recurse=False)
            unit.reshard()


def _is_sharded(module: Any) -> bool:
    from torch.distributed.fsdp import FSDPModule  # needs a build of torch with torch.distributed

    return isinstance(module, FSDPModule)


class SavedClassCallback(TrainerCallback):
    """fully_shard gives the model a new class. This callback gives that class the name and module of the original one.
    Otherwise `save_pretrained` would write the new class's name into the configuration and copy torch's file as its
    code."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **kwargs: Any,
    ) -> None:
        if _is_sharded(model):
            sharded, original = type(model), type(model).__mro__[2]
            sharded.__module__, sharded.__name__ = original.__module__, original.__name__
            sharded.__qualname__ = original.__qualname__
