"""Fusion of an image feature and a text feature into one, and the choice of the rule that suits a pair of towers.

- `sum` is the paper's rule for CLIP, `normalized_sum` MixBench's; the gated ones begin as these and learn from there.
- Towers whose features differ in length drown each other in a plain sum, so the rule is chosen from the lengths: they
  are measured on a few drawn pictures with captions, which needs no data.
"""

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn
from transformers import initialization as init
from transformers.utils import logging

from .configuration_gcl import FUSIONS, GATED_FUSIONS

logger = logging.get_logger(__name__)

MAX_NORM_RATIO = 2.0  # from there on the longer feature makes up more than two thirds of the sum


class GateLayer(nn.Linear):
    """Last layer of the gates; zero at the start, which makes every gate 1."""

    def reset_parameters(self):
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class Fusion(nn.Module):
    r"""
    Fuses the features of two towers.

    Args:
        dim (`int`): dimension D of the features.
        gated (`bool`): with gates, which the gated rules need. They multiply each dimension of both features with a
            number in (0, 2), from a small network of both unit features; all gates are 1 at the start.
    """

    def __init__(self, dim, gated):
        super().__init__()
        self.gated = gated
        if gated:
            hidden = max(8, dim // 4)
            self.gate_in = nn.Linear(2 * dim, hidden)
            self.gate_out = GateLayer(hidden, 2 * dim)

    def forward(self, image, text, rule):
        """
        (N, D) raw features of both towers → (N, D) fused features, not normalised.

        `rule` (`str`) is a fusion of `GCLConfig`, which may change while a model lives; ValueError for one that is
        unknown, or that needs gates where there are none.
        """
        if rule not in FUSIONS:
            raise ValueError(f"fusion={rule!r} is unknown: choose one of {', '.join(FUSIONS)}")
        if rule in GATED_FUSIONS and not self.gated:
            raise ValueError(
                f"fusion={rule!r} needs gates, which this model was built without: load it again with this fusion, "
                f"from_pretrained(..., fusion={rule!r})"
            )
        if rule in GATED_FUSIONS:
            both = torch.cat([unit(image), unit(text)], dim=-1).to(self.gate_in.weight.dtype)  # (N, 2D)
            gates = 2 * torch.sigmoid(self.gate_out(F.gelu(self.gate_in(both))))  # (N, 2D)
            image_gate, text_gate = gates.chunk(2, dim=-1)
        if rule.endswith("normalized_sum"):
            image, text = unit(image), unit(text)
        return image_gate * image + text_gate * text if rule in GATED_FUSIONS else image + text


def unit(features):
    """(N, D) features → unit vectors, in float32 for half precision."""
    return F.normalize(features if features.dtype == torch.float64 else features.float(), dim=-1)


@torch.no_grad()
def measure_tower_norms(model, processor):
    """
    Mean length of the raw features of each tower, over twelve drawn shapes and their captions.

    Args:
        model (`GCLModel`): with two towers; its mode is left as it was.
        processor (`GCLProcessor`): the checkpoint's.

    Returns:
        `dict[str, float]`: `"image"` and `"text"`.
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


def choose_fusion(model, processor):
    """
    Set `config.fusion` of a model of two towers to `"sum"`, the paper's rule, unless one tower's features are over
    `MAX_NORM_RATIO` times longer than the other's: `"normalized_sum"` then. The lengths go to `config.tower_norms`.

    Without a processor nothing can be measured and all stays as it is.
    """
    if processor is None:
        return
    model.config.tower_norms = measure_tower_norms(model, processor)
    shorter, longer = sorted(model.config.tower_norms.values())
    model.config.fusion = "sum" if longer <= MAX_NORM_RATIO * shorter else "normalized_sum"
    logger.info(f"fusion={model.config.fusion!r}: mean lengths of the towers' features are {model.config.tower_norms}")


def drawn_pairs():
    """Twelve (image, caption) pairs, for whoever needs inputs and has no data."""
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
