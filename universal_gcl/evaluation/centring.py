"""GR-CLIP's centring (arXiv 2507.19054): estimate the mean embedding of each modality from pairs."""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch

from modeling_gcl import GCLModel, GCLProcessor


def estimate_modality_means(
    model: GCLModel,
    processor: GCLProcessor,
    pairs: Sequence[Mapping[str, Any]],
    *,
    batch_size: int = 64,
    show_progress: bool = False,
) -> None:
    """Store the means of the pairs' image, text and fused embeddings in the model.

    The model subtracts them once `model.config.centring` is on.

    Args:
        model: a `GCLModel` with centring off.
        pairs: calibration pairs, each `{"id", "image", "captions"}`. Never pass the pairs that are searched later. Only
            the first caption of each is used.

    Raises:
        ValueError: there are no pairs, centring is already on, or an image can't be read.
    """
    if not len(pairs):
        raise ValueError("there are no pairs to estimate the modality means from")
    if model.config.centring:
        raise ValueError("this model already centres its embeddings: load it with centring=False to estimate new means")
    images = [{"image": pair["image"]} for pair in pairs]
    texts = [{"text": pair["captions"][0]} for pair in pairs]
    fused = [image | text for image, text in zip(images, texts)]
    rows = [*images, *texts, *fused]
    embeds = model.encode(rows, processor, batch_size=batch_size, show_progress=show_progress)
    model.set_modality_means(*cast(torch.Tensor, embeds).split(len(pairs)))  # nothing is skipped
