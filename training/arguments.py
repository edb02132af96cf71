"""The `model:`, `data:` and `peft:` sections of a recipe as dataclasses that check their values.

The docstrings are the only description of the fields. `gcl train --help` prints them (see `training.recipe`).
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
            Hub id or folder of a GCL checkpoint, or of a dual encoder that transformers knows (CLIP, SigLIP,
            VisionTextDualEncoder, ...).
        revision (`str`, *optional*):
            Branch, tag or commit of `encoder` on the Hub. Pin a commit to make a run repeatable.
        fusion (`str`, *optional*):
            How the features of image and text are fused. `"sum"` adds the raw features, as in the paper.
            `"normalized_sum"` first scales them to length 1. `"gated_sum"` and `"gated_normalized_sum"` add learned
            gates, which start at 1. `"native"` is for a backbone that fuses by itself (VISTA). The default is the
            fusion of the GCL checkpoint; for other dual encoders, one of the two sums is chosen from the towers'
            feature norms.
        text_pooling (`str`, *optional*):
            `"encoder"` keeps the text tower's own pooling, `"mean"` averages its token states. The default is the
            checkpoint's.
        freeze (`list[str]`, *optional*, defaults to `[]`):
            Parts that are not trained. `image` or `text` freezes a tower and its projection, so that the embeddings of
            that modality stay exactly as they were. `image_tower` or `text_tower` freezes only the tower. `fusion`
            freezes the gates, `logit_scale` the temperature. `[image, text]` with a gated fusion trains only the gates.
            In VISTA, images and fused rows pass through the text tower; if it is frozen, their gradient still flows
            through it.
        logit_scale_init (`float`, *optional*):
            The value of 1/temperature that training starts from, e.g. 50 for a temperature of 0.02. The default is
            the checkpoint's.
        max_logit_scale (`float`, *optional*):
            The largest value that 1/temperature may reach in training. The default is the checkpoint's, which is 100
            for a dual encoder that is not a GCL checkpoint yet.
        licence (`str`, *optional*, defaults to `"other"`):
            Licence of the trained weights, for the model card. Use the Hub's spelling: `apache-2.0`, `cc-by-sa-4.0`.

    Raises:
        ValueError: a value is not allowed. The message names the field, the value and what is allowed.
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
                    f"({self.max_logit_scale}). It is 1/temperature: use e.g. 50 for a temperature of 0.02"
                )


@dataclass
class DataArguments:
    """The pairs to train and evaluate on, and how they are prepared.

    Args:
        > Data

        train (`list[SourceArguments]`):
            The sources to train on. A single source or a path is accepted too. Several sources are concatenated,
            unless `weight` or `mixing_alpha` says how to mix them.
        eval (`SourceArguments`, *optional*):
            The source for the nine-way evaluation during and after training.
        mixing_alpha (`float`, *optional*):
            Draw from a source of n pairs with a probability proportional to n^alpha: 1 keeps the proportions, 0 draws
            from all sources equally. If the sources have weights, those are used instead.
        max_broken_share (`float`, *optional*, defaults to 0.01):
            Missing and unreadable images are skipped, counted and reported. If their share exceeds this value, the run
            stops with an error. Missing files (and images without their `.txt`) are found when a source is loaded, and
            count as a share of its pairs. Images that can't be decoded are found in training. Each counts once, as a
            share of the training pairs of all sources.
        crop_scale (`list[float]`, *optional*, defaults to `[0.9, 1.0]`):
            Train on random crops whose share of the image's area is between these two. Their aspect ratio differs from
            the image's by a factor of at most 4/3. `null` turns cropping off.
        horizontal_flip (`bool`, *optional*, defaults to `False`):
            Mirror half of the training images. This is off by default because captions say "left" and "right".
        max_text_length (`int`, *optional*):
            Captions are cut to this number of tokens. The processor that is saved with the model stores the number, so
            `encode` cuts texts as training did. The default is the limit of the encoder's processor or tokenizer.
        languages (`list[str]`, *optional*, defaults to `[]`):
            Languages of the captions, for the model card, as ISO 639 codes: `[en]`.

    Raises:
        ValueError: a value is not allowed. The message names the field, the value and what is allowed.
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
                f"data.train: some sources have a weight, but not {missing}. Give all of them one, or none"
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
    """Train low-rank adapters (LoRA, arXiv 2106.09685) instead of the weights.

    A recipe with a `peft:` section trains adapters, even if the section is empty.

    Args:
        > LoRA

        r (`int`, *optional*, defaults to 16):
            Rank of the adapters.
        lora_alpha (`float`, *optional*, defaults to 32):
            The output of the adapters is scaled by `lora_alpha / r`, or by `lora_alpha / sqrt(r)` with `use_rslora`.
        lora_dropout (`float`, *optional*, defaults to 0.0):
            Dropout on the input of the adapters in training.
        use_rslora (`bool`, *optional*, defaults to `False`):
            Rank-stabilised scaling (arXiv 2312.03732), for high ranks.
        use_dora (`bool`, *optional*, defaults to `False`):
            Weight-decomposed adapters (DoRA, arXiv 2402.09353), which learn magnitude and direction separately. Slower.
        load_in_4bit (`bool`, *optional*, defaults to `False`):
            Keep the frozen weights in 4 bits (NF4) during training and compute in bfloat16 (QLoRA, arXiv 2305.14314).
            This needs one GPU and bitsandbytes. Two things are saved: the adapter, and a float32 model in which it is
            merged with the base.
        image_targets (`str`, *optional*):
            Regular expression that chooses which layers of the image tower and its projection get an adapter. It may
            match any part of a layer's name: `q_proj|v_proj`, `layers\\.(10|11)\\.`. Linear layers and convolutions
            can have an adapter. The default is all linear layers and all 1 x 1 convolutions. If `model.freeze` freezes
            the tower, it gets none. Temperature and learned gates are trained directly, unless they are frozen.
        text_targets (`str`, *optional*):
            The same for the text tower and its projection.

    Raises:
        ValueError: a value is not allowed. The message names the field, the value and what is allowed.
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
                raise ValueError(
                    f"peft.{name}: {getattr(self, name)!r} is not a regular expression: {error}"
                ) from error


def one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    """Raise ValueError if the field `name` has a value that is not allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r} is not one of {', '.join(allowed)}")
