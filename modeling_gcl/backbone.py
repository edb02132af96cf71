"""The backbone that GCLModel wraps: how it is built or loaded, what it must offer, and what of it no embedding uses."""

from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig

from .configuration_gcl import GCLConfig
from .vista import VistaModel

NEEDED = ("get_image_features", "get_text_features", "vision_model", "text_model")
# temperatures and biases of a loss of its own; the token that stands for patches masked in pre-training
TEMPERATURES = ("logit_scale", "temperature")
UNUSED_PARAMETERS = (*TEMPERATURES, "logit_bias", "mask_token")
FIRST_TOKEN_AS_TEXT = ("align",)  # has a text pooler, whose output it does not use

REFUSED = {
    "aimv2": "with SDPA, up to transformers 5.23, its text tower attends to both sides where a batch has no padding, "
    "and to the left only where it has, so that a text's embedding would depend on its batch"
}


def build_backbone(config):
    """A backbone of random weights from its configuration."""
    is_vista = config.model_type == VistaModel.config_class.model_type
    return VistaModel._from_config(config) if is_vista else AutoModel.from_config(config)


def model_type_of(name, revision=None):
    """
    What kind of model a Hub id or folder holds.

    Raises:
        ValueError: it is no checkpoint of transformers, or one that brings code of its own.
        OSError: no such id or folder.
    """
    config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    if not config.get("model_type"):
        raise ValueError(
            f"{name} is no checkpoint of transformers (it has no config.json with a model_type). "
            "`gcl convert --help` lists the other formats that can be brought into one."
        )
    model_type = config["model_type"]
    if "auto_map" in config and model_type != GCLConfig.model_type and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name} brings code of its own for its model_type={model_type!r}. GCL wraps the dual encoders that are "
            "part of transformers, so that what it saves loads wherever transformers is."
        )
    return model_type


def load_backbone(name, text_pooling=None, **kwargs):
    """
    A pretrained backbone.

    Args:
        name (`str` or `Path`): Hub id or folder.
        text_pooling (`str`, *optional*): of `GCLConfig`; decides with `freeze_unused_parameters` what may be missing.
        **kwargs: as for `AutoModel.from_pretrained`.

    Raises:
        ValueError: it is no dual encoder, or the checkpoint lacks weights: transformers would only warn, and draw them.
    """
    encoder, report = AutoModel.from_pretrained(name, output_loading_info=True, **kwargs)
    check_is_dual_encoder(encoder)
    freeze_unused_parameters(encoder, text_pooling)
    unused = {key for key, parameter in encoder.named_parameters() if not parameter.requires_grad}
    missing = sorted(set(report["missing_keys"]) - unused.difference(TEMPERATURES))  # GCL's starts at the backbone's
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {type(encoder).__name__}, which would be random: "
            f"{', '.join(missing[:3])}, ... It was saved from another class, or is damaged."
        )
    return encoder


def check_is_dual_encoder(encoder):
    """Raise ValueError for a model that lacks a part which GCLModel needs, or whose parts are known to be wrong."""
    if encoder.config.model_type in REFUSED:
        raise ValueError(f"{type(encoder).__name__} cannot be wrapped: {REFUSED[encoder.config.model_type]}")
    for part in NEEDED:
        if not hasattr(encoder, part):
            raise ValueError(
                f"unknown backbone: {type(encoder).__name__} is no dual encoder (it has no {part}). "
                "GCL wraps CLIP, SigLIP, VisionTextDualEncoder and the like."
            )


def check_settings(encoder, config):
    """Raise ValueError for settings of a `GCLConfig` that the backbone does not allow."""
    name = type(encoder).__name__
    if config.text_pooling == "mean" and not hasattr(encoder, "text_projection"):
        raise ValueError(
            f"text_pooling='mean' needs a backbone with a text_projection; {name} has none. Use text_pooling='encoder'."
        )
    if config.fusion == "native" and not hasattr(encoder, "get_fused_features"):
        raise ValueError(
            "fusion='native' needs a backbone that fuses image and text itself, as VISTA does; "
            f"{name} does not. Use 'sum', 'normalized_sum' or a gated one."
        )


def freeze_unused_parameters(encoder, text_pooling=None):
    """Switch off the gradient of parameters that no embedding depends on: DistributedDataParallel fails on trainable
    parameters without a gradient."""
    for name, parameter in encoder.named_parameters():
        if name.split(".")[-1] in UNUSED_PARAMETERS:
            parameter.requires_grad_(False)
    pooler = getattr(encoder.text_model, "pooler", None)
    if pooler is not None and (text_pooling == "mean" or encoder.config.model_type in FIRST_TOKEN_AS_TEXT):
        pooler.requires_grad_(False)


def own_logit_scale(encoder):
    """The 1/τ that a backbone was trained with, or None. Its parameter holds log(1/τ), or, in ALIGN and TIPSv2, τ."""
    if isinstance(getattr(encoder, "logit_scale", None), nn.Parameter):
        return encoder.logit_scale.detach().float().exp().item()
    if isinstance(getattr(encoder, "temperature", None), nn.Parameter):
        return 1 / encoder.temperature.detach().float().item()
    return None
