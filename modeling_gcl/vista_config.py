"""Configuration of VISTA (arXiv 2406.04292): a text encoder that reads the patches of an image as tokens."""

import math
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

POOLINGS = ("cls", "mean")
# text towers, and the ids of [CLS] and [SEP] in all their released checkpoints
CLS_AND_SEP = {"bert": (101, 102), "xlm-roberta": (0, 2)}
LOGIT_SCALE = math.log(50)  # the paper's temperature is 0.02


class EVA02VisionConfig(PreTrainedConfig):
    r"""
    Configuration of EVA02-CLIP's image tower (arXiv 2303.11331). The defaults are those of EVA02-CLIP-B-16.

    Args:
        hidden_size, num_hidden_layers, num_attention_heads (`int`): size of the transformer.
        intermediate_size (`int`): width of each of SwiGLU's two branches.
        image_size, patch_size (`int`): side of the square image, and of its patches, in pixels.
        num_channels (`int`): colour channels.
        rope_grid_size (`int`, defaults to 16): patches along a side in pre-training. The rotary positions of other
            grids are interpolated to this range.
        layer_norm_eps (`float`, defaults to 1e-6).
        patch_dropout (`float`, defaults to 0.0): share of patches dropped at random in train mode. VISTA's own base
            configuration has 0.5.
        initializer_range (`float`, defaults to 0.02).

    Raises:
        ValueError: a size is not a multiple of another as it must be, or `patch_dropout` is outside [0, 1).
    """

    model_type = "eva02_clip_vision"

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 2048,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        image_size: int = 224,
        patch_size: int = 16,
        num_channels: int = 3,
        rope_grid_size: int = 16,
        layer_norm_eps: float = 1e-6,
        patch_dropout: float = 0.0,
        initializer_range: float = 0.02,
        **kwargs: Any,
    ) -> None:
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of 4 x num_attention_heads={num_attention_heads}: "
                "rotary positions rotate pairs of a head's channels, half of the pairs by row and half by column"
            )
        if image_size % patch_size:
            raise ValueError(f"image_size={image_size} must be a multiple of patch_size={patch_size}")
        if not 0 <= patch_dropout < 1:
            raise ValueError(f"patch_dropout={patch_dropout} must be at least 0 and below 1")
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.image_size = image_size
        self.patch_size = patch_size
        self.num_channels = num_channels
        self.rope_grid_size = rope_grid_size
        self.layer_norm_eps = layer_norm_eps
        self.patch_dropout = patch_dropout
        self.initializer_range = initializer_range
        super().__init__(**kwargs)


class VistaConfig(PreTrainedConfig):
    r"""
    Configuration of a [`VistaModel`].

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): a BERT or XLM-RoBERTa. Defaults to BERT base.
        vision_config (`PreTrainedConfig` or `dict`, *optional*): an [`EVA02VisionConfig`] (the default), or any image
            tower of transformers whose `last_hidden_state` is a sequence of tokens (ViT, CLIP, SigLIP, ...) or a
            feature map (EfficientNet, ConvNeXt, ...).
        pooling (`str`, defaults to `"cls"`): `"cls"` uses the last hidden state of `[CLS]` as the embedding. `"mean"`
            averages those of all tokens, visual ones included, for text towers that were trained this way.
        cls_token_id, sep_token_id (`int`, *optional*): the two tokens of the empty text, which is read with an image
            alone. Default: those of the released BERT and XLM-RoBERTa vocabularies. (They are not called `bos_token_id`
            and `eos_token_id`, because Trainer overwrites those.)
        num_prefix_tokens (`int`, *optional*): number of tokens that precede the patches in the image tower's output and
            are left out, for example 1 for ViT's `[CLS]`. Defaults to 1 for EVA02 and 0 for other towers.
        logit_scale_init_value (`float`, defaults to ln 50): initial value of log(1/τ).

    Raises:
        ValueError: the text tower is of another kind, `pooling` or the image tower is unknown, or a token id is outside
            the vocabulary.
    """

    model_type = "vista"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    has_no_defaults_at_init = True  # save both towers' configurations in full, as GCLConfig does

    def __init__(
        self,
        text_config: PreTrainedConfig | dict[str, Any] | None = None,
        vision_config: PreTrainedConfig | dict[str, Any] | None = None,
        pooling: str = "cls",
        cls_token_id: int | None = None,
        sep_token_id: int | None = None,
        num_prefix_tokens: int | None = None,
        logit_scale_init_value: float = LOGIT_SCALE,
        **kwargs: Any,
    ) -> None:
        text_config = tower_config({"model_type": "bert"} if text_config is None else text_config)
        vision_config = EVA02VisionConfig() if vision_config is None else tower_config(vision_config)
        if text_config.model_type not in CLS_AND_SEP:
            raise ValueError(
                f"text_config is a {text_config.model_type!r}: VISTA's text tower is one of {', '.join(CLS_AND_SEP)}"
            )
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is unknown: choose one of {', '.join(POOLINGS)}")
        cls_default, sep_default = CLS_AND_SEP[text_config.model_type]
        cls_token_id = cls_default if cls_token_id is None else cls_token_id
        sep_token_id = sep_default if sep_token_id is None else sep_token_id
        for name, token_id in (("cls_token_id", cls_token_id), ("sep_token_id", sep_token_id)):
            if not 0 <= token_id < text_config.vocab_size:
                raise ValueError(f"{name}={token_id} is outside the vocabulary of {text_config.vocab_size} tokens")
        if num_prefix_tokens is None:
            num_prefix_tokens = int(vision_config.model_type == EVA02VisionConfig.model_type)
        self.text_config = text_config
        self.vision_config = vision_config
        self.pooling = pooling
        self.cls_token_id = cls_token_id
        self.sep_token_id = sep_token_id
        self.num_prefix_tokens = num_prefix_tokens
        self.logit_scale_init_value = logit_scale_init_value
        super().__init__(**kwargs)

    @property
    def projection_dim(self) -> int:
        """Dimension D of every embedding: the width of the text tower."""
        return self.text_config.hidden_size

    @property
    def vision_width(self) -> int:
        """Channels of the image tower's tokens or feature map.

        Raises:
            ValueError: the tower's configuration does not state them.
        """
        config = self.vision_config
        # EfficientNet has hidden_dim; ConvNeXt, ResNet and others list the widths of their stages
        stages = getattr(config, "hidden_sizes", None) or [getattr(config, "hidden_dim", None)]
        width = getattr(config, "hidden_size", None) or stages[-1]
        if not width:
            raise ValueError(f"unknown image tower: the config of {config.model_type!r} states no hidden_size")
        return width


def tower_config(config: PreTrainedConfig | dict[str, Any]) -> PreTrainedConfig:
    """Build a tower's configuration from a `dict` with `model_type`. A configuration is returned unchanged."""
    if not isinstance(config, dict):
        return config
    config = dict(config)
    model_type = config.pop("model_type", None)
    if model_type == EVA02VisionConfig.model_type:
        return EVA02VisionConfig(**config)
    try:
        return AutoConfig.for_model(model_type, **config)
    except ValueError as error:
        raise ValueError(
            f"unknown tower: model_type={model_type!r} is neither {EVA02VisionConfig.model_type!r} nor known to this "
            "version of transformers"
        ) from error
