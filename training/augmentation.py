"""Random crop and flip, applied before images are resized and normalised."""

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
    """Crop an image at random, as RandomResizedCrop does, and mirror half of the images if asked to.

    The aspect ratio is relative to the image's own. It is drawn log-uniformly among the ratios that fit, so no draw is
    rejected.

    Args:
        image: PIL image of any size and mode, or a tensor (H, W, C). The crop of a tensor is a view without a copy.
            Both forms give the same pixels.
        rng: the generator of all random numbers. Each call draws five numbers, whether they are needed or not. So the
            crops don't change if flipping is switched on or off, and vice versa.
        crop_scale: smallest and largest share of the area; None for no crop.
        horizontal_flip: mirror with probability 1/2.
    """
    area, shape, place_x, place_y = rng.random(4)
    mirror = rng.random() < 0.5
    if crop_scale is not None:
        if isinstance(image, torch.Tensor):
            image_height, image_width = image.shape[:2]
        else:
            image_height, image_width = image.height, image.width
        share = crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area
        reach = min(np.log(LARGEST_RATIO), -np.log(share))
        ratio = np.exp((2 * shape - 1) * reach)
        width = min(image_width, max(1, round(image_width * np.sqrt(share * ratio))))
        height = min(image_height, max(1, round(image_height * np.sqrt(share / ratio))))
        left = int(place_x * (image_width - width + 1))
        top = int(place_y * (image_height - height + 1))
        if isinstance(image, torch.Tensor):
            image = image[top : top + height, left : left + width]
        else:
            image = image.crop((left, top, left + width, top + height))
    if horizontal_flip and mirror:
        if isinstance(image, torch.Tensor):
            return image.flip(1)
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
