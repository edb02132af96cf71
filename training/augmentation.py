"""Random crop and flip on PIL images. Resizing and normalising are the processor's part."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

LARGEST_RATIO = 4 / 3


def augment(
    image: Image.Image, rng: np.random.Generator, crop_scale: Sequence[float] | None, horizontal_flip: bool
) -> Image.Image:
    """A randomly cropped and, if asked, mirrored view, as RandomResizedCrop draws it (log-uniform aspect ratio).

    The aspect ratio is drawn relative to the image's own and within what fits, so that no draw is rejected.

    Args:
        image: any size and mode.
        rng: decides everything; five numbers are taken from it whatever the switches, so that a switch doesn't change
            the other draws.
        crop_scale: smallest and largest share of the area, None for no crop.
        horizontal_flip: mirror with probability 1/2.
    """
    area, shape, place_x, place_y = rng.random(4)
    mirror = rng.random() < 0.5
    if crop_scale is not None:
        share = crop_scale[0] + (crop_scale[1] - crop_scale[0]) * area
        reach = min(np.log(LARGEST_RATIO), -np.log(share))
        ratio = np.exp((2 * shape - 1) * reach)
        width = min(image.width, max(1, round(image.width * np.sqrt(share * ratio))))
        height = min(image.height, max(1, round(image.height * np.sqrt(share / ratio))))
        left = int(place_x * (image.width - width + 1))
        top = int(place_y * (image.height - height + 1))
        image = image.crop((left, top, left + width, top + height))
    if horizontal_flip and mirror:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image
