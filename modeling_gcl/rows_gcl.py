"""Rows as users give them: what counts as an image, a text or both, and how an image is read."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError


class ImageError(ValueError):
    """An image that is missing, corrupt or of a type that cannot be read."""


@dataclass
class Row:
    """One row: `text` (or None) and zero or more unread `images`; `kind` is `"i"`, `"t"` or `"it"`."""

    text: str | None = None
    images: list = field(default_factory=list)

    @property
    def kind(self):
        return ("i" if self.images else "") + ("t" if self.text is not None else "")


def parse_row(value, index):
    """
    Normalise one user row.

    Args:
        value: a dict with `image` and/or `text`, or a bare value: a `str` is a text; a `Path`, `bytes`, PIL image or
            array is an image. `image` may be a list of images. `None` and blank text count as absent.
        index (`int`): position of the row, named in errors.

    Raises:
        ValueError: a row with neither image nor text, an empty image list, a text that is not a `str`, or a key that
            looks like one of the two and would be ignored.
    """
    if isinstance(value, str):
        value = {"text": value}
    elif not isinstance(value, dict) or set(value) == {"bytes", "path"}:
        value = {"image": value}
    for key, meant in (("caption", "text"), ("captions", "text"), ("texts", "text"), ("images", "image")):
        if key in value:
            raise ValueError(f"row {index} has the key {key!r}: call it {meant!r}")
    text, images = value.get("text"), value.get("image")
    if text is not None and not isinstance(text, str):
        raise ValueError(f"row {index}: text must be a str, got {type(text).__name__}")
    if isinstance(images, (list, tuple)):
        if len(images) == 0:
            raise ValueError(f"row {index}: the list of images is empty; leave `image` out for a text-only row")
        images = list(images)
    else:
        images = [] if images is None else [images]
    row = Row(text=text if text and text.strip() else None, images=images)
    if not row.kind:
        raise ValueError(f"row {index} has neither an image nor a text: give at least one of `image`, `text`")
    return row


def load_image(value):
    """
    Read an image as RGB, upright by its EXIF orientation.

    Args:
        value: PIL image, path (`str` or `Path`), encoded `bytes`, `(H, W)` or `(H, W, 3 or 4)` uint8 array, or an
            undecoded `datasets` image `{"bytes": ..., "path": ...}`.

    Raises:
        ImageError: naming the file and what is wrong with it.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    name = str(value) if isinstance(value, (str, Path)) else f"image of {type(value).__name__}"
    try:
        if isinstance(value, Image.Image):
            image = value
        elif isinstance(value, (str, Path)):
            if str(value).startswith(("http://", "https://")):
                raise ImageError(f"{name}: images are not downloaded; fetch it first and pass its path or bytes")
            image = Image.open(value)
        elif isinstance(value, (bytes, bytearray)):
            image = Image.open(BytesIO(value))
        elif isinstance(value, np.ndarray):
            if value.dtype != np.uint8:
                raise ImageError(f"{name}: arrays must be uint8 (0..255) and (H, W, C), got {value.dtype}")
            image = Image.fromarray(value)
        else:
            raise ImageError(
                f"cannot read an image from {type(value).__name__}: pass a PIL image, path, bytes or array"
            )
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I;16"):  # convert() would clip: 65535 is white
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ImageError(f"{name}: pixels are 32-bit numbers of unknown range; convert it to 8 bits")
        return image.convert("RGB")
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:  # its message holds a memory address
        raise ImageError(f"{name}: not a readable image (damaged, or of an unknown format)") from error
    except Exception as error:  # decoders of damaged files raise RuntimeError, struct.error, AttributeError, ... too
        raise ImageError(f"{name}: not a readable image ({error})") from error
