"""What FSDP2 and DeepSpeed ZeRO-1 need beside `accelerator.prepare`.

Notable features:
- scalar parameters, which neither takes, stay whole on every rank, the temperature in float32;
- FSDP2 shards the backbone's layers one by one, whatever backbone it is;
- `whole_parameters` gathers a sharded model once, so that ranks may then embed different numbers of batches;
- the sharded model saves as what it is: a folder that `from_pretrained` loads anywhere.
"""

from contextlib import contextmanager

import torch.distributed as dist
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainerCallback

from universal_gcl.retrieval.processes import world_size


def prepare_sharding(model, accelerator):
    """
    Get a model ready for `accelerator.prepare` under FSDP2 or DeepSpeed; call once, before the optimiser is made.

    Args:
        model (`GCLModel`): moved to the accelerator's device, in place. Left alone under DDP and in one process.
        accelerator (`accelerate.Accelerator`): the plugin of FSDP2 is changed in place.
    """
    if accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
        return
    # an evaluation before training needs the device, and both take contiguous parameters only
    model.to(accelerator.device)
    for parameter in model.parameters():
        parameter.data = parameter.data.contiguous()
    scalars = nn.ParameterList(parameter for parameter in model.parameters() if parameter.ndim == 0)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        for parameter in scalars:
            # DeepSpeed 0.19 broadcasts parameters as bytes, which fails on scalars; with this mark it passes them by.
            # All ranks load them from one checkpoint anyway.
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


def layer_classes(model):
    """Sorted names of the classes that make a unit of sharding each: those that transformers would not split, without
    the ones that hold the token embeddings, which accelerate shards as a unit of their own."""
    embeddings = model.get_input_embeddings()
    holders = {type(module).__name__ for module in model.modules() if embeddings in module.modules()}
    return sorted(set(model._no_split_modules) - holders)


def _average_gradient(parameter):
    """As FSDP2 does with the parameters that it shards. In accumulation the sum so far is averaged: the same in the
    end."""
    dist.all_reduce(parameter.grad)
    parameter.grad /= world_size()


def tell_optimizer(parameter):
    """After a change of `parameter` in place: DeepSpeed's optimiser holds a copy, which the next step would restore."""
    if getattr(parameter, "_hp_mapping", None) is not None:
        from deepspeed.utils import safe_set_full_fp32_param

        safe_set_full_fp32_param(parameter, parameter.data)


@contextmanager
def whole_parameters(model, accelerator):
    """Hold all parameters of an FSDP2 model whole on every rank, so that forward passes communicate nothing and ranks
    may make different numbers of them. Any other model is left as it is. Every rank must enter."""
    units = [module for module in model.modules() if _is_sharded(module)]
    for unit in units:
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            # the root is needed again at once in the backward pass: accelerate leaves it whole
            again = accelerator.state.fsdp_plugin.reshard_after_forward and unit is not model
            unit.set_reshard_after_forward(again, recurse=False)
            unit.reshard()


def _is_sharded(module):
    from torch.distributed.fsdp import FSDPModule  # needs a build of torch with torch.distributed

    return isinstance(module, FSDPModule)


class SavedClassCallback(TrainerCallback):
    """fully_shard makes the model an instance of a new class. `save_pretrained` would write that class's name into the
    configuration and copy the file it came from, torch's own: the new class takes over name and module of the old."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        if _is_sharded(model):
            sharded, original = type(model), type(model).__mro__[2]
            sharded.__module__, sharded.__name__ = original.__module__, original.__name__
            sharded.__qualname__ = original.__qualname__
