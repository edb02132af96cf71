"""Random crop and flip, before images are resized and normalised."""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image

LARGEST_RATIO = 4 / 3


def augment(
    image: Image.Image | torch.Tensor,
    rng: np.random.Generator,
    crop_scale: Sequence[float] | None,
    horizontal_flip: bool,
) -> Image.Image | torch.Tensor:
    """A randomly cropped and, if asked, mirrored view, as RandomResizedCrop draws it (log-uniform aspect ratio).

    The aspect ratio is drawn relative to the image's own and within what fits, so that no draw is rejected.

    Args:
        image: PIL image of any size and mode, or a tensor (H, W, C), whose crop is a view without a copy. The same
            pixels give the same result in both forms.
        rng: decides everything; five numbers are taken from it whatever the switches, so that a switch doesn't change
            the other draws.
        crop_scale: smallest and largest share of the area, None for no crop.
        horizontal_flip: mirror with probability 1/2.
    """
    area, shape, place_x, place_y = rng.random(4)
    mirror = rng.random() < 0.5
    is_tensor = isinstance(image, torch.Tensor)
    if crop_scale is not None:
        image_height, image_width = image.shape[:2] if is_tensor else (image.height, image.width)
        share = crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area
        reach = min(np.log(LARGEST_RATIO), -np.log(share))
        ratio = np.exp((2 * shape - 1) * reach)
        width = min(image_width, max(1, round(image_width * np.sqrt(share * ratio))))
        height = min(image_height, max(1, round(image_height * np.sqrt(share / ratio))))
        left = int(place_x * (image_width - width + 1))
        top = int(place_y * (image_height - height + 1))
        if is_tensor:
            image = image[top : top + height, left : left + width]
        else:
            image = image.crop((left, top, left + width, top + height))
    if horizontal_flip and mirror:
        image = image.flip(1) if is_tensor else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
