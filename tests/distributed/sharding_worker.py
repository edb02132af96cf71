"""Run under torchrun (FSDP2 or ZeRO-1) or plain python (one process): train tiny models, save what comes of them.

Arguments: output folder, total batch size, "fsdp2", "zero1" or "none". Every process asserts the world size and that
the work really is shared out as named.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from modeling_gcl import GCLModel
from tests.distributed import gloo_as_gpus
from tests.support.backbones import tiny_encoder, tiny_processor
from tests.support.training_runs import make_pairs, make_trainer
from universal_gcl.retrieval.processes import world_size
from universal_gcl.training.data import PairCollator
from universal_gcl.training.freezing import freeze_parts

PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
# a large epsilon: else Adam blows up the rounding errors of gradients that are almost 0
ADAMW = {"optim": "adamw_torch_fused", "adam_epsilon": 1e-3, "learning_rate": 1e-2, "weight_decay": 0.1}
RUNS = {
    "sgd": {},
    "accumulated": ADAMW | {"max_grad_norm": 0.5, "gradient_accumulation_steps": 2},
    "frozen_text": {"freeze": ["text"]},
    "clamped": {"max_logit_scale": 10.0, "max_steps": 2, "learning_rate": 1e-4},
    "saved": {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, **ADAMW},
    "resumed": ADAMW,
}
FSDP2_RUNS = {
    "cached": ADAMW | {"gradient_accumulation_steps": 2, "grad_cache_chunk": 2},
    "bf16": {"bf16": True, "learning_rate": 1e-2},
    "checkpointed": {"checkpointed": True},
    "siglip2": {"encoder": "siglip2", "max_steps": 2},
    "vision-text-dual-encoder": {"encoder": "vision-text-dual-encoder", "max_steps": 2},
}
ZERO1 = {
    "zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": "auto", "gradient_clipping": "auto",
    "gradient_accumulation_steps": "auto", "zero_allow_untested_optimizer": True,
}  # fmt: skip


def build(name, encoder="clip", freeze=(), max_logit_scale=100.0):
    model = GCLModel.from_encoder(
        tiny_encoder(encoder), logit_scale_init_value=10.0, max_logit_scale=max_logit_scale
    ).to(memory_format=torch.channels_last)
    for module in model.modules():  # random numbers differ between numbers of processes
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    freeze_parts(model, freeze)
    if name == "clamped":  # as one large step would leave it
        model.logit_scale.log_scale.data += 1
    return model


def train(out, total_batch, sharding, name, *, encoder="clip", checkpointed=False, **settings):
    model = build(name, encoder, **{k: settings.pop(k) for k in ("freeze", "max_logit_scale") if k in settings})
    if sharding == "fsdp2":
        settings |= {"fsdp": True, "fsdp_config": {"version": 2, "activation_checkpointing": checkpointed}}
    if sharding == "zero1":
        settings["deepspeed"] = ZERO1
    trainer = make_trainer(
        out / "checkpoints", make_pairs(48), make_pairs(7, seed=1), model,
        per_device_train_batch_size=total_batch // PROCESSES // settings.get("gradient_accumulation_steps", 1),
        eval_on_start=False, **({"num_train_epochs": 1} | settings),
    )  # fmt: skip
    trainer.processing_class = tiny_processor(encoder)
    trainer.data_collator = PairCollator(trainer.processing_class)
    assert trainer.args.world_size == world_size() == PROCESSES
    trainer.train(resume_from_checkpoint=name == "resumed")
    parameters = dict(trainer.model.named_parameters())
    if sharding == "fsdp2":
        units = [module for module in trainer.model.modules() if isinstance(module, FSDPModule)]
        assert trainer.accelerator.is_fsdp2 and len(units) >= 6, len(units)  # root, token embeddings, 2 x 2 layers
        assert all(isinstance(p, DTensor) == (p.ndim > 0) for p in parameters.values())
    if sharding == "zero1":
        assert trainer.model_wrapped.zero_optimization_stage() == 1
    log_scale = parameters["logit_scale.log_scale"]
    assert log_scale.dtype == torch.float32 and log_scale.item() <= trainer.model.logit_scale.maximum
    candidates = trainer.embed_eval_pairs().candidates
    weights = trainer.accelerator.get_state_dict(trainer.model)
    if trainer.is_world_process_zero():
        trainer.model.save_pretrained(out / name, state_dict=weights)
        losses = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        embeds = torch.from_numpy(np.concatenate(list(candidates.values())))
        torch.save({"losses": losses, "embeds": embeds}, out / f"{name}.pt")
    trainer.accelerator.wait_for_everyone()
    return trainer


if __name__ == "__main__":
    if PROCESSES > 1:
        gloo_as_gpus.install()
    folder, batch, kind = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    for run, changes in (RUNS if kind == "zero1" else RUNS | FSDP2_RUNS).items():
        last = train(folder, batch, kind, run, **changes)
    last.accelerator.end_training()
