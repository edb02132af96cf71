"""Configuration of a GCL embedding model: a wrapped dual encoder and the rule that fuses its two towers."""

from transformers import AutoConfig, PreTrainedConfig

from .vista_config import VistaConfig

GATED_FUSIONS = ("gated_sum", "gated_normalized_sum")
FUSIONS = ("sum", "normalized_sum", *GATED_FUSIONS, "native")
TEXT_POOLINGS = ("encoder", "mean")


class GCLConfig(PreTrainedConfig):
    r"""
    Args:
        encoder_config (`PreTrainedConfig` or `dict`, *optional*):
            Configuration of the backbone: any dual encoder of transformers (CLIP, SigLIP, SigLIP 2,
            VisionTextDualEncoder, ...). Defaults to CLIP ViT-B/32's.
        fusion (`str`, defaults to `"sum"`):
            How the fused feature is made from the image feature v and the text feature w. `"sum"`: v + w on the raw
            tower outputs (UniIR's CLIP-SF, the paper's rule). `"normalized_sum"`: v/|v| + w/|w| (MixBench), for towers
            whose raw norms differ. `"gated_sum"`, `"gated_normalized_sum"`: the same with learned gates, which begin
            at 1. `"native"`: the backbone fuses by itself (VISTA). The result is L2-normalised in all cases.
        text_pooling (`str`, defaults to `"encoder"`):
            `"encoder"`: the backbone's own text feature. `"mean"`: mean of the last hidden states over the real
            tokens, then the backbone's `text_projection` (sentence-transformers' towers were trained so).
        centring (`bool`, defaults to `False`):
            Subtract each modality's stored mean from the unit-norm features and normalise again (GR-CLIP,
            arXiv 2507.19054). Fused features are then the sum of the centred ones, as there; gated and native ones
            have a mean of their own. The means are set by `GCLModel.set_modality_means`.
        tower_norms (`dict[str, float]`, *optional*):
            Mean length of the raw `"image"` and `"text"` features, if `fusion` was chosen by measuring them.
        logit_scale_init_value (`float`, *optional*):
            1/τ at the start, e.g. 100. Defaults to the backbone's own pretrained scale where it has one, else 1/0.07.
        max_logit_scale (`float`, defaults to 100):
            Upper bound of 1/τ (CLIP's).
        matryoshka_dims (`list[int]`, *optional*):
            Dimensions that embeddings were trained to be cut to (`encode(..., truncate_dim=...)`), D first and falling.
            Set by training; None: D alone.

    Raises:
        ValueError: unknown `fusion` or `text_pooling`, a temperature that is not positive, `matryoshka_dims` that are
            not so, or an `encoder_config` without a known `model_type`.
    """

    model_type = "gcl"
    sub_configs = {"encoder_config": AutoConfig}
    # writes the backbone's configuration whole: a difference to its class's defaults would change meaning with the
    # defaults of a later transformers, and 5.17 cannot form it for VisionTextDualEncoder
    has_no_defaults_at_init = True

    def __init__(
        self,
        encoder_config=None,
        fusion="sum",
        text_pooling="encoder",
        centring=False,
        tower_norms=None,
        logit_scale_init_value=None,
        max_logit_scale=100.0,
        matryoshka_dims=None,
        **kwargs,
    ):
        if encoder_config is None:
            encoder_config = AutoConfig.for_model("clip")
        elif isinstance(encoder_config, dict) and encoder_config.get("model_type") == VistaConfig.model_type:
            # not registered with AutoConfig: the remote code of two checkpoints would collide there
            encoder_config = VistaConfig(**{key: encoder_config[key] for key in encoder_config if key != "model_type"})
        elif isinstance(encoder_config, dict):
            encoder_config = dict(encoder_config)
            model_type = encoder_config.pop("model_type", None)
            try:
                encoder_config = AutoConfig.for_model(model_type, **encoder_config)
            except ValueError as error:
                raise ValueError(
                    f"unknown backbone: encoder_config names model_type={model_type!r}, which this version of "
                    "transformers does not have. Upgrade transformers, or pass the config of a dual encoder it knows."
                ) from error
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

    def check_fields(self):
        """Raise ValueError for a field out of its range. The model calls it again: `from_pretrained(..., field=value)`
        sets fields after `__init__`."""
        for name, allowed in (("fusion", FUSIONS), ("text_pooling", TEXT_POOLINGS)):
            if getattr(self, name) not in allowed:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: choose one of {', '.join(allowed)}")
        if not self.max_logit_scale > 0:
            raise ValueError(f"max_logit_scale={self.max_logit_scale!r} must be positive: it bounds 1/temperature")
        if self.logit_scale_init_value is not None and not self.logit_scale_init_value > 0:
            raise ValueError(f"logit_scale_init_value={self.logit_scale_init_value!r} must be positive: 1/temperature")
        if (self.logit_scale_init_value or 0) > self.max_logit_scale * (1 + 1e-6):  # exp(log(100)) is 100.00001
            raise ValueError(
                f"logit_scale_init_value={self.logit_scale_init_value!r} is over max_logit_scale="
                f"{self.max_logit_scale!r}: lower the one or raise the other"
            )
        if self.matryoshka_dims is not None:
            dims, whole = list(self.matryoshka_dims), self.projection_dim
            if dims != sorted(set(dims), reverse=True) or dims[:1] != [whole] or dims[-1] < 1:
                raise ValueError(f"matryoshka_dims={dims} must fall from the embeddings' {whole} to 1 or more")

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As `PreTrainedConfig.from_dict`, but a checkpoint of another architecture is an error, not a warning."""
        model_type = config_dict.get("model_type")
        if model_type not in (None, "", cls.model_type):
            raise ValueError(
                f"this is a {model_type!r} checkpoint, not a GCL one. "
                "Start from a dual encoder's weights with GCLModel.from_encoder(...)."
            )
        return super().from_dict(config_dict, **kwargs)

    @property
    def projection_dim(self):
        """Dimension D of every embedding."""
        return embedding_dim(self.encoder_config)


def embedding_dim(encoder_config):
    """Output dimension of a dual encoder, read from its configuration.

    CLIP-like backbones state `projection_dim`; SigLIP's towers project to the text tower's `projection_size`, which
    defaults to its width.
    """
    if getattr(encoder_config, "projection_dim", None):
        return encoder_config.projection_dim
    text_config = getattr(encoder_config, "text_config", encoder_config)
    return getattr(text_config, "projection_size", None) or text_config.hidden_size
