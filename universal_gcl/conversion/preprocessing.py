"""Tokenizers and image processors for converted models."""

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD, PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil


def load_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a folder or the Hub.

    Raises:
        ValueError: it can't be loaded; the message says which option names another one.
    """
    try:
        return AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"the tokenizer {str(source)!r} can't be loaded ({str(error).splitlines()[0]}). Download it and pass its "
            "folder: --tokenizer FOLDER"
        ) from error


def square_image_processor(
    side: int,
    *,
    crop: bool = True,
    mean: Sequence[float] = OPENAI_CLIP_MEAN,
    std: Sequence[float] = OPENAI_CLIP_STD,
    resample: PILImageResampling = PILImageResampling.BICUBIC,
) -> CLIPImageProcessorPil:
    """An image processor that gives normalised (3, side, side) pixels.

    When an odd number of pixels is cropped, transformers' PIL backend may start one pixel before torchvision.

    Args:
        side: height and width of the output in pixels.
        crop: resize the shortest side to `side` and crop the centre; otherwise resize both sides, which distorts.
        mean, std: per channel, for pixel values in 0 … 1.
        resample: interpolation of the resize.
    """
    square = {"height": side, "width": side}
    return CLIPImageProcessorPil(
        size={"shortest_edge": side} if crop else square,
        crop_size=square,
        do_center_crop=crop,
        resample=resample,
        image_mean=list(mean),
        image_std=list(std),
    )
