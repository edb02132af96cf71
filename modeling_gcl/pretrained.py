"""The start of a GCLModel from a pretrained dual encoder, as `GCLModel.from_encoder` describes it."""

import copy
import inspect
from pathlib import Path

from transformers.utils import logging

from .backbone import load_backbone, model_type_of, own_logit_scale
from .configuration_gcl import GCLConfig
from .fusion import choose_fusion
from .processing_gcl import GCLProcessor

logger = logging.get_logger(__name__)


def model_from_encoder(cls, encoder, processor, loading, config):
    """
    Arguments and errors as of `GCLModel.from_encoder`, but for

        cls (`type`): GCLModel.
        loading (`dict`): for `from_pretrained`, with `revision`.
        config (`dict`): fields of [`GCLConfig`].
    """
    name, measured = encoder, "fusion" not in config
    unknown = set(config) - set(inspect.signature(GCLConfig.__init__).parameters)
    if unknown:
        raise TypeError(f"GCLConfig has no field {', '.join(sorted(unknown))}")
    if isinstance(encoder, (str, Path)):
        if model_type_of(encoder, loading["revision"]) == GCLConfig.model_type:
            gcl_config = GCLConfig.from_pretrained(encoder, revision=loading["revision"], **config)
            model = cls.from_pretrained(encoder, config=gcl_config, **loading)
            if config.get("logit_scale_init_value") is not None:
                model.logit_scale.reset_()
            return model
        encoder = load_backbone(encoder, config.get("text_pooling"), **loading)
    if encoder.config.model_type == GCLConfig.model_type:
        raise ValueError("this encoder is a GCLModel already: use it as it is")
    own_scale = own_logit_scale(encoder)
    if own_scale is not None:
        bound = config.get("max_logit_scale") or GCLConfig().max_logit_scale  # SigLIP's own lies above it
        config = {"logit_scale_init_value": min(own_scale, bound)} | config
    if measured and hasattr(encoder, "get_fused_features"):
        config = config | {"fusion": "native"}
    # a copy: GCLConfig resets the attention implementation of its sub-configs, which the loaded encoder has chosen
    model = cls(GCLConfig(encoder_config=copy.deepcopy(encoder.config), **config), encoder=encoder)
    if measured and model.config.fusion != "native":
        choose_fusion(model, processor or _processor_beside(name, loading["revision"]))
    return model


def _processor_beside(name, revision):
    """The processor of a Hub id or folder; None if there is none, or none is known for a loaded encoder."""
    if not isinstance(name, (str, Path)):
        return None
    try:
        return GCLProcessor.from_encoder(name, revision=revision)
    except (OSError, ValueError) as error:
        logger.warning(
            "fusion='sum': the lengths of the towers' features, which decide between 'sum' and 'normalized_sum', can't "
            f"be measured without a processor ({error}). Give processor, or fusion itself."
        )
        return None
