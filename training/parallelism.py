"""What several processes can and can't do together, said before training starts.

Every rank must hold equally many different pairs, and gradients be averaged over ranks: so do DistributedDataParallel,
FSDP2 and DeepSpeed ZeRO-1.
"""

import os

from accelerate.utils import DistributedType

CONFIGS = "use one of hub_configs/accelerate/: eight_gpus.yaml (DDP), fsdp2.yaml, zero1.yaml"


def check_parallelism(arguments, accelerator, model):
    """
    Refuse ways to share out the work that would train wrongly, hang, or that nobody has tested.

    Args:
        arguments (`GCLTrainingArguments`): of this process.
        accelerator (`accelerate.Accelerator`): of this process.
        model (`nn.Module`): not moved or wrapped yet.

    Raises:
        ValueError: naming the setting and the remedy; the same on every rank.
    """
    if arguments.n_gpu > 1:
        raise ValueError(
            f"{arguments.n_gpu} GPUs are visible to one process. Launch one process per GPU: "
            f"accelerate launch --num_processes {arguments.n_gpu} train.py ... (or set CUDA_VISIBLE_DEVICES=0)"
        )
    kind = accelerator.distributed_type
    if kind in (DistributedType.XLA, DistributedType.MEGATRON_LM):
        raise ValueError(f"{kind.value} is not supported: {CONFIGS}")
    _check_asked_for(arguments, kind)
    _check_model_parallelism(accelerator)
    if kind in (DistributedType.FSDP, DistributedType.DEEPSPEED) and hasattr(model, "peft_config"):
        raise ValueError(
            f"LoRA does not work here with {kind.value}: its gradients and optimiser state are small, so use "
            "hub_configs/accelerate/eight_gpus.yaml (DDP)"
        )
    if arguments.world_size > 1 and getattr(model, "is_quantized", False):
        raise ValueError("peft.load_in_4bit is for one process: leave it out with several")
    if kind == DistributedType.FSDP:
        _check_fsdp(accelerator.state.fsdp_plugin, accelerator.mixed_precision)
    if kind == DistributedType.DEEPSPEED:
        _check_deepspeed(accelerator.state.deepspeed_plugin)
    if arguments.world_size > 1:
        _check_batches(arguments)


def _check_asked_for(arguments, kind):
    """accelerate falls back to DDP, without a word, where it finds no GPU."""
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


def _is_set(name):
    return os.environ.get(name, "false").lower() == "true"


def _check_model_parallelism(accelerator):
    config = accelerator.parallelism_config
    for name in ("tp_size", "cp_size", "sp_size", "dp_replicate_size"):
        size = getattr(config, name, 1)
        if size > 1:
            raise ValueError(
                f"parallelism_config.{name} is {size}: only data parallelism over all processes is supported, since "
                f"every rank must hold pairs of its own. Leave it 1, and {CONFIGS}"
            )


def _check_fsdp(plugin, mixed_precision):
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP version {plugin.fsdp_version} is not supported: set fsdp_version: 2, or {CONFIGS}")
    from torch.distributed.fsdp import CPUOffloadPolicy  # needs a build of torch with torch.distributed

    refused = {
        "fsdp_offload_params": (
            isinstance(plugin.cpu_offload, CPUOffloadPolicy),
            "false; gradient_checkpointing saves memory too",
        ),
        # it broadcasts the state as if no tensor in it were a buffer
        "fsdp_cpu_ram_efficient_loading": (plugin.cpu_ram_efficient_loading, "false"),
        "fsdp_state_dict_type": ("FULL" not in str(plugin.state_dict_type), "FULL_STATE_DICT, to save whole models"),
        "fp16": (mixed_precision == "fp16", "false, and bf16: true"),
    }
    for name, (wrong, remedy) in refused.items():
        if wrong:
            raise ValueError(f"{name} does not work here with FSDP2: set it to {remedy}")


def _check_deepspeed(plugin):
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


def _check_batches(arguments):
    config = arguments.accelerator_config
    if config.split_batches:
        raise ValueError(
            "training.accelerator_config.split_batches must be false: per_device_train_batch_size counts the pairs of "
            "one device"
        )
    if config.dispatch_batches:
        raise ValueError(
            "training.accelerator_config.dispatch_batches must be false: every process reads its own pairs"
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
            "training.dataloader_drop_last: false fills the last batches of several processes by repeating pairs, "
            "which training.mask_equal_ids: false makes negatives of themselves: set one of them to true"
        )
