"""Run under torchrun or plain python: train with an overridden compute_loss and with a loss that has parameters.

Argument: output file, where rank 0 saves the weights, the losses and the gradient norms of every case.
"""

import os
import sys

import torch

from tests.support.own_losses import LocalSigmoidLoss, SigmoidLoss, UniformTrainer, trained, weights
from universal_gcl.retrieval.processes import world_size
from universal_gcl.training.trainer import GCLTrainer


class FixedTemperatureLoss(torch.nn.Module):
    """It uses neither the fused embeddings nor the temperature, for whose gradients DistributedDataParallel waits."""

    def forward(self, image_embeds, text_embeds, processes, **unused):
        images, texts = processes.gather(image_embeds), processes.gather(text_embeds)
        return torch.nn.functional.cross_entropy(10 * images @ texts.T, torch.arange(len(images)))


PROCESSES = int(os.environ.get("WORLD_SIZE", 1))
OVERRIDE, OWN = {"cls": UniformTrainer}, {"cls": GCLTrainer, "loss": SigmoidLoss}
CHUNKS = {"grad_cache_chunk": 4}
CASES = {
    "override, plain": OVERRIDE,
    "override, cached": OVERRIDE | CHUNKS,
    "parameters, clipped, with another start on rank 1": OWN | {"max_grad_norm": 0.1, "start": True},
    "parameters, local anchors": OWN | {"loss": LocalSigmoidLoss},
    "parameters, local anchors, cached and accumulated": OWN
    | {"loss": LocalSigmoidLoss, "gradient_accumulation_steps": 2}
    | CHUNKS,
    "without the temperature, plain": {"cls": GCLTrainer, "loss": FixedTemperatureLoss},
    "without the temperature, cached": {"cls": GCLTrainer, "loss": FixedTemperatureLoss} | CHUNKS,
}


def train(cls, loss=None, start=False, gradient_accumulation_steps=1, **settings):
    own = loss and loss().double()
    if start and int(os.environ.get("RANK", 0)) == 1:
        own.bias.data += 3
    trainer = trained(
        "unused", cls, own, max_steps=2, gradient_accumulation_steps=gradient_accumulation_steps,
        per_device_train_batch_size=12 // PROCESSES // gradient_accumulation_steps,
        **({"ddp_backend": "gloo"} if PROCESSES > 1 else {}), **settings,
    )  # fmt: skip
    assert trainer.args.world_size == world_size() == PROCESSES
    return trainer


def main(out):
    results = {}
    for name, case in CASES.items():
        trainer = train(**case)
        entries = [entry for entry in trainer.state.log_history if "loss" in entry]
        figures = {key: torch.tensor([entry[key] for entry in entries]) for key in ("loss", "grad_norm")}
        results[name] = weights(trainer) | figures
    if trainer.is_world_process_zero():
        torch.save(results, out)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down; what is tested is done and saved


if __name__ == "__main__":
    main(sys.argv[1])
