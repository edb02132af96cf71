"""Configuration of VISTA (arXiv 2406.04292): a text encoder that reads an image's patches as tokens among its own."""

import math

from transformers import AutoConfig, PreTrainedConfig

POOLINGS = ("cls", "mean")
# text towers and the ids that open and close their texts in every released checkpoint
CLS_AND_SEP = {"bert": (101, 102), "xlm-roberta": (0, 2)}
LOGIT_SCALE = math.log(50)  # of the paper's temperature, 0.02


class EVA02VisionConfig(PreTrainedConfig):
    r"""
    The image tower of EVA02-CLIP (arXiv 2303.11331). The defaults are those of EVA02-CLIP-B-16.

    Args:
        hidden_size, intermediate_size, num_hidden_layers, num_attention_heads (`int`): `intermediate_size` is the
            width of SwiGLU's two branches.
        image_size, patch_size (`int`): side of the square image and of its patches in pixels.
        num_channels (`int`): colour channels.
        rope_grid_size (`int`, defaults to 16): patches along a side in pre-training; rotary positions of other grids
            are interpolated to this range.
        layer_norm_eps (`float`, defaults to 1e-6).
        patch_dropout (`float`, defaults to 0.0): share of patches left out at random in train mode. VISTA's own base
            configuration has 0.5.
        initializer_range (`float`, defaults to 0.02).

    Raises:
        ValueError: sizes that don't divide, or a `patch_dropout` outside [0, 1).
    """

    model_type = "eva02_clip_vision"

    def __init__(
        self,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=12,
        num_attention_heads=12,
        image_size=224,
        patch_size=16,
        num_channels=3,
        rope_grid_size=16,
        layer_norm_eps=1e-6,
        patch_dropout=0.0,
        initializer_range=0.02,
        **kwargs,
    ):
        if hidden_size % (4 * num_attention_heads):
            raise ValueError(
                f"hidden_size={hidden_size} must be a multiple of 4 x num_attention_heads={num_attention_heads}: "
                "rotary positions turn pairs of a head's channels, half of them by row and half by column"
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
    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): a BERT or XLM-RoBERTa. Defaults to BERT base.
        vision_config (`PreTrainedConfig` or `dict`, *optional*): [`EVA02VisionConfig`] (the default), or any image
            tower of transformers whose `last_hidden_state` holds tokens (ViT, CLIP, SigLIP, ...) or a feature map
            (EfficientNet, ConvNeXt, ...).
        pooling (`str`, defaults to `"cls"`): the embedding is the last hidden state of `[CLS]`, or the `"mean"` of
            all real tokens, the visual ones included, for text towers that were trained so.
        cls_token_id, sep_token_id (`int`, *optional*): the empty text of an image-only row. Default: those of
            the released BERT and XLM-RoBERTa vocabularies. Not `bos_token_id` and `eos_token_id`, which Trainer
            overwrites.
        num_prefix_tokens (`int`, *optional*): tokens of the image tower's output that are no patches and are left
            out, e.g. 1 for ViT's `[CLS]`. Defaults to 1 for EVA02 and 0 for any other.
        logit_scale_init_value (`float`, defaults to ln 50): log of 1/τ at the start.

    Raises:
        ValueError: a text tower of another kind, an unknown `pooling` or image tower, or token ids outside the
            vocabulary.
    """

    model_type = "vista"
    sub_configs = {"text_config": AutoConfig, "vision_config": AutoConfig}
    has_no_defaults_at_init = True  # writes both towers' configurations whole, as GCLConfig does

    def __init__(
        self,
        text_config=None,
        vision_config=None,
        pooling="cls",
        cls_token_id=None,
        sep_token_id=None,
        num_prefix_tokens=None,
        logit_scale_init_value=LOGIT_SCALE,
        **kwargs,
    ):
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
    def projection_dim(self):
        """Dimension D of every embedding: the text tower's width."""
        return self.text_config.hidden_size

    @property
    def vision_width(self):
        """Channels of the image tower's tokens or feature map.

        Raises:
            ValueError: its configuration states none.
        """
        config = self.vision_config
        # EfficientNet says hidden_dim; ConvNeXt, ResNet and others list the widths of their stages
        stages = getattr(config, "hidden_sizes", None) or [getattr(config, "hidden_dim", None)]
        width = getattr(config, "hidden_size", None) or stages[-1]
        if not width:
            raise ValueError(f"unknown image tower: the config of {config.model_type!r} states no hidden_size")
        return width


def tower_config(config):
    """A tower's configuration from its `dict` with `model_type`; a configuration is returned as it is."""
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
