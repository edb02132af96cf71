"""What a recipe may say of model, data and LoRA: its `model:`, `data:` and `peft:` sections as dataclasses, checked on
construction.

The docstrings are the only description of the fields: `train.py --help` prints them (see `training.recipe`).
"""

import re
from dataclasses import dataclass, field

from modeling_gcl.configuration_gcl import FUSIONS, TEXT_POOLINGS
from universal_gcl.sources.arguments import SourceArguments, positive

FREEZABLE = ("image", "text", "image_tower", "text_tower", "fusion", "logit_scale")


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
            How image and text features make fused ones: `"sum"` of the raw features (the paper's),
            `"normalized_sum"`, the same two with learned gates that begin at 1 (`"gated_sum"`,
            `"gated_normalized_sum"`), or `"native"` for a backbone that fuses by itself (VISTA). By default what the
            GCL checkpoint's config says; for a dual encoder the one of the two sums that suits the measured lengths of
            its towers' features.
        text_pooling (`str`, *optional*):
            `"encoder"` keeps the text tower's own pooling, `"mean"` averages its token states. By default what the
            checkpoint's config says.
        freeze (`list[str]`, *optional*, defaults to `[]`):
            Parts that are not trained: `image` or `text` (the tower and its projection: that modality's embeddings
            stay exactly as they were), `image_tower` or `text_tower` (the tower alone, its projection is trained),
            `fusion` (the gates), `logit_scale`. `[image, text]` with a gated fusion trains the gates alone. VISTA's
            images and fused rows pass through its text tower: frozen, it still carries their gradient.
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
            one_of("model.fusion", self.fusion, FUSIONS)
        if self.text_pooling is not None:
            one_of("model.text_pooling", self.text_pooling, TEXT_POOLINGS)
        for part in self.freeze:
            one_of("model.freeze", part, FREEZABLE)
        if self.max_logit_scale is not None:
            positive("model.max_logit_scale", self.max_logit_scale)
        if self.logit_scale_init is not None:
            positive("model.logit_scale_init", self.logit_scale_init)
            if self.max_logit_scale is not None and self.logit_scale_init > self.max_logit_scale:
                raise ValueError(
                    f"model.logit_scale_init is {self.logit_scale_init}, over model.max_logit_scale "
                    f"({self.max_logit_scale}): it is 1/temperature, e.g. 50 for a temperature of 0.02"
                )


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
        languages (`list[str]`, *optional*, defaults to `[]`):
            Languages of the captions for the model card, ISO 639 codes: `[en]`.

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
    languages: list[str] = field(default_factory=list)

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
class LoraArguments:
    """Train low-rank adapters (LoRA, arXiv 2106.09685) in place of the weights. A recipe with a `peft:` section, empty
    or not, does.

    Args:
        > LoRA

        r (`int`, *optional*, defaults to 16):
            Rank of the adapters.
        lora_alpha (`float`, *optional*, defaults to 32):
            Their output is scaled by `lora_alpha / r`, with `use_rslora` by `lora_alpha / sqrt(r)`.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout before the adapters, in training.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Rank-stabilised scaling (arXiv 2312.03732), for high ranks.
        use_dora (`bool`, *optional*, defaults to `False`):
            Weight-decomposed adapters (DoRA, arXiv 2402.09353): a learned magnitude beside the direction; slower.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Hold the frozen weights in 4 bits, NF4, while training (QLoRA, arXiv 2305.14314), and compute in bfloat16.
            For one GPU; needs bitsandbytes. What is saved is the adapter, and the float32 base with it merged.
        image_targets, text_targets (`str`, *optional*):
            Regular expression for the layers of a tower and its projection that get an adapter, found anywhere in
            their names, as in `q_proj|v_proj` or `layers\\.(10|11)\\.`. Linear layers and convolutions can have one.
            By default all linear layers and the convolutions of 1 x 1. A frozen tower (`model.freeze`) gets none.
            Temperature and learned gates are trained whole, unless frozen.

    Raises:
        ValueError: naming the field, its value and what is allowed.
    """

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    load_in_4bit: bool = False
    image_targets: str | None = None
    text_targets: str | None = None

    def __post_init__(self):
        positive("peft.r", self.r)
        positive("peft.lora_alpha", self.lora_alpha)
        if not 0 <= self.lora_dropout < 1:
            raise ValueError(f"peft.lora_dropout is {self.lora_dropout}: use a number from 0 to below 1")
        for name in ("image_targets", "text_targets"):
            try:
                re.compile(getattr(self, name) or "")
            except re.error as error:
                raise ValueError(f"peft.{name}: {getattr(self, name)!r} is no regular expression: {error}") from error


def one_of(name: str, value: object, allowed: tuple[str, ...]):
    """Raise ValueError if `value` of the field `name` is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
