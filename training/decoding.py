"""Decoding images to RGB: with simplejpeg where it is installed and known to give PIL's pixels, else with PIL."""

from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image

from modeling_gcl.rows import load_image

try:
    import simplejpeg
except ImportError:  # optional: the extra `fast`
    simplejpeg = None


def decoder_name() -> str:
    """The name of the library that decodes JPEG files here, for logs and records."""
    return "PIL" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"


def decode_rgb(value: Any) -> torch.Tensor:
    """The same pixels as `load_image(value)`, often faster.

    simplejpeg decodes upright RGB and grey JPEG files (judging by the header, which PIL reads), if it accepts them
    without a warning. PIL decodes everything else: other formats, CMYK, images that their EXIF orientation turns,
    damaged files.

    Args:
        value: anything that `load_image` takes.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: see `load_image`. The message names the file and what is wrong with it.
    """
    if simplejpeg is not None:
        try:
            data = _encoded(value)
            if data is not None and _is_plain_jpeg(data):
                # PIL uses the accurate DCT and upsampling; the fast ones differ visibly
                pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
                return torch.from_numpy(pixels)
        except Exception:  # noqa: S110  on damaged files decoders raise anything; load_image then says what is wrong
            pass
    return torch.from_numpy(np.array(load_image(value)))


def _encoded(value: Any) -> bytes | bytearray | None:
    """The bytes of the file that `load_image` would read; None for images that are already decoded."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, Path)):
        return Path(value).read_bytes()
    return value if isinstance(value, (bytes, bytearray)) else None


def _is_plain_jpeg(data: bytes | bytearray) -> bool:
    if not data.startswith(b"\xff\xd8"):
        return False
    with Image.open(BytesIO(data)) as header:  # reads no pixels
        # MPO is a JPEG file followed by more images; phones write it
        return (
            header.format in ("JPEG", "MPO")
            and header.mode in ("RGB", "L")
            and header.getexif().get(ExifTags.Base.Orientation, 1) == 1
        )
