"""GCLProcessor: the backbone's image processor and tokenizer, with the padding that its text tower was trained on."""

from os import PathLike
from typing import Any, Self

from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, BatchFeature, ProcessorMixin

from .rows import load_image

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


class GCLProcessor(ProcessorMixin):
    r"""
    Prepares images and texts for a [`GCLModel`].

    Args:
        image_processor: any image processor of transformers.
        tokenizer: any tokenizer of transformers.
        text_padding (`str`, defaults to `"longest"`): `"longest"` pads to the longest text of the batch. `"max_length"`
            pads to full length, for text towers that were trained without a mask (SigLIP).
        max_text_length (`int`, *optional*): longer texts are cut. Default: the tokenizer's `model_max_length`.
    """

    attributes = ["image_processor", "tokenizer"]

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        text_padding: str = "longest",
        max_text_length: int | None = None,
        **kwargs: Any,
    ) -> None:
        self.text_padding = text_padding
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer, **kwargs)

    @property
    def max_tokens(self) -> int | None:
        """Number of tokens to which texts are cut; None if there is no limit."""
        limit = self.max_text_length or self.tokenizer.model_max_length
        return limit if limit < 1_000_000 else None  # tokenizers without a limit state 10^30

    @classmethod
    def from_encoder(
        cls, encoder: str | PathLike, *, revision: str | None = None, max_text_length: int | None = None
    ) -> Self:
        r"""
        The processor of a pretrained dual encoder or a GCL checkpoint.

        Args:
            encoder (`str` or `Path`): Hub id or folder.
            revision (`str`, *optional*): Hub revision.
            max_text_length (`int`, *optional*): cut texts to fewer tokens than the text tower allows.

        Raises:
            ValueError: there is no image processor or no tokenizer.
        """
        processor = AutoProcessor.from_pretrained(encoder, revision=revision)
        image_processor = getattr(processor, "image_processor", None)
        tokenizer = getattr(processor, "tokenizer", None) or AutoTokenizer.from_pretrained(encoder, revision=revision)
        if image_processor is None:
            raise ValueError(f"{encoder}: no image processor found with the weights (preprocessor_config.json)")
        # a tokenizer without a mask belongs to a text tower that attends to padding, so the length must be fixed
        fixed_length = "attention_mask" not in tokenizer.model_input_names
        return cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            text_padding="max_length" if fixed_length else getattr(processor, "text_padding", "longest"),
            max_text_length=max_text_length or getattr(processor, "max_text_length", None),
        )

    def __call__(self, images: Any = None, text: str | list[str] | None = None, **kwargs: Any) -> BatchFeature:
        r"""
        Args:
            images (`list` of PIL images, *optional*): they are turned upright by their EXIF orientation and converted
                to RGB, as in `GCLModel.encode`.
            text (`str` or `list[str]`, *optional*).
            **kwargs: arguments of transformers' processors. Padding and truncation default to this checkpoint's.

        Returns:
            `BatchFeature`: `pixel_values` and any other outputs of the image processor, `input_ids`, `attention_mask`.
        """
        if images is not None:
            images = upright(images)
        defaults = {"padding": self.text_padding, "truncation": True}
        if self.max_tokens is not None:
            defaults["max_length"] = self.max_tokens
        given = kwargs.pop("text_kwargs", {})
        text_kwargs = {name: kwargs.pop(name, value) for name, value in defaults.items()} | given
        return super().__call__(images=images, text=text, text_kwargs=text_kwargs, **kwargs)


def upright(images: Any) -> Any:
    """Convert PIL images, single or in lists, as `load_image` does. Other inputs are returned unchanged."""
    if isinstance(images, (list, tuple)):
        return [upright(image) for image in images]
    if not isinstance(images, Image.Image):
        return images
    ready = images.mode == "RGB" and images.getexif().get(ORIENTATION, 1) == 1
    return images if ready else load_image(images)
