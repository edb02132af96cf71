"""The pretrained dual encoder that GCLModel wraps: loading it, checking it, and passing inputs to its two towers."""

import copy
import inspect
from os import PathLike
from pathlib import Path
from typing import Any, Self

import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging

from .configuration_gcl import GCLConfig
from .fusion import choose_fusion
from .own_backbones import OWN_BACKBONES
from .processing_gcl import GCLProcessor

logger = logging.get_logger(__name__)

REQUIRED_PARTS = ("get_image_features", "get_text_features", "vision_model", "text_model")
OUTPUT_OPTIONS = ("output_hidden_states", "output_attentions")
TEMPERATURES = ("logit_scale", "temperature")
# parameters of the backbone's own loss, and the token that replaces masked patches in pre-training
UNUSED_PARAMETERS = (*TEMPERATURES, "logit_bias", "mask_token")
# backbones whose text feature is the first token, although their text tower also has a pooler
IGNORES_TEXT_POOLER = ("align",)

UNSUPPORTED = {
    "aimv2": "with SDPA, up to transformers 5.23, its text tower attends in both directions if a batch has no padding "
    "and only to the left if it has some, so a text's embedding would depend on the rest of its batch"
}


class FromEncoderMixin:
    """Gives GCLModel its constructor `from_encoder`."""

    @classmethod
    def from_encoder(
        cls,
        encoder: str | PathLike | PreTrainedModel,
        *,
        processor: GCLProcessor | None = None,
        revision: str | None = None,
        dtype: str | torch.dtype | None = None,
        attn_implementation: str | None = None,
        **config: Any,
    ) -> Self:
        r"""
        Build a GCLModel from a pretrained dual encoder.

        If `fusion` is not given, it is chosen for the backbone. A backbone that fuses by itself (VISTA) gets
        `"native"`. For two towers, the lengths of their features are measured and stored in `config.tower_norms`, and
        the model gets `"sum"`, or `"normalized_sum"` if the lengths differ much.

        Args:
            encoder (`str`, `Path` or `PreTrainedModel`): a loaded dual encoder, or the Hub id or folder of one. The id
                or folder of a GCL checkpoint works too; `config` then overrides fields of its configuration.
            processor (`GCLProcessor`, *optional*): used to measure the lengths. Defaults to the processor stored with
                the id or folder. A loaded encoder without a processor gets `"sum"`, the paper's rule.
            revision (`str`, *optional*): Hub revision.
            dtype, attn_implementation (*optional*): passed to `from_pretrained` if `encoder` is an id or folder.
            **config: fields of [`GCLConfig`], for example `fusion="normalized_sum"`.

        Returns:
            [`GCLModel`]. Its temperature starts at `logit_scale_init_value` if given, otherwise at the backbone's.

        Raises:
            ValueError: the backbone is not a dual encoder, needs code of its own, or lacks weights.
            TypeError: `config` names a field that GCLConfig does not have.
            OSError: the id or folder does not exist.
        """
        model_class: Any = cls  # GCLModel
        unknown = set(config) - set(inspect.signature(GCLConfig.__init__).parameters)
        if unknown:
            raise TypeError(f"GCLConfig has no field {', '.join(sorted(unknown))}")
        loading: dict[str, Any] = {"revision": revision, "attn_implementation": attn_implementation}
        if dtype is not None:
            loading["dtype"] = dtype
        name = str(encoder) if isinstance(encoder, (str, PathLike)) else None
        if name is not None and model_type_of(name, revision) == GCLConfig.model_type:
            gcl_config = GCLConfig.from_pretrained(name, revision=revision or "main", **config)
            model = model_class.from_pretrained(name, config=gcl_config, **loading)
            if config.get("logit_scale_init_value") is not None:
                model.logit_scale.reset_()
            return model

        backbone: Any = encoder if name is None else load_backbone(name, config.get("text_pooling"), **loading)
        if backbone.config.model_type == GCLConfig.model_type:
            raise ValueError("this encoder is a GCLModel already: use it as it is")
        choose = "fusion" not in config
        if choose and hasattr(backbone, "get_fused_features"):
            choose, config["fusion"] = False, "native"
        pretrained_scale = pretrained_logit_scale(backbone)
        if pretrained_scale is not None:
            maximum = config.get("max_logit_scale") or GCLConfig().max_logit_scale  # SigLIP's scale is larger
            config.setdefault("logit_scale_init_value", min(pretrained_scale, maximum))
        # a copy, because GCLConfig resets the attention implementation that the loaded encoder has chosen
        model = model_class(GCLConfig(encoder_config=copy.deepcopy(backbone.config), **config), encoder=backbone)
        if choose:
            choose_fusion(model, processor or (None if name is None else _stored_processor(name, revision)))
        return model


def _stored_processor(name, revision):
    """The processor of a Hub id or folder, or None if it has none."""
    try:
        return GCLProcessor.from_encoder(name, revision=revision)
    except (OSError, ValueError) as error:
        logger.warning(
            "fusion='sum' is used: the lengths of the towers' features, which decide between 'sum' and "
            f"'normalized_sum', can't be measured without a processor ({error}). Pass processor or fusion."
        )
        return None


def build_backbone(config: PreTrainedConfig) -> PreTrainedModel:
    """A backbone with random weights."""
    own = OWN_BACKBONES.get(config.model_type)
    return AutoModel.from_config(config) if own is None else own._from_config(config)


