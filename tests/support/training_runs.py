"""Tiny trainings for the tests: pairs of coloured squares and their names, a random CLIP, plain SGD."""

import datasets
import numpy as np
import torch
from PIL import Image

from modeling_gcl import GCLModel
from tests.support.backbones import tiny_encoder, tiny_processor
from universal_gcl.training.data import PairCollator, PairDataset
from universal_gcl.training.trainer import GCLTrainer
from universal_gcl.training.training_arguments import GCLTrainingArguments

# the name that transformers knows, which 5.23 changed
CHECKPOINTING = "activation_checkpointing"
if CHECKPOINTING not in GCLTrainingArguments.__dataclass_fields__:
    CHECKPOINTING = "gradient_checkpointing"
WORDS = ("red", "blue", "green", "dog", "cat", "bird", "grass", "house")


def make_pairs(n, seed=0):
    rng = np.random.default_rng(seed)
    pairs = []
    for i in range(n):
        image = Image.fromarray(rng.integers(0, 256, (36, 36, 3), dtype=np.uint8))
        captions = [f"a {WORDS[i % 8]} {WORDS[(i // 8 + k) % 8]}" for k in range(4)]
        pairs.append({"id": f"pair {i}", "image": image, "captions": captions})
    return pairs


def make_trainer(
    output_dir, pairs=None, eval_pairs=None, model=None, max_broken_share=0.01, cls=GCLTrainer, own_loss=None,
    optimizers=(None, None), **arguments,
):  # fmt: skip
    defaults = {
        "output_dir": str(output_dir), "per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 0.1,
        "optim": "sgd", "lr_scheduler_type": "constant", "warmup_steps": 0, "max_grad_norm": 0, "logging_steps": 1,
        "save_strategy": "no", "dataloader_num_workers": 0, "weight_decay": 0.0, "use_cpu": True, "disable_tqdm": True,
    }  # fmt: skip
    training = GCLTrainingArguments(**(defaults | arguments))
    torch.manual_seed(training.seed)
    processor = tiny_processor("clip")
    return cls(
        model=model or GCLModel.from_encoder(tiny_encoder("clip"), logit_scale_init_value=10.0),
        args=training,
        train_dataset=PairDataset([pairs or make_pairs(48)], crop_scale=[0.8, 1.0], seed=training.seed),
        eval_dataset=eval_pairs,
        data_collator=PairCollator(processor),
        processing_class=processor,
        max_broken_share=max_broken_share,
        loss=own_loss,
        optimizers=optimizers,
    )


def write_parquet(path, n, seed=0):
    """`make_pairs` as a parquet file; returns its path."""
    pairs = make_pairs(n, seed)
    columns = {name: [pair[name] for pair in pairs] for name in ("id", "image", "captions")}
    features = datasets.Features(
        {"id": datasets.Value("string"), "image": datasets.Image(), "captions": datasets.List(datasets.Value("string"))}
    )
    datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
    return path
