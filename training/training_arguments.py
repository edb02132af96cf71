"""What a recipe may say of training: its `training:` section as a dataclass, checked on construction.

The docstring is the only description of the fields: `train.py --help` prints it (see `training.recipe`).
"""

import math
import os
from dataclasses import dataclass

import torch
from transformers import TrainingArguments

from modeling_gcl.loss import DENOMINATORS
from modeling_gcl.modalities import CROSS_DIRECTIONS, parse_direction
from universal_gcl.training.arguments import one_of, positive

LOSSES = ("gcl", "cl", "alignclip")
# smallest values of the numbers whose wrong ones Trainer would take, or refuse without naming them
AT_LEAST = {
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "warmup_steps": 0,
    "weight_decay": 0,
    "max_grad_norm": 0,
    "separation_weight": 0,
    "seed": 0,
    "eval_seed": 0,
}


@dataclass
class GCLTrainingArguments(TrainingArguments):
    """`transformers.TrainingArguments` with the loss, and with defaults that suit contrastive training.

    Only the fields that are new or have another default are listed.

    Args:
        > Loss

        loss (`str`, *optional*, defaults to `"gcl"`):
            `"gcl"` (arXiv 2509.25638), `"cl"` (symmetric image-text InfoNCE) or `"alignclip"` (CL with intra-modality
            separation, arXiv 2406.17639).
        denominator (`str`, *optional*, defaults to `"all"`):
            GCL's negatives: `"all"` embeddings of the batch (the paper), `"without_other_positive"` (all but the pair's
            own embedding in the third modality) or `"target"` (the target's modality only).
        intra_modality (`bool`, *optional*, defaults to `True`):
            Whether GCL's denominator holds the anchor's own modality.
        direction_weights (`dict[str, float]`, *optional*):
            Weights of GCL's six terms: `i→t`, `t→i`, `i→it`, `it→i`, `t→it`, `it→t` (anchor→target; `i->t` is
            accepted too). A direction that is not named has weight 1, so null means equal weights (the paper).
        mask_equal_ids (`bool`, *optional*, defaults to `True`):
            Leave items with the anchor's pair id out of its negatives.
        mask_equal_captions (`bool`, *optional*, defaults to `True`):
            Leave items with the anchor's caption (case and spacing aside) out of its negatives.
        separation_weight (`float`, *optional*, defaults to 0.5):
            Weight of the intra-modality separation of `"alignclip"`.
        matryoshka_dims (`list[int]`, *optional*):
            Train embeddings to be of use when cut to their first 256, 128, ... dimensions too (arXiv 2205.13147): the
            loss is the mean over these cuts. In any order; the whole dimension takes part also if it is not named.
        matryoshka_weights (`list[float]`, *optional*):
            Weights of the cuts in that mean, one for each of `matryoshka_dims`. null: equal weights. A whole dimension
            that is not named weighs 1.

        > Batch

        grad_cache_chunk (`int`, *optional*):
            Embed this many pairs at once and compute the loss on all (GradCache): memory no longer bounds the batch,
            the gradient stays that of the whole batch, at about 1.3 times the time. The `gradient_accumulation_steps`
            micro-batches of an optimiser step are then one contrastive batch. null: off; accumulation then averages
            the losses of the micro-batches, each with its own negatives only.
        effective_batch_size (`int`, *optional*):
            Pairs in one optimiser step over all processes, a multiple of `per_device_train_batch_size` x processes.
            All are one contrastive batch: `gradient_accumulation_steps` follows from it (and must be left out) and
            `grad_cache_chunk`, if not given, from the memory at hand. Chunks are at most
            `per_device_train_batch_size` pairs.
        half_ring (`bool`, *optional*, defaults to `False`):
            Of several processes: pass embeddings from neighbour to neighbour instead of gathering all on each, when
            the embeddings of the whole batch (6 kB a pair for 512 dimensions) don't fit.

        > Evaluation of pairs

        eval_seed (`int`, *optional*, defaults to 0):
            Seed of the mixed-modality search: which modality stands for each candidate. Apart from `seed`, so that
            runs with different seeds are measured on the same pool.

        > Resuming

        resume_from_checkpoint (`bool` or `str`, *optional*):
            `true` (or the bare option) goes on from the last checkpoint in `output_dir`; a path goes on from that one.

        > Defaults changed from TrainingArguments

        per_device_train_batch_size (`int`, *optional*, defaults to 64):
            Pairs per device and micro-batch. The loss sees the negatives of all devices; gradient accumulation adds
            none without `grad_cache_chunk` or `effective_batch_size`.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1):
            Micro-batches of an optimiser step. With `grad_cache_chunk` they are one contrastive batch; without it their
            losses are averaged, and none sees the others' negatives.
        ddp_find_unused_parameters (`bool`, *optional*, defaults to `False`):
            Whether DistributedDataParallel looks in each step for parameters without a gradient; only backbones with
            trained parameters that no embedding depends on need it.
        per_device_eval_batch_size (`int`, *optional*, defaults to 64):
            Rows embedded at once in evaluation.
        num_train_epochs (`float`, *optional*, defaults to 1.0):
            Number of epochs; one caption per image is drawn in each.
        learning_rate (`float`, *optional*, defaults to 1e-5):
            Peak learning rate. Pretrained CLIP models lose retrieval quality with more.
        lr_scheduler_type (`str`, *optional*, defaults to `"cosine"`):
            Schedule of the learning rate.
        warmup_steps (`float`, *optional*, defaults to 0.05):
            Steps of linear warm-up; below 1 a share of all steps.
        weight_decay (`float`, *optional*, defaults to 0.05):
            AdamW's weight decay, not applied to biases and norms.
        logging_steps (`float`, *optional*, defaults to 10):
            Steps between two log entries.
        logging_first_step (`bool`, *optional*, defaults to `True`):
            Log the first step too, so that every run has a curve.
        logging_nan_inf_filter (`bool`, *optional*, defaults to `False`):
            Off, so that a NaN loss is seen and stops the run.
        report_to (`str` or `list[str]`, *optional*, defaults to `"none"`):
            `"trackio"`, `"tensorboard"`, ... or `"none"`.
        save_strategy (`str`, *optional*, defaults to `"epoch"`):
            When checkpoints to resume from are written.
        save_total_limit (`int`, *optional*, defaults to 2):
            How many of them are kept.
        dataloader_num_workers (`int`, *optional*):
            Processes per device that decode, augment and tokenise; the items are the same whatever their number. By
            default one less than the cores that each training process has, at least 1, and at most 8 (2 without a GPU,
            where the model needs the cores). 0 does the work in the training process.
        dataloader_persistent_workers (`bool`, *optional*, defaults to `True`):
            Keep the workers from epoch to epoch.
        dataloader_pin_memory (`bool`, *optional*, defaults to `True`):
            Copy batches to the GPU from pinned memory while it computes. Without a GPU it is off.
        dataloader_drop_last (`bool`, *optional*, defaults to `True`):
            The last batch of an epoch is dropped when it is not full: all ranks must hold equally many pairs.
        eval_on_start (`bool`, *optional*, defaults to `True`):
            Evaluate `data.eval` before training too, for the before/after table.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must stay `False`: the collator needs the raw image and caption.
        push_to_hub (`str`, *optional*):
            `"org/name"`: the finished folder, with card, results and pictures, is pushed there in one commit, with
            `hub_token`, to the branch `hub_revision`; a repository that is made is private with `hub_private_repo`.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    loss: str = "gcl"
    denominator: str = "all"
    intra_modality: bool = True
    direction_weights: dict[str, float] | None = None
    mask_equal_ids: bool = True
    mask_equal_captions: bool = True
    separation_weight: float = 0.5
    matryoshka_dims: list[int] | None = None
    matryoshka_weights: list[float] | None = None
    grad_cache_chunk: int | None = None
    effective_batch_size: int | None = None
    half_ring: bool = False
    eval_seed: int = 0
    resume_from_checkpoint: bool | str | None = None
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
    dataloader_num_workers: int | None = None
    dataloader_persistent_workers: bool = True
    dataloader_pin_memory: bool = True
    dataloader_drop_last: bool = True
    eval_on_start: bool = True
    remove_unused_columns: bool = False
    push_to_hub: str | None = None

    def __post_init__(self):
        one_of("training.loss", self.loss, LOSSES)
        one_of("training.denominator", self.denominator, DENOMINATORS)
        self._check_direction_weights()
        self._check_matryoshka()
        if self.dataloader_num_workers is None:
            self.dataloader_num_workers = default_num_workers(self.use_cpu)
        self._check_numbers()
        only_gcl = {"denominator": "all", "intra_modality": True, "direction_weights": None}
        for name, unused in ({} if self.loss == "gcl" else only_gcl).items():
            if getattr(self, name) != unused:
                raise ValueError(f"training.{name} belongs to loss: gcl and has no effect with loss: {self.loss}")
        if self.loss != "alignclip" and self.separation_weight != type(self).separation_weight:
            raise ValueError(
                f"training.separation_weight belongs to loss: alignclip and has no effect with loss: {self.loss}"
            )
        if self.remove_unused_columns:
            raise ValueError("training.remove_unused_columns must be false: the collator needs the raw columns")
        self._check_batch()
        super().__post_init__()
        # pinned memory serves copies to an accelerator; without one torch warns in every worker
        self.dataloader_pin_memory = self.dataloader_pin_memory and self.device.type != "cpu"
        self.accelerator_config.non_blocking = self.dataloader_pin_memory
        self.dataloader_persistent_workers = self.dataloader_persistent_workers and self.dataloader_num_workers > 0

    def _check_numbers(self):
        for name, smallest in AT_LEAST.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= smallest):
                raise ValueError(f"training.{name} is {value}: use a number of at least {smallest}")
        for name in ("learning_rate", "num_train_epochs"):
            positive(f"training.{name}", getattr(self, name))
        if self.max_steps != -1 and self.max_steps < 1:
            raise ValueError(
                f"training.max_steps is {self.max_steps}: use 1 or more, or -1 for as many as num_train_epochs makes"
            )

    def _check_batch(self):
        for name in ("grad_cache_chunk", "effective_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"training.{name} is {value}: use 1 or more, or leave it out")
        if self.effective_batch_size is not None and self.gradient_accumulation_steps != 1:
            raise ValueError(
                f"training.gradient_accumulation_steps ({self.gradient_accumulation_steps}) follows from "
                f"training.effective_batch_size ({self.effective_batch_size}): leave one of them out"
            )
        if self.optim in ("lomo", "adalomo"):
            raise ValueError(
                f"training.optim {self.optim} changes weights during backward, with the gradient of each chunk alone: "
                "use adamw_torch or another"
            )
        cached = self.grad_cache_chunk is not None or self.effective_batch_size is not None
        if cached and self.ddp_broadcast_buffers is None:
            # a process that goes back after a shortage of memory would broadcast alone; no buffer changes in training
            # but batch norm's statistics, of which those of rank 0 count with or without it
            self.ddp_broadcast_buffers = False

    def _check_direction_weights(self):
        if self.direction_weights is None:
            return
        self.direction_weights = {parse_direction(name): weight for name, weight in self.direction_weights.items()}
        for direction, weight in self.direction_weights.items():
            one_of("training.direction_weights", direction, CROSS_DIRECTIONS)
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"training.direction_weights[{direction}] is {weight}: use a number of at least 0")
        if all(self.direction_weights.get(direction, 1.0) == 0 for direction in CROSS_DIRECTIONS):
            raise ValueError("training.direction_weights are all 0: there would be nothing to train")

    def _check_matryoshka(self):
        dims, weights = self.matryoshka_dims, self.matryoshka_weights
        if dims is None:
            if weights is not None:
                raise ValueError("training.matryoshka_weights has no effect without training.matryoshka_dims")
            return
        if not dims or min(dims) < 1 or len(set(dims)) < len(dims):
            raise ValueError(f"training.matryoshka_dims is {dims}: name each dimension once, 1 at least")
        if weights is not None and len(weights) != len(dims):
            raise ValueError(f"training.matryoshka_weights is {weights}: give one weight for each of {dims}")
        for weight in weights or ():
            positive("training.matryoshka_weights", weight)


def default_num_workers(use_cpu: bool) -> int:
    """As many data workers as this machine's cores allow each training process: see `GCLTrainingArguments`."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # as the launchers set it
    most = 8 if torch.cuda.is_available() and not use_cpu else 2
    return max(1, min(most, cores // processes - 1))
