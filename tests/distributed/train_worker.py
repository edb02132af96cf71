"""Run under torchrun or plain python: train tiny models with every loss, save the weights of rank 0.

Arguments: output file, total batch size. Every process asserts the world size that the launcher promised.
"""

import os
import sys

import torch
from training_runs import make_pairs, make_trainer

from training.distributed import RowShardedEncoder, world_size

LOSSES = {
    "gcl": {"loss": "gcl"},
    "gcl_weighted": {"denominator": "without_other_positive", "direction_weights": {"i->t": 2.0, "t->it": 0.5}},
    "cl": {"loss": "cl"},
    "alignclip": {"loss": "alignclip"},
}


def main(out, total_batch):
    expected = int(os.environ.get("WORLD_SIZE", 1))
    results = {}
    for name, settings in LOSSES.items():
        trainer = make_trainer(
            "unused", make_pairs(48), per_device_train_batch_size=total_batch // expected, num_train_epochs=1,
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


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
