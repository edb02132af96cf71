"""Configuration, model, processor and losses of GCL. Importing it registers GCL with transformers' Auto classes.

Saved models contain these files, so that they load with `trust_remote_code=True` without this package."""

from transformers import AutoConfig, AutoModel, AutoProcessor

from .configuration_gcl import GCLConfig
from .loss import alignclip_loss, contrastive_loss, gcl_loss
from .modeling_gcl import GCLModel, GCLOutput
from .processing_gcl import GCLProcessor
from .rows import ImageError, load_image
from .video import VideoError, load_video_frames, middle_frame

AutoConfig.register(GCLConfig.model_type, GCLConfig, exist_ok=True)
AutoModel.register(GCLConfig, GCLModel, exist_ok=True)
AutoProcessor.register(GCLConfig, GCLProcessor, exist_ok=True)
GCLConfig.register_for_auto_class()
GCLModel.register_for_auto_class("AutoModel")
GCLProcessor.register_for_auto_class("AutoProcessor")

__all__ = [
    "GCLConfig",
    "GCLModel",
    "GCLOutput",
    "GCLProcessor",
    "ImageError",
    "VideoError",
    "alignclip_loss",
    "contrastive_loss",
    "gcl_loss",
    "load_image",
    "load_video_frames",
    "middle_frame",
]
