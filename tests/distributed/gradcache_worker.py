"""Run under torchrun or plain python: train with GradCache on several processes, plainly on one; save rank 0's weights.

Argument: output file. With two processes memory also runs short, on the last rank alone, at several places.
"""

import os
import sys
from functools import wraps
from unittest import mock

import torch

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder
from tests.support.training_runs import CHECKPOINTING, make_pairs, make_trainer
from universal_gcl.training.arguments import LoraArguments
from universal_gcl.training.lora import add_lora

# the settings, and at which call of the model or of backward (over all steps) the last rank runs out of memory. In each
# of the two steps one of two ranks embeds 2 micro-batches of 3 chunks: 0-4 without a graph, 5 with one, 6-10 again, and
# goes backward 6 times
CASES = {
    "gcl": ({}, None),
    "cl": ({"loss": "cl"}, None),
    "alignclip": ({"loss": "alignclip"}, None),
    "half ring": ({"half_ring": True}, None),
    "matryoshka": ({"matryoshka_dims": [3, 8]}, None),
    "lora": ({"lora": True}, None),
    "weighted": ({"direction_weights": {"i→t": 2.0, "t→it": 0.5}, "denominator": "without_other_positive"}, None),
    "short in the first chunk": ({}, ("model", 0)),
    "short where a graph is kept": ({}, ("model", 5)),
    "short in backward": ({}, ("backward", 3)),
    # without a search for unused parameters DistributedDataParallel rebuilds its buckets in the second step
    "short in the second step": ({CHECKPOINTING: True}, ("model", 11)),
    "short where a graph is kept, in the second step": ({CHECKPOINTING: True}, ("model", 16)),
}


def build(processes, chunk=2, lora=False, **settings):
    if lora:
        torch.manual_seed(0)
        model = GCLModel.from_encoder(tiny_encoder("clip"), logit_scale_init_value=10.0)
        settings["model"] = add_lora(model, LoraArguments(r=4), "unused")
    several = {"per_device_train_batch_size": 12 // processes, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    batch = several | {"grad_cache_chunk": chunk} if processes > 1 else {"per_device_train_batch_size": 24}
    return make_trainer("unused", make_pairs(48), num_train_epochs=1, **(batch | settings))


def run_short(trainer, part, calls):
    """Let the last rank's model or backward fail at these calls; the model inside, as it would in earnest."""
    owner, name = (trainer.model.encoder, "get_image_features") if part == "model" else (trainer.grad_cache, "backward")
    inner, seen = getattr(owner, name), []

    @wraps(inner)  # the model looks at the names of its inputs
    def outer(*args, **kwargs):
        seen.append(None)
        if trainer.args.process_index == trainer.args.world_size - 1 and len(seen) - 1 in calls:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inner(*args, **kwargs)

    setattr(owner, name, outer)


def main(out):
    processes = int(os.environ.get("WORLD_SIZE", 1))
    results = {}
    for name, (settings, shortage) in CASES.items():
        if processes != 2 and shortage is not None:
            continue
        trainer = build(processes, **settings)
        assert trainer.args.world_size == processes
        if shortage is not None:
            run_short(trainer, shortage[0], {shortage[1]})
        trainer.train()
        assert trainer.state.global_step == 2
        assert trainer.grad_cache.chunk_size == (None if processes == 1 else 2 if shortage is None else 1), name
        results[name] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        results[name]["loss"] = torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    if processes == 2:
        check_errors(processes)
    if trainer.is_world_process_zero():
        torch.save(results, out)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


def check_errors(processes):
    """What stops every rank, with the same message."""
    trainer = build(processes)
    trainer.grad_cache.chunk_size -= trainer.args.process_index
    expect(ValueError, "different numbers of chunks", trainer.train)
    trainer = build(processes)
    run_short(trainer, "model", range(100))
    expect(MemoryError, "with chunks of 1 pairs", trainer.train)
    # where the memory at hand differs, the smallest decides for all
    here = 4 if trainer.args.process_index == 0 else 2
    with mock.patch("universal_gcl.training.memory.chunk_that_fits", lambda *figures: here):
        trainer = build(processes, chunk=None, gradient_accumulation_steps=1, effective_batch_size=48)
    assert (trainer.args.gradient_accumulation_steps, trainer.batch_plan.chunk) == (4, 2)


def expect(kind, message, call):
    try:
        call()
    except kind as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"{kind.__name__} with {message!r} was not raised")


if __name__ == "__main__":
    main(sys.argv[1])
