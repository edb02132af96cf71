"""Refuses kinds of parallelism that don't work here, before training starts.

Every rank must hold the same number of pairs, no pair may be on two ranks, and gradients must be averaged over the
ranks, as DistributedDataParallel, FSDP2 and DeepSpeed ZeRO-1 do.
"""

import os
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from universal_gcl.training.training_arguments import GCLTrainingArguments

CONFIGS = "use one of hub_configs/accelerate/: eight_gpus.yaml (DDP), fsdp2.yaml, zero1.yaml"


def check_parallelism(arguments: GCLTrainingArguments, accelerator: Accelerator, model: nn.Module) -> None:
    """
    Refuse kinds of parallelism that would train wrongly or hang, or that are not tested.

    Args:
        arguments (`GCLTrainingArguments`): the arguments of this process.
        accelerator (`accelerate.Accelerator`): the accelerator of this process.
        model (`nn.Module`): not yet moved or wrapped.

    Raises:
        ValueError: the parallelism is refused. The message names the setting and the remedy. Every rank raises the
            same.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process. Launch one process per GPU: "
            f"accelerate launch --num_processes {arguments.n_gpu} train.py ... (or set CUDA_VISIBLE_DEVICES=0)"
        )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched > 1 and arguments.world_size == 1:  # accelerate does this if it finds no GPU
        raise ValueError(
            f"{launched} processes were launched, but each would train alone: there is no GPU here. Add --use_cpu"
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.XLA, DistributedType.MEGATRON_LM):
        raise ValueError(f"{kind.value} is not supported: {CONFIGS}")
    _check_asked_for(arguments, kind)
    _check_model_parallelism(accelerator)
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and hasattr(model, "peft_config"):
        raise ValueError(
            f"LoRA does not work here with {kind.value}: use hub_configs/accelerate/eight_gpus.yaml (DDP), since its "
            "gradients and optimiser state are small"
        )
    if arguments.world_size > 1 and getattr(model, "is_quantized", False):
        raise ValueError("peft.load_in_4bit works in one process only: leave it out with several")
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin, accelerator.mixed_precision)
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin)
    if arguments.world_size > 1:
        _check_batches(arguments)


def _check_asked_for(arguments: GCLTrainingArguments, kind: DistributedType) -> None:
    """Without GPUs, accelerate falls back to DDP and doesn't say so."""
    asked = {
        DistributedType.FSDP: arguments.fsdp or _is_set("ACCELERATE_USE_FSDP"),
        DistributedType.DEEPSPEED: arguments.deepspeed or _is_set("ACCELERATE_USE_DEEPSPEED"),
    }
    for wanted, wish in asked.items():
        if wish and kind != wanted:
            raise ValueError(
                f"{wanted.value} was asked for, but accelerate would run {kind.value}: {wanted.value} needs several "
                "processes on GPUs. Without GPUs use hub_configs/accelerate/two_cpu_processes.yaml (DDP)"
            )


def _is_set(name: str) -> bool:
    return os.environ.get(name, "false").lower() == "true"


def _check_model_parallelism(accelerator: Accelerator) -> None:
    config = accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size", "dp_replicate_size"):
        size = getattr(config, name, 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config.{name} is {size}: only data parallelism over all processes is supported, because "
                f"every rank must hold pairs of its own. Leave it at 1, and {CONFIGS}"
            )


def _check_fsdp(plugin: Any, mixed_precision: str) -> None:
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP version {plugin.fsdp_version} is not supported: set fsdp_version: 2, or {CONFIGS}")
    from torch.distributed.fsdp import CPUOffloadPolicy  # needs a build of torch with torch.distributed

    refused = {
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "false; gradient_checkpointing saves memory too",
        ),
        # accelerate would broadcast the state as if no tensor in it were a buffer
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "false"),
        "fsdp_state_dict_type": ("FULL" not in str(plugin.state_dict_type), "FULL_STATE_DICT, to save whole models"),
        "fp16": (mixed_precision == "fp16", "false, and bf16: true"),
    }
    for name, (wrong, remedy) in refused.items():
        if wrong:
            raise ValueError(f"{name} does not work here with FSDP2: set it to {remedy}")


def _check_deepspeed(plugin: Any) -> None:
    if plugin.zero_stage != 1:
        raise ValueError(
            f"DeepSpeed ZeRO stage {plugin.zero_stage} is not supported: set zero_stage: 1, or use "
            "hub_configs/accelerate/fsdp2.yaml, which shards gradients and parameters too"
        )
    for name in ("bf16", "fp16"):
        if plugin.deepspeed_config.get(name, {}).get("enabled", False) is True:
            raise ValueError(
                f"DeepSpeed's {name} casts the temperature to half precision too: set {name}: false, or use "
                "hub_configs/accelerate/eight_gpus.yaml or fsdp2.yaml with the recipe's bf16: true"
            )
    if plugin.offload_optimizer_device not in (None, "none"):
        raise ValueError("DeepSpeed's offload_optimizer_device is not supported: set it to none")


def _check_batches(arguments: GCLTrainingArguments) -> None:
    config: Any = arguments.accelerator_config
    if config.split_batches:
        raise ValueError(
            "training.accelerator_config.split_batches must be false: per_device_train_batch_size counts the pairs of "
            "one device"
        )
    if config.dispatch_batches:
        raise ValueError(
            "training.accelerator_config.dispatch_batches must be false: every process loads its own pairs"
        )
    if arguments.auto_find_batch_size:
        raise ValueError(
            "training.auto_find_batch_size must be false with several processes: one that runs out of memory alone "
            "would leave the others waiting. Lower per_device_train_batch_size"
        )
    if not arguments.dataloader_drop_last and not config.even_batches:
        raise ValueError(
            "training.accelerator_config.even_batches: false gives ranks unequal batches: set it to true, or "
            "training.dataloader_drop_last to true"
        )
    if not arguments.dataloader_drop_last and not arguments.mask_equal_ids:
        raise ValueError(
            "training.dataloader_drop_last: false repeats pairs to fill the last batches of several processes, and "
            "training.mask_equal_ids: false makes such pairs negatives of themselves: set one of them to true"
        )
