"""Run under torchrun or plain python: train tiny models with every loss and fusion, save the weights of rank 0.

Arguments: output file, total batch size. Every process asserts the world size that the launcher promised.
"""

import os
import sys

import torch

from tests.support.backbones import tiny_model
from tests.support.training_runs import make_pairs, make_trainer
from universal_gcl.retrieval.processes import world_size
from universal_gcl.training.distributed import RowShardedEncoder

RUNS = {  # family of the model, settings of the training
    "gcl": ("clip", {"loss": "gcl"}),
    "gcl_weighted": (
        "clip",
        {"denominator": "without_other_positive", "direction_weights": {"i→t": 2.0, "t→it": 0.5}},
    ),
    "cl": ("clip", {"loss": "cl"}),
    "alignclip": ("clip", {"loss": "alignclip"}),
    "native fusion": ("vista-base", {}),
    "native fusion, cl": ("vista-base", {"loss": "cl"}),
    "gated fusion": ("clip, gated", {}),
}


def undropped_model(family):
    """Without dropout, which processes draw each for itself."""
    model = tiny_model(family, logit_scale_init_value=10.0)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def main(out, total_batch):
    expected = int(os.environ.get("WORLD_SIZE", 1))
    results = {}
    for name, (family, settings) in RUNS.items():
        trainer = make_trainer(
            "unused", make_pairs(48), model=undropped_model(family), num_train_epochs=1,
            per_device_train_batch_size=total_batch // expected,
            **({"ddp_backend": "gloo"} if expected > 1 else {}), **settings,
        )  # fmt: skip
        assert trainer.args.world_size == world_size() == expected
        trainer.train()
        # a mask that reached over ranks wrongly, or a gradient off by a factor, moves these
        results[name] = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        results[name]["loss"] = torch.tensor(trainer.state.log_history[0]["loss"])
    rows = ["a red dog", "a cat", "the blue bird flies", "one house", "grass"]
    results["encode"] = RowShardedEncoder(trainer.model).encode(rows, processor=trainer.processing_class)
    if trainer.is_world_process_zero():
        torch.save(results, out)
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()
    os._exit(0)  # gloo's threads sometimes abort an interpreter that shuts down; what is tested is done and saved


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
