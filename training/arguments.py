"""What a recipe may say: the `model:`, `data:` and `training:` sections as dataclasses, checked on construction.

The docstrings are the only description of the fields: `train.py --help` prints them (see `training.recipe`).
"""

import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from modeling_gcl.configuration_gcl import FUSIONS, TEXT_POOLINGS
from modeling_gcl.loss_gcl import DENOMINATORS, DIRECTIONS

FREEZABLE = ("image", "text", "image_tower", "text_tower", "logit_scale")
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
class ModelArguments:
    """What to train, and which parts of it.

    Args:
        > Model

        encoder (`str`):
            Hub id or folder of a dual encoder of transformers (CLIP, SigLIP, VisionTextDualEncoder, ...) or of a GCL
            checkpoint.
        revision (`str`, *optional*):
            Branch, tag or commit of `encoder` on the Hub. Pin a commit to make a run repeatable.
        fusion (`str`, *optional*):
            How image and text features make fused ones: `"sum"` of the raw features (the paper's) or
            `"normalized_sum"`. By default what the checkpoint's config says.
        text_pooling (`str`, *optional*):
            `"encoder"` keeps the text tower's own pooling, `"mean"` averages its token states. By default what the
            checkpoint's config says.
        freeze (`list[str]`, *optional*, defaults to `[]`):
            Parts that are not trained: `image` or `text` (the tower and its projection: that modality's embeddings
            stay exactly as they were), `image_tower` or `text_tower` (the tower alone, its projection is trained),
            `logit_scale`.
        logit_scale_init (`float`, *optional*):
            The value of 1/temperature that training starts from, e.g. 50 for a temperature of 0.02. By default the
            checkpoint's.
        max_logit_scale (`float`, *optional*):
            A trained 1/temperature is clamped to this value. By default the checkpoint's own, which is 100 for a dual
            encoder that is not a GCL checkpoint yet.
        licence (`str`, *optional*, defaults to `"other"`):
            Licence of the trained weights for the model card, as the Hub spells it: `apache-2.0`, `cc-by-sa-4.0`, ...

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    encoder: str
    revision: str | None = None
    fusion: str | None = None
    text_pooling: str | None = None
    freeze: list[str] = field(default_factory=list)
    logit_scale_init: float | None = None
    max_logit_scale: float | None = None
    licence: str = "other"

    def __post_init__(self):
        if not self.encoder:
            raise ValueError("model.encoder is empty: give a Hub id or a folder")
        if self.fusion is not None:
            _one_of("model.fusion", self.fusion, FUSIONS)
        if self.text_pooling is not None:
            _one_of("model.text_pooling", self.text_pooling, TEXT_POOLINGS)
        for part in self.freeze:
            _one_of("model.freeze", part, FREEZABLE)
        if self.max_logit_scale is not None:
            _positive("model.max_logit_scale", self.max_logit_scale)
        if self.logit_scale_init is not None:
            _positive("model.logit_scale_init", self.logit_scale_init)
            if self.max_logit_scale is not None and self.logit_scale_init > self.max_logit_scale:
                raise ValueError(
                    f"model.logit_scale_init is {self.logit_scale_init}, over model.max_logit_scale "
                    f"({self.max_logit_scale}): it is 1/temperature, e.g. 50 for a temperature of 0.02"
                )


@dataclass
class SourceArguments:
    """One source of pairs (image, captions).

    Args:
        > Source (each entry of data.train, and data.eval)

        path (`str`):
            A folder of images (with `metadata.csv`, `metadata.jsonl` or one `.txt` beside each image), a `.parquet`,
            `.jsonl`, `.csv` or `.json` (LLaVA-Pretrain) file, or the id of a data set on the Hub. Relative paths
            start from the working directory.
        name (`str`, *optional*):
            Configuration of a Hub data set.
        revision (`str`, *optional*):
            Branch, tag or commit of a Hub data set. Pin a commit to make a run repeatable.
        split (`str`, *optional*, defaults to `"train"`):
            Split of a Hub data set. A local file or folder is one split.
        image_root (`str`, *optional*):
            Folder that image paths are relative to. By default the folder of the captions file.
        image_column (`str`, *optional*):
            Column of the images or their paths. By default the first known name (image, file_name, image_path, ...).
        caption_column (`str`, *optional*):
            Column of the caption (string) or captions (list of strings). By default the first known name (captions,
            caption, text, ...).
        id_column (`str`, *optional*):
            Column of unique pair ids. By default `id` where there is one, else the image path or the row number.
        weight (`float`, *optional*):
            Share of this source in training, relative to the other sources' weights.
        limit (`int`, *optional*):
            Only the first `limit` pairs are used.
        licence (`str`, *optional*):
            Licence of the data, for the model card.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    path: str
    name: str | None = None
    revision: str | None = None
    split: str = "train"
    image_root: str | None = None
    image_column: str | None = None
    caption_column: str | None = None
    id_column: str | None = None
    weight: float | None = None
    limit: int | None = None
    licence: str | None = None

    def __post_init__(self):
        if not self.path:
            raise ValueError("path of a data source is empty: give a folder, a file or a Hub data set id")
        if self.weight is not None:
            _positive(f"weight of {self.path}", self.weight)
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit of {self.path} is {self.limit}: use 1 or more, or leave it out for all pairs")


