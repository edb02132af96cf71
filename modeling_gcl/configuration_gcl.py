"""Configuration of a GCL embedding model: the dual encoder it wraps, and the rule that fuses image and text."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from .own_backbones import OWN_BACKBONES

GATED_FUSIONS = ("gated_sum", "gated_normalized_sum")
FUSIONS = ("sum", "normalized_sum", *GATED_FUSIONS, "native")
TEXT_POOLINGS = ("encoder", "mean")


class GCLConfig(PreTrainedConfig):
    r"""
    Configuration of a [`GCLModel`]: which dual encoder it wraps, and how it fuses an image with a text.

    Args:
        encoder_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone. Any dual encoder of transformers works: CLIP, SigLIP, SigLIP 2,
            VisionTextDualEncoder and others. Defaults to CLIP ViT-B/32.
        fusion (`str`, defaults to `"sum"`):
            How the fused feature is computed from the image feature v and the text feature w:

            - `"sum"`: v + w, with the features as the towers return them (the paper's rule; CLIP-SF in UniIR).
            - `"normalized_sum"`: v/|v| + w/|w|, for towers whose features differ in length (as in MixBench).
            - `"gated_sum"`, `"gated_normalized_sum"`: the same sums with learned gates. All gates start at 1.
            - `"native"`: the backbone fuses image and text itself (VISTA).

            The fused embedding is always L2-normalised.
        text_pooling (`str`, defaults to `"encoder"`):
            `"encoder"` uses the backbone's own text feature. `"mean"` averages the text tower's last hidden states
            over all tokens except padding, and applies the backbone's `text_projection`. Use it for text towers from
            sentence-transformers, which were trained this way.
        centring (`bool`, defaults to `False`):
            Subtract a stored mean from each normalised feature, and normalise again (GR-CLIP, arXiv 2507.19054). Each
            modality has its own mean. Set them with `GCLModel.set_modality_means`. With `"sum"` and
            `"normalized_sum"`, the fused feature is the sum of the centred image and text features.
        tower_norms (`dict[str, float]`, *optional*):
            Mean length of the raw `"image"` and `"text"` features. Set if `fusion` was chosen by measuring them.
        logit_scale_init_value (`float`, *optional*):
            Initial value of 1/τ, for example 100. Defaults to the backbone's pretrained value, or 1/0.07 if it has
            none.
        max_logit_scale (`float`, defaults to 100):
            Largest value that 1/τ may reach in training (100 as in CLIP).
        matryoshka_dims (`list[int]`, *optional*):
            Dimensions that the embeddings were trained to be cut to, from D downwards; set by training. Use them as
            `truncate_dim` of `GCLModel.encode`. None means that only the full D dimensions were trained.

    Raises:
        ValueError: `fusion` or `text_pooling` is unknown, a scale is not positive, `matryoshka_dims` does not fall from
            D, or `encoder_config` has no known `model_type`.
    """

    model_type = "gcl"
    sub_configs = {"encoder_config": AutoConfig}
    # Save the backbone's configuration in full. If only its differences to the class defaults were saved, it would
    # change with the defaults of a later transformers; 5.17 can't compute them for VisionTextDualEncoder anyway.
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config: PreTrainedConfig | dict[str, Any] | None = None,
        fusion: str = "sum",
        text_pooling: str = "encoder",
        centring: bool = False,
        tower_norms: dict[str, float] | None = None,
        logit_scale_init_value: float | None = None,
        max_logit_scale: float = 100.0,
        matryoshka_dims: list[int] | None = None,
        **kwargs: Any,
    ) -> None:
        if encoder_config is None:
            encoder_config = AutoConfig.for_model("clip")
        elif isinstance(encoder_config, dict):
            encoder_config = _backbone_config(**encoder_config)
        self.encoder_config = encoder_config
        self.fusion = fusion
        self.text_pooling = text_pooling
        self.centring = centring
        self.tower_norms = tower_norms
        self.logit_scale_init_value = logit_scale_init_value
        self.max_logit_scale = max_logit_scale
        self.matryoshka_dims = matryoshka_dims
        super().__init__(**kwargs)
        self.check_fields()

    def check_fields(self) -> None:
        """Raise ValueError if a field is out of its range. The model calls this too, because
        `from_pretrained(..., field=value)` sets fields after `__init__`."""
        for name, allowed in (("fusion", FUSIONS), ("text_pooling", TEXT_POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}")
        initial, maximum = self.logit_scale_init_value, self.max_logit_scale
        if not maximum > 0:
            raise ValueError(f"max_logit_scale={maximum!r} must be positive: it is the largest 1/temperature")
        if initial is not None and not initial > 0:
            raise ValueError(f"logit_scale_init_value={initial!r} must be positive: it is 1/temperature")
        if (initial or 0) > maximum * (1 + 1e-6):  # exp(log(100)) is 100.00001
            raise ValueError(
                f"logit_scale_init_value={initial!r} is over max_logit_scale={maximum!r}: "
                "lower the first or raise the second"
            )
        if self.matryoshka_dims is not None:
            dims, full = list(self.matryoshka_dims), self.projection_dim
            if dims != sorted(set(dims), reverse=True) or dims[:1] != [full] or dims[-1] < 1:
                raise ValueError(f"matryoshka_dims={dims} must fall from the embeddings' {full} to 1 or more")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like `PreTrainedConfig.from_dict`, but a checkpoint of another architecture raises ValueError. (transformers
        only warns.)"""
        model_type = config_dict.get("model_type")
        if model_type not in (None, "", cls.model_type):
            raise ValueError(
                f"this is a {model_type!r} checkpoint, not a GCL one. "
                "To start from the weights of a dual encoder, use GCLModel.from_encoder(...)."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def text_config(self) -> PreTrainedConfig:
        """Configuration of the backbone's text tower."""
        return self.encoder_config.text_config

    @property
    def vision_config(self) -> PreTrainedConfig:
        """Configuration of the backbone's image tower."""
        return self.encoder_config.vision_config

    @property
    def projection_dim(self) -> int:
        """Dimension D of every embedding. Most backbones state it as `projection_dim`. SigLIP's towers project to the
        text tower's `projection_size`, which defaults to its width."""
        if getattr(self.encoder_config, "projection_dim", None):
            return self.encoder_config.projection_dim
        return getattr(self.text_config, "projection_size", None) or self.text_config.hidden_size


def _backbone_config(model_type: str | None = None, **fields: Any) -> PreTrainedConfig:
    if model_type in OWN_BACKBONES:
        return OWN_BACKBONES[model_type].config_class(**fields)
    try:
        return AutoConfig.for_model(str(model_type), **fields)
    except ValueError as error:
        raise ValueError(
            f"unknown backbone: encoder_config names model_type={model_type!r}, which this version of "
            "transformers does not have. Upgrade transformers, or pass the config of a dual encoder it has."
        ) from error
