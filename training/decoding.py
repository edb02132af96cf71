"""Encoded images → RGB pixels: through simplejpeg where it is installed and known to give PIL's pixels, else PIL."""

from io import BytesIO
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image

from modeling_gcl.rows import load_image

try:
    import simplejpeg
except ImportError:  # optional: the extra `fast`
    simplejpeg = None


def decoder_name() -> str:
    """What decodes JPEG files here, for logs and records."""
    return "PIL" if simplejpeg is None else f"simplejpeg {simplejpeg.__version__}"


def decode_rgb(value) -> torch.Tensor:
    """The pixels of `load_image(value)`, which decides in every doubtful case.

    simplejpeg decodes what PIL's header reading finds to be an upright RGB or grey JPEG and what it accepts without a
    warning. Other formats, CMYK, images to be turned by their EXIF orientation and damaged files are left to PIL.

    Args:
        value: as for `load_image`.

    Returns:
        (H, W, 3) uint8.

    Raises:
        ImageError: as `load_image`, naming the file and what is wrong with it.
    """
    if simplejpeg is not None:
        try:
            data = _encoded(value)
            if data is not None and _is_plain_jpeg(data):
                # the accurate DCT and upsampling are PIL's; the fast ones differ visibly
                pixels = simplejpeg.decode_jpeg(data, "RGB", fastdct=False, fastupsample=False, strict=True)
                return torch.from_numpy(pixels)
        except Exception:  # noqa: S110  decoders of damaged files raise anything; load_image says what is wrong
            pass
    return torch.from_numpy(np.array(load_image(value)))


def _encoded(value) -> bytes | None:
    """The bytes of the file that `load_image` would read; None for images that are decoded already."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (str, Path)):
        return Path(value).read_bytes()
    return value if isinstance(value, (bytes, bytearray)) else None


def _is_plain_jpeg(data: bytes) -> bool:
    if not data.startswith(b"\xff\xd8"):
        return False
    with Image.open(BytesIO(data)) as header:  # reads no pixels
        # MPO: a JPEG with further images behind the first, as phones write it
        return (
            header.format in ("JPEG", "MPO")
            and header.mode in ("RGB", "L")
            and header.getexif().get(ExifTags.Base.Orientation, 1) == 1
        )
