"""What can't work with several processes is refused at start, with the remedy."""

from types import SimpleNamespace

import pytest
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin, ParallelismConfig

from tests.support.training_runs import make_pairs, make_trainer
from universal_gcl.training.parallelism import check_parallelism
from universal_gcl.training.training_arguments import GCLTrainingArguments


def check(monkeypatch, kind=DistributedType.MULTI_GPU, world_size=2, n_gpu=1, parallelism=None, **settings):
    state, model = settings.pop("state", {}), settings.pop("model", None)
    accelerator = SimpleNamespace(
        distributed_type=kind, parallelism_config=parallelism, state=SimpleNamespace(**state),
        mixed_precision=settings.pop("mixed_precision", "no"),
    )  # fmt: skip
    with monkeypatch.context() as alone:  # accelerate would look for the processes of a launch
        alone.delenv("WORLD_SIZE", raising=False)
        arguments = GCLTrainingArguments(output_dir="unused", use_cpu=True, **settings)
    monkeypatch.setattr(GCLTrainingArguments, "world_size", world_size)
    monkeypatch.setattr(GCLTrainingArguments, "n_gpu", n_gpu)
    check_parallelism(arguments, accelerator, model)


def fsdp(version=2, **settings):
    settings = {"state_dict_type": "FULL_STATE_DICT", "cpu_ram_efficient_loading": False} | settings
    return {"fsdp_plugin": FullyShardedDataParallelPlugin(fsdp_version=version, **settings)}


def zero(stage=1, device="none", **config):
    plugin = SimpleNamespace(zero_stage=stage, offload_optimizer_device=device, deepspeed_config=config)
    return {"deepspeed_plugin": plugin}


def test_processes_that_would_each_train_alone_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="^2 processes were launched.*--use_cpu"):
        check(monkeypatch, DistributedType.NO, world_size=1)
    check(monkeypatch, DistributedType.MULTI_CPU)


def test_what_works_is_let_through(monkeypatch):
    check(monkeypatch)
    check(monkeypatch, DistributedType.NO, world_size=1, auto_find_batch_size=True)
    check(monkeypatch, dataloader_drop_last=False)
    check(monkeypatch, DistributedType.FSDP, state=fsdp(), mixed_precision="bf16", fsdp=True)
    check(monkeypatch, DistributedType.DEEPSPEED, state=zero(bf16={"enabled": False}))
    check(monkeypatch, DistributedType.FSDP, state=fsdp(), parallelism=ParallelismConfig(dp_shard_size=2))


@pytest.mark.parametrize(
    "message, settings",
    [
        ("2 GPUs are visible to one process.*--num_processes 2", {"n_gpu": 2}),
        ("XLA is not supported.*fsdp2.yaml", {"kind": DistributedType.XLA}),
        ("MEGATRON_LM is not supported", {"kind": DistributedType.MEGATRON_LM}),
        ("split_batches must be false", {"accelerator_config": {"split_batches": True}}),
        ("dispatch_batches must be false", {"accelerator_config": {"dispatch_batches": True}}),
        ("auto_find_batch_size must be false", {"auto_find_batch_size": True}),
        ("even_batches: false", {"accelerator_config": {"even_batches": False}, "dataloader_drop_last": False}),
        ("negatives of themselves", {"mask_equal_ids": False, "dataloader_drop_last": False}),
        ("FSDP was asked for, but accelerate would run MULTI_CPU", {"fsdp": True, "kind": DistributedType.MULTI_CPU}),
        ("tp_size is 2: only data", {"parallelism": SimpleNamespace(tp_size=2)}),
        ("cp_size is 2: only data", {"parallelism": SimpleNamespace(cp_size=2)}),
        ("sp_size is 2: only data", {"parallelism": SimpleNamespace(sp_size=2)}),
        ("dp_replicate_size is 2: only data", {"parallelism": ParallelismConfig(dp_replicate_size=2)}),
    ],
)
def test_what_does_not_work_is_refused(message, settings, monkeypatch):
    with pytest.raises(ValueError, match=message):
        check(monkeypatch, **settings)


@pytest.mark.parametrize(
    "message, state, mixed_precision",
    [
        ("FSDP version 1 is not supported: set fsdp_version: 2", fsdp(version=1), "no"),
        ("fsdp_offload_params does not work", fsdp(cpu_offload=True), "no"),
        ("fsdp_cpu_ram_efficient_loading does not work", fsdp(cpu_ram_efficient_loading=True), "no"),
        ("fsdp_state_dict_type.*FULL_STATE_DICT", fsdp(state_dict_type="SHARDED_STATE_DICT"), "no"),
        ("fp16 does not work.*bf16: true", fsdp(), "fp16"),
    ],
)
def test_fsdp_settings_that_do_not_work_are_refused(message, state, mixed_precision, monkeypatch):
    with pytest.raises(ValueError, match=message):
        check(monkeypatch, DistributedType.FSDP, state=state, mixed_precision=mixed_precision)


@pytest.mark.parametrize(
    "message, state",
    [
        ("ZeRO stage 2 is not supported.*fsdp2.yaml", zero(2)),
        ("ZeRO stage 3 is not supported", zero(3)),
        ("bf16 casts the temperature", zero(bf16={"enabled": True})),
        ("offload_optimizer_device is not supported", zero(device="cpu")),
    ],
)
def test_deepspeed_settings_that_do_not_work_are_refused(message, state, monkeypatch):
    with pytest.raises(ValueError, match=message):
        check(monkeypatch, DistributedType.DEEPSPEED, state=state)


def test_fsdp_from_the_launcher_does_not_silently_become_ddp(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP was asked for, but accelerate would run NO"):
        check(monkeypatch, DistributedType.NO)


def test_the_trainer_checks(tmp_path, monkeypatch):
    monkeypatch.setattr(GCLTrainingArguments, "world_size", 2)
    with pytest.raises(ValueError, match="auto_find_batch_size must be false"):
        make_trainer(tmp_path, make_pairs(48), auto_find_batch_size=True)


@pytest.mark.parametrize("kind, state", [(DistributedType.FSDP, fsdp()), (DistributedType.DEEPSPEED, zero())])
def test_lora_is_for_ddp(kind, state, monkeypatch):
    adapted = SimpleNamespace(peft_config={})
    check(monkeypatch, model=adapted)
    with pytest.raises(ValueError, match=f"LoRA does not work here with {kind.value}.*eight_gpus.yaml"):
        check(monkeypatch, kind, state=state, model=adapted)


def test_4_bits_are_for_one_process(monkeypatch):
    quantized = SimpleNamespace(is_quantized=True)
    check(monkeypatch, DistributedType.NO, world_size=1, model=quantized)
    with pytest.raises(ValueError, match="peft.load_in_4bit works in one process only"):
        check(monkeypatch, model=quantized)
