"""The `training:` section of a recipe as a dataclass that checks its values when it is made.

The docstrings of `GCLTrainingArguments` and of the losses are the only descriptions of the fields: `gcl train --help`
prints them (see `training.recipe_help`).
"""

import dataclasses
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainingArguments

from universal_gcl.training.arguments import one_of, positive
from universal_gcl.training.losses import LOSSES, Loss, LossSettings

# The smallest values allowed. Trainer would accept smaller ones, or refuse them without naming the field.
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "seed": 0,
    "eval_seed": 0,
}


@dataclass
class GCLTrainingArguments(LossSettings, TrainingArguments):
    """`transformers.TrainingArguments` with the loss, and with defaults that suit contrastive training.

    Only new fields and fields with another default are listed. `loss` and the settings of each loss are inherited from
    `training.losses.LossSettings`.

    Args:
        > Negatives and dimensions

        mask_equal_ids (`bool`, *optional*, defaults to `True`):
            Don't use items with the anchor's pair id as negatives.
        mask_equal_captions (`bool`, *optional*, defaults to `True`):
            Don't use items with the anchor's caption as negatives. Case and spacing are ignored.
        matryoshka_dims (`list[int]`, *optional*):
            Train embeddings that stay useful when they are cut to their first 256, 128, ... dimensions (arXiv
            2205.13147). The loss is the mean over these cuts. The order doesn't matter, and the full dimension is
            always one of the cuts.
        matryoshka_weights (`list[float]`, *optional*):
            Weights of the cuts in that mean, one for each of `matryoshka_dims`. null: equal weights. The full
            dimension has weight 1 if it isn't named.

        > Batch

        grad_cache_chunk (`int`, *optional*):
            Embed this many pairs at a time, and compute the loss on the whole batch (GradCache). Memory then no longer
            limits the batch size, and the gradient is still that of the whole batch; a step takes about 1.3 times as
            long. The `gradient_accumulation_steps` micro-batches of an optimiser step become one contrastive batch.
            null: off. Accumulation then averages the losses of the micro-batches, and each micro-batch has only its own
            negatives.
        effective_batch_size (`int`, *optional*):
            Pairs in one optimiser step over all processes: a multiple of `per_device_train_batch_size` x processes.
            They are one contrastive batch. `gradient_accumulation_steps` is computed from it and must be left out.
            `grad_cache_chunk`, if it isn't given, is chosen from the available memory. A chunk has at most
            `per_device_train_batch_size` pairs.
        half_ring (`bool`, *optional*, defaults to `False`):
            With several processes, pass embeddings from neighbour to neighbour instead of gathering all of them on each
            process. For batches whose embeddings don't fit in memory (6 kB a pair for 512 dimensions).

        > Evaluation of pairs

        eval_seed (`int`, *optional*, defaults to 0):
            Seed of the mixed-modality search, which draws the modality of each candidate. It is separate from `seed`,
            so that runs with different seeds are evaluated on the same pool.

        > Output

        output_dir (`str`, *optional*):
            Folder of the run, by default `trainer_output`. It gets the finished model (`model/`), checkpoints and
            pictures. A second run with the same folder replaces the model.

        > Resuming

        resume_from_checkpoint (`bool` or `str`, *optional*):
            `true` (or the option without a value) resumes from the last checkpoint in `output_dir`; a path resumes from
            that checkpoint.

        > Defaults changed from TrainingArguments

        per_device_train_batch_size (`int`, *optional*, defaults to 64):
            Pairs per device and micro-batch. The loss uses negatives from all devices. Gradient accumulation adds
            negatives only with `grad_cache_chunk` or `effective_batch_size`.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1):
            Micro-batches of an optimiser step. With `grad_cache_chunk` they are one contrastive batch. Without it their
            losses are averaged, and none uses the negatives of the others.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Whether DistributedDataParallel looks for parameters without a gradient in each step. Only needed for
            backbones with trained parameters that no embedding depends on.
        per_device_eval_batch_size (`int`, *optional*, defaults to 64):
            Rows embedded at a time in evaluation.
        num_train_epochs (`float`, *optional*, defaults to 1.0):
            Number of epochs. Each epoch draws one caption per image.
        learning_rate (`float`, *optional*, defaults to 1e-5):
            Peak learning rate. Pretrained CLIP models lose retrieval quality with higher rates.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            Schedule of the learning rate.
        warmup_steps (`float`, *optional*, defaults to 0.05):
            Steps of linear warm-up. A value below 1 is a share of all steps.
        weight_decay (`float`, *optional*, defaults to 0.05):
            AdamW's weight decay. It isn't applied to biases, norms and the temperature.
        logging_steps (`float`, *optional*, defaults to 10):
            Steps between two log entries.
        logging_first_step (`bool`, *optional*, defaults to `True`):
            Log the first step too, so that every run has a curve.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            Off, so that a NaN loss is logged and stops the run.
        report_to (`str` or `list[str]`, *optional*, defaults to `"none"`):
            `"trackio"`, `"tensorboard"`, ... or `"none"`.
        save_strategy (`str`, *optional*, defaults to `"epoch"`):
            When checkpoints to resume from are written.
        save_total_limit (`int`, *optional*, defaults to 2):
            How many checkpoints are kept.
        dataloader_num_workers (`int`, *optional*):
            Worker processes per device that decode, augment and tokenise. Their number doesn't change the data. By
            default one less than the cores that each training process has, at least 1, and at most 8 (at most 2 without
            a GPU, because the model needs the cores). With 0 the training process does this work.
        dataloader_persistent_workers (`bool`, *optional*, defaults to `True`):
            Keep the workers from epoch to epoch.
        dataloader_pin_memory (`bool`, *optional*, defaults to `True`):
            Copy batches to the GPU from pinned memory while it computes. Off without a GPU.
        dataloader_drop_last (`bool`, *optional*, defaults to `True`):
            Drop the last batch of an epoch if it isn't full: all ranks must have the same number of pairs.
        eval_on_start (`bool`, *optional*, defaults to `True`):
            Evaluate `data.eval` before training too, for the table of results before and after.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must stay `False`: the collator needs the raw image and caption.
        push_to_hub (`str`, *optional*):
            `"org/name"`: push the finished folder, with card, results and pictures, to this repository in one commit.
            `hub_token` is the token and `hub_revision` the branch; `hub_private_repo` makes a new repository private.

    Raises:
        ValueError: a value is not allowed. The message names the field, the value and what is allowed.
    """

    mask_equal_ids: bool = True
    mask_equal_captions: bool = True
    matryoshka_dims: list[int] | None = None
    matryoshka_weights: list[float] | None = None
    grad_cache_chunk: int | None = None
    effective_batch_size: int | None = None
    half_ring: bool = False
    eval_seed: int = 0
    output_dir: str | None = None
    resume_from_checkpoint: bool | str | None = None  # type: ignore[assignment]  # true is the last one
    per_device_train_batch_size: int = 64
    gradient_accumulation_steps: int = 1
    ddp_find_unused_parameters: bool | None = False
    per_device_eval_batch_size: int = 64
    num_train_epochs: float = 1.0
    learning_rate: float = 1e-5
    lr_scheduler_type: str = "cosine"
    warmup_steps: float = 0.05
    weight_decay: float = 0.05
    logging_steps: float = 10
    logging_first_step: bool = True
    logging_nan_inf_filter: bool = False
    report_to: None | str | list[str] = "none"
    save_strategy: str = "epoch"
    save_total_limit: int | None = 2
    dataloader_num_workers: int | None = None  # type: ignore[assignment]  # None until it is chosen
    dataloader_persistent_workers: bool = True
    dataloader_pin_memory: bool = True
    dataloader_drop_last: bool = True
    eval_on_start: bool = True
    remove_unused_columns: bool = False
    push_to_hub: str | None = None  # type: ignore[assignment]  # ours names the repository

    def __post_init__(self) -> None:
        one_of("training.loss", self.loss, tuple(LOSSES))
        loss = self.make_loss()
        for entry in dataclasses.fields(loss):  # the loss may have normalised its settings
            setattr(self, entry.name, getattr(loss, entry.name))
        self._check_settings_of_other_losses()
        self._check_matryoshka()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers(self.use_cpu)
        self._check_numbers()
        if self.remove_unused_columns:
            raise ValueError("training.remove_unused_columns must be false: the collator needs the raw columns")
        self._check_batch()
        super().__post_init__()
        # pinned memory serves copies to an accelerator; without one, torch warns in every worker
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        accelerator: Any = self.accelerator_config
        accelerator.non_blocking = self.dataloader_pin_memory
        self.dataloader_persistent_workers = self.dataloader_persistent_workers and self.dataloader_num_workers > 0

    def make_loss(self) -> Loss:
        """The loss that `loss` names, with its settings.

        Raises:
            ValueError: a setting has a value that the loss doesn't allow.
        """
        kind = LOSSES[self.loss]
        try:
            return kind(**{entry.name: getattr(self, entry.name) for entry in dataclasses.fields(kind)})
        except ValueError as error:
            raise ValueError(f"training.{error}") from error

    def _check_settings_of_other_losses(self) -> None:
        own = {entry.name for entry in dataclasses.fields(LOSSES[self.loss])}
        for name, kind in LOSSES.items():
            for entry in dataclasses.fields(kind):
                if entry.name not in own and getattr(self, entry.name) != entry.default:
                    raise ValueError(
                        f"training.{entry.name} belongs to loss: {name} and has no effect with loss: {self.loss}"
                    )

    def _check_numbers(self) -> None:
        for name, smallest in AT_LEAST.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= smallest):
                raise ValueError(f"training.{name} is {value}: use a number of at least {smallest}")
        for name in ("learning_rate", "num_train_epochs"):
            positive(f"training.{name}", getattr(self, name))
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(
                f"training.max_steps is {self.max_steps}: use 1 or more, or -1 to train for num_train_epochs"
            )

    def _check_batch(self) -> None:
        for name in ("grad_cache_chunk", "effective_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"training.{name} is {value}: use 1 or more, or leave it out")
        if self.effective_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"training.gradient_accumulation_steps ({self.gradient_accumulation_steps}) is computed from "
                f"training.effective_batch_size ({self.effective_batch_size}): leave one of them out"
            )
        if self.optim in ("lomo", "adalomo"):
            raise ValueError(
                f"training.optim {self.optim} changes weights during backward, with the gradient of a single chunk: "
                "use adamw_torch or another"
            )
        cached = self.grad_cache_chunk is not None or self.effective_batch_size is not None
        if cached and self.ddp_broadcast_buffers is None:
            # A process that repeats a step after it ran out of memory would broadcast alone. The only buffers that
            # change in training are batch norm statistics, and rank 0's are the ones that are saved either way.
            self.ddp_broadcast_buffers = False

    def _check_matryoshka(self) -> None:
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None:
            if weights is not None:
                raise ValueError("training.matryoshka_weights has no effect without training.matryoshka_dims")
            return
        if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
            raise ValueError(f"training.matryoshka_dims is {dims}: name each dimension once, each at least 1")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"training.matryoshka_weights is {weights}: give one weight for each of {dims}")
        for weight in weights or ():
            positive("training.matryoshka_weights", weight)


def default_num_workers(use_cpu: bool) -> int:
    """The number of data workers for each training process on this machine: see `GCLTrainingArguments`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by the launchers
    most = 8 if torch.cuda.is_available() and not use_cpu else 2
    return max(1, min(most, cores // processes - 1))