def model_type_of(name: str | PathLike, revision: str | None = None) -> str:
    """
    The `model_type` of the checkpoint with this Hub id or in this folder.

    Raises:
        ValueError: it is not a checkpoint of transformers, or it needs code of its own.
        OSError: the id or folder does not exist.
    """
    try:
        config, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
    except (OSError, ValueError) as error:  # ValueError: the Hub has no id of this form
        if Path(name).exists():
            raise
        raise OSError(
            f"there is no folder {name} in {Path.cwd()}, and loading it from the Hub failed. Check the name. The Hub's "
            f"answer: {error}"
        ) from error
    if not config.get("model_type"):
        raise ValueError(
            f"{name} is no checkpoint of transformers (it has no config.json with a model_type). "
            "`gcl convert --help` lists the other formats that can be converted to one."
        )
    model_type = config["model_type"]
    if "auto_map" in config and model_type != GCLConfig.model_type and model_type not in CONFIG_MAPPING:
        raise ValueError(
            f"{name} brings code of its own for its model_type={model_type!r}. GCL only wraps dual encoders that are "
            "part of transformers, so that the saved model loads wherever transformers is installed."
        )
    return model_type


def load_backbone(name: str | PathLike, text_pooling: str | None = None, **kwargs: Any) -> PreTrainedModel:
    """
    Load a pretrained backbone.

    Args:
        name (`str` or `Path`): Hub id or folder.
        text_pooling (`str`, *optional*): as in `GCLConfig`. With `"mean"`, the weights of a text pooler may be missing.
        **kwargs: arguments of `AutoModel.from_pretrained`.

    Raises:
        ValueError: it is not a dual encoder, or it lacks weights. (transformers would only warn, and initialise them at
            random.)
    """
    encoder, report = AutoModel.from_pretrained(name, output_loading_info=True, **kwargs)
    check_is_dual_encoder(encoder)
    freeze_unused_parameters(encoder, text_pooling)
    unused = {key for key, parameter in encoder.named_parameters() if not parameter.requires_grad}
    # the temperature is needed too, because GCL's temperature starts at this value
    missing = sorted(set(report["missing_keys"]) - unused.difference(TEMPERATURES))
    if missing:
        raise ValueError(
            f"{name} lacks {len(missing)} weights of {type(encoder).__name__}, which would be random: "
            f"{', '.join(missing[:3])}, ... It was saved from another class, or it is damaged."
        )
    return encoder


def check_is_dual_encoder(encoder: Any) -> None:
    """Raise ValueError if a model lacks a part that GCLModel needs, or has a part that is known to be wrong."""
    name = type(encoder).__name__
    model_type = encoder.config.model_type
    if model_type in UNSUPPORTED:
        raise ValueError(f"{name} cannot be wrapped: {UNSUPPORTED[model_type]}")
    for part in REQUIRED_PARTS:
        if not hasattr(encoder, part):
            raise ValueError(
                f"unknown backbone: {name} is no dual encoder (it has no {part}). "
                "GCL wraps CLIP, SigLIP, VisionTextDualEncoder and similar models."
            )


def check_settings(encoder: Any, config: GCLConfig) -> None:
    """Raise ValueError if the backbone does not support a setting of the configuration."""
    name = type(encoder).__name__
    if config.text_pooling == "mean" and not hasattr(encoder, "text_projection"):
        raise ValueError(
            f"text_pooling='mean' needs a backbone with a text_projection; {name} has none. Use text_pooling='encoder'."
        )
    if config.fusion == "native" and not hasattr(encoder, "get_fused_features"):
        raise ValueError(
            "fusion='native' needs a backbone that fuses image and text itself, as VISTA does; "
            f"{name} does not. Use 'sum', 'normalized_sum' or one of the gated rules."
        )


def freeze_unused_parameters(encoder: Any, text_pooling: str | None = None) -> None:
    """Freeze the parameters that no embedding depends on: they get no gradient, and DistributedDataParallel fails if a
    trainable parameter gets none."""
    for name, parameter in encoder.named_parameters():
        if name.split(".")[-1] in UNUSED_PARAMETERS:
            parameter.requires_grad_(False)
    pooler = getattr(encoder.text_model, "pooler", None)
    if pooler is not None and (text_pooling == "mean" or encoder.config.model_type in IGNORES_TEXT_POOLER):
        pooler.requires_grad_(False)


def pretrained_logit_scale(encoder: Any) -> float | None:
    """The 1/τ that a backbone was trained with, or None. Its parameter is log(1/τ); in ALIGN and TIPSv2 it is τ."""
    if isinstance(getattr(encoder, "logit_scale", None), nn.Parameter):
        return encoder.logit_scale.detach().float().exp().item()
    if isinstance(getattr(encoder, "temperature", None), nn.Parameter):
        return 1 / encoder.temperature.detach().float().item()
    return None


def split_inputs(encoder: Any, inputs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """
    Divide inputs between the towers: each goes to the tower whose feature method has a parameter of that name.
    `output_hidden_states` and `output_attentions` go to both towers. Inputs that are None go to neither.

    Returns:
        `tuple` of two `dict`: inputs of `get_image_features`, and of `get_text_features`.

    Raises:
        TypeError: neither method has an input of that name.
    """
    inputs = {name: value for name, value in inputs.items() if value is not None}
    image_names = inspect.signature(encoder.get_image_features).parameters
    text_names = inspect.signature(encoder.get_text_features).parameters
    unknown = set(inputs).difference(image_names, text_names, OUTPUT_OPTIONS)
    if unknown:
        raise TypeError(f"{type(encoder).__name__} takes no input named {', '.join(sorted(unknown))}")
    options = {name: inputs.pop(name) for name in OUTPUT_OPTIONS if name in inputs}
    image = {name: value for name, value in inputs.items() if name in image_names}
    text = {name: value for name, value in inputs.items() if name not in image_names}
    return image | options, text | options
