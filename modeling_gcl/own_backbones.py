"""The backbones that are not part of transformers. To add one, write its module and add an entry here.

Each is a `PreTrainedModel` with a `config_class`, `vision_model`, `text_model`, `get_image_features` and
`get_text_features`. With `get_fused_features` it fuses image and text itself (`fusion="native"`); with
`get_visual_tokens`, its image and fused features share one run of the image tower. They are not registered with
transformers' Auto classes, where the remote code of two checkpoints would collide.
"""

from typing import Any

from .vista import VistaModel

OWN_BACKBONES: dict[str, Any] = {model.config_class.model_type: model for model in (VistaModel,)}
