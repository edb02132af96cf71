"""Rows as users give them: which values are images, videos and texts, and how images are read."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .video import VIDEO_SUFFIXES, load_video_frames

MISSPELT_KEYS = {  # misspelt key → the right one
    "caption": "text", "captions": "text", "texts": "text", "images": "image", "videos": "video", "frames": "video",
    "instructions": "instruction",
}  # fmt: skip


class ImageError(ValueError):
    """An image is missing or damaged, or its type can't be read."""


@dataclass
class Row:
    """
    A parsed row.

    Args:
        text (`str`, *optional*): the instruction and the text.
        images (`list`): images, not yet read.
        video (*optional*): a path, or a list of frames that are not yet read. A row has images or a video, not both.
    """

    text: str | None = None
    images: list = field(default_factory=list)
    video: str | PurePath | list | None = None

    @property
    def kind(self) -> str:
        """`"i"`, `"t"` or `"it"`. A video counts as an image, because its frames are embedded."""
        return ("i" if self.images or self.video is not None else "") + ("t" if self.text is not None else "")


def parse_row(value: Any, index: int) -> Row:
    """
    Parse a row as a user gives it; see `GCLModel.encode`.

    Args:
        value: a `dict` with any of `image` (one or a list), `video` (a path, or a list of images, the frames), `text`
            and `instruction`; or a bare value: a `str` is a text, a `Path` that ends like a video file is a video, and
            another `Path`, `bytes`, a PIL image or an array is an image. None and blank text count as absent. The
            instruction is put before the text, with a space, as in M-BEIR (UniIR, arXiv 2311.17136). If there are
            images and no text, it is the text, as in MMEB (arXiv 2410.05160).
        index (`int`): position of the row, for error messages.

    Raises:
        ValueError: the row has nothing to embed (an instruction alone does not count), both an image and a video, an
            empty list, a text or instruction that is not a `str` or contains half a surrogate pair, a video of another
            type, or a misspelt key.
    """
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, PurePath) and value.suffix.lower() in VIDEO_SUFFIXES:
        value = {"video": value}
    elif not isinstance(value, dict) or set(value) == {"bytes", "path"}:
        value = {"image": value}
    for key, meant in MISSPELT_KEYS.items():
        if key in value:
            raise ValueError(f"row {index} has the key {key!r}: call it {meant!r}")
    images, video = value.get("image"), value.get("video")
    text, instruction = (_text(value, key, index) for key in ("text", "instruction"))
    if images is not None and video is not None:
        raise ValueError(f"row {index} has both an image and a video: give only one of them")
    for key, several in (("images", images), ("frames", video)):
        if isinstance(several, (list, tuple)) and len(several) == 0:
            raise ValueError(f"row {index}: the list of {key} is empty; leave it out for a text-only row")
    if isinstance(video, tuple):
        video = list(video)
    if video is not None and not isinstance(video, (str, PurePath, list)):
        raise ValueError(
            f"row {index}: video must be a path or a list of frames, got {type(video).__name__}; "
            "a single picture is an `image`, an array of frames is list(array)"
        )
    if images is None:
        images = []
    row = Row(text, list(images) if isinstance(images, (list, tuple)) else [images], video)
    if not row.kind:
        if instruction is not None:
            raise ValueError(f"row {index} has an instruction and nothing else: give `image`, `video` or `text` too")
        raise ValueError(f"row {index} has neither an image nor a text: give at least one of `image`, `video`, `text`")
    if instruction is not None:
        row.text = instruction if text is None else f"{instruction} {text}"
    return row


def _text(value, key, index):
    """The value of `key`, or None if it is absent or blank."""
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"row {index}: {key} must be a str, got {type(text).__name__}")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # from a JSON escape `\\ud83d\\ude00` that was cut; tokenizers fail on it
        raise ValueError(f"row {index}: {key} holds {text[error.start]!r}, half a character; correct it") from error
    return text if text and text.strip() else None


def load_images(row: Row, num_frames: int) -> Iterator[Image.Image]:
    """
    Read the images of a row, or the frames of its video, one at a time.

    Args:
        row (`Row`): as `parse_row` returns it.
        num_frames (`int`): number of frames to read from a video file. A list of frames is read in full.

    Yields:
        RGB PIL images.

    Raises:
        ImageError: see `load_image`. If there are several images, the message says which one.
        VideoError: see `load_video_frames`.
    """
    if isinstance(row.video, (str, PurePath)):
        yield from load_video_frames(row.video, num_frames)
        return
    images, name = (row.images, "image") if row.video is None else (row.video, "frame")
    for n, image in enumerate(images):
        try:
            yield load_image(image)
        except ImageError as error:
            if len(images) == 1:
                raise
            raise ImageError(f"{name} {n}: {error}") from error


def load_image(value: Any) -> Image.Image:
    """
    Read an image, convert it to RGB, and turn it upright by its EXIF orientation.

    Args:
        value: a PIL image, a path (`str` or `Path`), encoded `bytes`, a uint8 array of shape `(H, W)`, `(H, W, 3)` or
            `(H, W, 4)`, or an undecoded image of `datasets`, `{"bytes": ..., "path": ...}`.

    Raises:
        ImageError: the image can't be read. The message names the file and what is wrong.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    name = str(value) if isinstance(value, (str, Path)) else f"image of {type(value).__name__}"
    try:
        if isinstance(value, Image.Image):
            image = value
        elif isinstance(value, (str, Path)):
            if str(value).startswith(("http://", "https://")):
                raise ImageError(f"{name}: images are not downloaded; download it first and pass its path or bytes")
            if name.lower().endswith(VIDEO_SUFFIXES):
                raise ImageError(f"{name}: a video, not an image; give it as `video`")
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
        if image.mode.startswith("I;16"):  # white is 65535; convert() would clip all values over 255
            image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
        elif image.mode in ("I", "F"):
            raise ImageError(f"{name}: pixels are 32-bit numbers of unknown range; convert it to 8 bits")
        return image.convert("RGB")
    except ImageError:
        raise
    except FileNotFoundError as error:
        raise ImageError(f"{name}: no such file") from error
    except UnidentifiedImageError as error:  # its message contains a memory address
        raise ImageError(f"{name}: not a readable image (damaged, or in an unknown format)") from error
    except Exception as error:  # for damaged files, decoders raise RuntimeError, struct.error, AttributeError, ...
        raise ImageError(f"{name}: not a readable image ({error})") from error
