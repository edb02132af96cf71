"""Rows as users give them: what counts as an image, a video, a text or several, and how an image is read."""

from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path, PurePath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .video import VIDEO_SUFFIXES, load_video_frames

KEYS = {  # misspelt key → the one that was meant
    "caption": "text", "captions": "text", "texts": "text", "images": "image", "videos": "video", "frames": "video",
    "instructions": "instruction",
}  # fmt: skip


class ImageError(ValueError):
    """An image that is missing, corrupt or of a type that cannot be read."""


@dataclass
class Row:
    """One row: `text`, its instruction before it (or None), and either unread `images` or a `video` (or neither), which
    is a path or a list of unread frames; `kind` is `"i"`, `"t"` or `"it"`: a video is embedded as its frames."""

    text: str | None = None
    images: list = field(default_factory=list)
    video: str | PurePath | list | None = None

    @property
    def kind(self):
        return ("i" if self.images or self.video is not None else "") + ("t" if self.text is not None else "")


def parse_row(value, index):
    """
    Normalise one user row.

    Args:
        value: a dict with any of `image` (one, or a list), `video` (a path, or a list of images that are its frames),
            `text` and `instruction`; or a bare value: a `str` is a text; a `Path` with the suffix of a video is a
            video; another `Path`, `bytes`, PIL image or array is an image. `None` and blank text count as absent. The
            instruction goes before the text, with a space between, as in M-BEIR (UniIR, arXiv 2311.17136); with images
            and no text it is the text, as in MMEB (arXiv 2410.05160).
        index (`int`): position of the row, named in errors.

    Raises:
        ValueError: a row with nothing to embed (an instruction alone is none), with both image and video, with an empty
            list, with a text or instruction that is not a `str` or holds half a surrogate pair, with a video of another
            type, or with a key that looks like one of these and would be ignored.
    """
    if isinstance(value, str):
        value = {"text": value}
    elif isinstance(value, PurePath) and value.suffix.lower() in VIDEO_SUFFIXES:
        value = {"video": value}
    elif not isinstance(value, dict) or set(value) == {"bytes", "path"}:
        value = {"image": value}
    for key, meant in KEYS.items():
        if key in value:
            raise ValueError(f"row {index} has the key {key!r}: call it {meant!r}")
    images, video = value.get("image"), value.get("video")
    text, instruction = (_text(value, key, index) for key in ("text", "instruction"))
    if images is not None and video is not None:
        raise ValueError(f"row {index} has both an image and a video: give one of them")
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
            raise ValueError(f"row {index} has an instruction and nothing it is for: give `image`, `video` or `text`")
        raise ValueError(f"row {index} has neither an image nor a text: give at least one of `image`, `video`, `text`")
    if instruction is not None:
        row.text = instruction if text is None else f"{instruction} {text}"
    return row


def _text(value, key, index):
    """The row's `key`, or None where it is absent or blank."""
    text = value.get(key)
    if text is not None and not isinstance(text, str):
        raise ValueError(f"row {index}: {key} must be a str, got {type(text).__name__}")
    try:
        (text or "").encode()
    except UnicodeEncodeError as error:  # a cut `\\ud83d\\ude00` of JSON leaves it; tokenizers stop at it
        raise ValueError(f"row {index}: {key} holds {text[error.start]!r}, half a character; correct it") from error
    return text if text and text.strip() else None


def load_images(row, num_frames):
    """
    Read the images of a row, one by one: its images, or the frames of its video; a text row has none.

    Args:
        row (`Row`): as `parse_row` returns it.
        num_frames (`int`): how many frames of a video file; of a list of frames, all are read.

    Yields:
        PIL images, RGB.

    Raises:
        ImageError: as `load_image`, and which of several.
        VideoError: as `load_video_frames`.
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