@dataclass
class DataArguments:
    """Where pairs come from and what is done to them.

    Args:
        > Data

        train (`list[SourceArguments]`):
            The sources to train on; a single source or a bare path is accepted too. Several are concatenated, unless
            `weight` or `mixing_alpha` says how to mix them.
        eval (`SourceArguments`, *optional*):
            The source for the nine-way evaluation during and after training.
        mixing_alpha (`float`, *optional*):
            Draw a source of n pairs with probability proportional to n^alpha: 1 keeps the proportions, 0 makes all
            sources equal. Weights of the sources win over it.
        max_broken_share (`float`, *optional*, defaults to 0.01):
            Images that are missing or unreadable are skipped, counted and reported up to this share; more of them stop
            the run with an error. Files that are missing (or lack their `.txt`) count when a source is loaded, as a
            share of that source's pairs. Images that can't be decoded show in training and count, each once, as a share
            of the training pairs of all sources together.
        crop_scale (`list[float]`, *optional*, defaults to `[0.9, 1.0]`):
            Train on a random crop with this share of the image's area, at most 4/3 times wider or higher in shape than
            the image. `null` turns it off.
        horizontal_flip (`bool`, *optional*, defaults to `False`):
            Mirror half of the training images. Off by default, since captions say "left" and "right".
        max_text_length (`int`, *optional*):
            Captions are cut to this number of tokens. It is stored in the processor that is saved with the model, so
            that training and `encode` cut alike. By default the limit of the encoder's own processor or tokenizer.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    train: list[SourceArguments]
    eval: SourceArguments | None = None
    mixing_alpha: float | None = None
    max_broken_share: float = 0.01
    crop_scale: list[float] | None = field(default_factory=lambda: [0.9, 1.0])
    horizontal_flip: bool = False
    max_text_length: int | None = None

    def __post_init__(self):
        if not self.train:
            raise ValueError("data.train is empty: give at least one source of pairs")
        weighted = [source.weight is not None for source in self.train]
        if any(weighted) and not all(weighted):
            missing = ", ".join(source.path for source in self.train if source.weight is None)
            raise ValueError(
                f"data.train: some sources have a weight, but not {missing}: give all of them one, or none"
            )
        if self.mixing_alpha is not None and not 0 <= self.mixing_alpha <= 1:
            raise ValueError(f"data.mixing_alpha is {self.mixing_alpha}: use a number from 0 (equal) to 1 (by size)")
        if not 0 <= self.max_broken_share <= 1:
            raise ValueError(f"data.max_broken_share is {self.max_broken_share}: it is a share from 0 to 1")
        if self.crop_scale is not None and (
            len(self.crop_scale) != 2 or not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1
        ):
            raise ValueError(
                f"data.crop_scale is {self.crop_scale}: use [smallest, largest] share of the area, "
                "e.g. [0.9, 1.0], or null for no crop"
            )
        if self.max_text_length is not None and self.max_text_length < 3:
            raise ValueError(f"data.max_text_length is {self.max_text_length}: use at least 3 tokens")


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
            Weights of GCL's six terms by `anchor->target`: `i->t`, `t->i`, `i->it`, `it->i`, `t->it`, `it->t`. A
            direction that is not named has weight 1, so null means equal weights (the paper).
        mask_equal_ids (`bool`, *optional*, defaults to `True`):
            Leave items with the anchor's pair id out of its negatives.
        mask_equal_captions (`bool`, *optional*, defaults to `True`):
            Leave items with the anchor's caption (case and spacing aside) out of its negatives.
        separation_weight (`float`, *optional*, defaults to 0.5):
            Weight of the intra-modality separation of `"alignclip"`.

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
            the embeddings of the whole batch (36 kB a pair for 512 dimensions, gradients included) don't fit.

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
        dataloader_num_workers (`int`, *optional*, defaults to 2):
            Processes per device that decode, augment and tokenise.
        dataloader_drop_last (`bool`, *optional*, defaults to `True`):
            The last batch of an epoch is dropped when it is not full: all ranks must hold equally many pairs.
        eval_on_start (`bool`, *optional*, defaults to `True`):
            Evaluate `data.eval` before training too, for the before/after table.
        remove_unused_columns (`bool`, *optional*, defaults to `False`):
            Must stay `False`: the collator needs the raw image and caption.

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
    grad_cache_chunk: int | None = None
    effective_batch_size: int | None = None
    half_ring: bool = False
    eval_seed: int = 0
    resume_from_checkpoint: bool | str | None = None
    per_device_train_batch_size: int = 64
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
    dataloader_num_workers: int = 2
    dataloader_drop_last: bool = True
    eval_on_start: bool = True
    remove_unused_columns: bool = False

    def __post_init__(self):
        _one_of("training.loss", self.loss, LOSSES)
        _one_of("training.denominator", self.denominator, DENOMINATORS)
        self._check_direction_weights()
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

    def _check_numbers(self):
        for name, smallest in AT_LEAST.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= smallest):
                raise ValueError(f"training.{name} is {value}: use a number of at least {smallest}")
        for name in ("learning_rate", "num_train_epochs"):
            _positive(f"training.{name}", getattr(self, name))
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
        for direction, weight in self.direction_weights.items():
            _one_of("training.direction_weights", direction, DIRECTIONS)
            if not math.isfinite(weight) or weight < 0:
                raise ValueError(f"training.direction_weights[{direction}] is {weight}: use a number of at least 0")
        if all(self.direction_weights.get(direction, 1.0) == 0 for direction in DIRECTIONS):
            raise ValueError("training.direction_weights are all 0: there would be nothing to train")


def _one_of(name: str, value: object, allowed: tuple[str, ...]):
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")


def _positive(name: str, value: float):
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} is {value}: use a number over 0")
