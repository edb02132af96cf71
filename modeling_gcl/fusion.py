"""Fusion of an image feature with a text feature, and the choice of the fusion rule for a pair of towers.

- `sum` is the paper's rule for CLIP, and `normalized_sum` is MixBench's. The gated rules start equal to these two.
- If the features of one tower are much longer, a plain sum ignores the other tower. So the rule is chosen by the
  lengths of the features, measured on a few drawn pictures with captions; no data are needed.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from transformers import ProcessorMixin
from transformers import initialization as init
from transformers.utils import logging

from .configuration_gcl import FUSIONS, GATED_FUSIONS

logger = logging.get_logger(__name__)

MAX_NORM_RATIO = 2.0  # above it, the longer feature makes up more than two thirds of the sum


class GateLayer(nn.Linear):
    """Last layer of the gates. Its weights start at zero, which makes every gate 1."""

    def reset_parameters(self) -> None:
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class Fusion(nn.Module):
    r"""
    Fuses the features of two towers.

    Args:
        dim (`int`): dimension D of the features.
        gated (`bool`): create gates, which the gated rules need. A small network reads both normalised features, and
            returns a gate in (0, 2) for each dimension of each feature. All gates start at 1.
    """

    def __init__(self, dim: int, gated: bool) -> None:
        super().__init__()
        self.gated = gated
        if gated:
            hidden = max(8, dim // 4)
            self.gate_in = nn.Linear(2 * dim, hidden)
            self.gate_out = GateLayer(hidden, 2 * dim)

    def forward(self, image: torch.Tensor, text: torch.Tensor, rule: str) -> torch.Tensor:
        """
        Fuse raw features (N, D) of both towers into features (N, D), which are not normalised.

        Args:
            image, text (`torch.Tensor` of shape `(N, D)`).
            rule (`str`): `fusion` of `GCLConfig`, which may change after the model was built.

        Raises:
            ValueError: the rule is unknown, or it needs gates and there are none.
        """
        if rule not in FUSIONS:
            raise ValueError(f"fusion={rule!r} is unknown: choose one of {', '.join(FUSIONS)}")
        if rule in GATED_FUSIONS and not self.gated:
            raise ValueError(
                f"fusion={rule!r} needs gates, and this model was built without them: load it again with "
                f"from_pretrained(..., fusion={rule!r})"
            )
        if rule in GATED_FUSIONS:
            both = torch.cat([unit(image), unit(text)], dim=-1).to(self.gate_in.weight.dtype)  # (N, 2D)
            gates = 2 * torch.sigmoid(self.gate_out(F.gelu(self.gate_in(both))))  # (N, 2D)
            image_gate, text_gate = gates.chunk(2, dim=-1)
        if rule.endswith("normalized_sum"):
            image, text = unit(image), unit(text)
        return image_gate * image + text_gate * text if rule in GATED_FUSIONS else image + text


def unit(features: torch.Tensor) -> torch.Tensor:
    """Normalise features (N, D). The result is float32 or float64."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


@torch.no_grad()
def measure_tower_norms(model: Any, processor: ProcessorMixin) -> dict[str, float]:
    """
    Measure the mean length of each tower's raw features, over twelve drawn shapes and their captions.

    Args:
        model (`GCLModel`): a model with two towers. Its train or eval mode is restored.
        processor (`GCLProcessor`): the processor of the checkpoint.

    Returns:
        `dict[str, float]`: the lengths of `"image"` and `"text"`.
    """
    images, texts = zip(*drawn_pairs())
    inputs = processor(images=list(images), text=list(texts), return_tensors="pt").to(model.device)
    training = model.training
    model.eval()
    try:
        features = model.tower_features(**inputs)
    finally:
        model.train(training)
    return {name: round(values.float().norm(dim=-1).mean().item(), 4) for name, values in features.items()}


def choose_fusion(model: Any, processor: ProcessorMixin | None) -> None:
    """
    Choose `config.fusion` for a model with two towers, and store the measured lengths in `config.tower_norms`.

    The rule is `"sum"`, the paper's, unless one tower's features are more than `MAX_NORM_RATIO` times as long as the
    other's; then it is `"normalized_sum"`. Without a processor nothing can be measured, and nothing is changed.
    """
    if processor is None:
        return
    model.config.tower_norms = measure_tower_norms(model, processor)
    shorter, longer = sorted(model.config.tower_norms.values())
    model.config.fusion = "sum" if longer <= MAX_NORM_RATIO * shorter else "normalized_sum"
    logger.info(
        f"fusion={model.config.fusion!r} is used: the towers' features have mean lengths {model.config.tower_norms}"
    )


def drawn_pairs() -> Iterator[tuple[Image.Image, str]]:
    """Draw twelve pairs of an image and its caption, for use where inputs are needed and no data are at hand."""
    for colour in ("red", "green", "blue"):
        for shape in ("circle", "square", "triangle", "cross"):
            image = Image.new("RGB", (256, 256), "white")
            draw = ImageDraw.Draw(image)
            if shape == "circle":
                draw.ellipse((48, 48, 208, 208), fill=colour)
            elif shape == "square":
                draw.rectangle((48, 48, 208, 208), fill=colour)
            elif shape == "triangle":
                draw.polygon([(128, 40), (40, 208), (216, 208)], fill=colour)
            else:
                draw.line((48, 128, 208, 128), fill=colour, width=40)
                draw.line((128, 48, 128, 208), fill=colour, width=40)
            yield image, f"a {colour} {shape} on a white background"
