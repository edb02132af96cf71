"""GCLProcessor: the backbone's image processor and tokenizer, with the padding its text tower was trained on."""

from PIL import Image
from transformers import AutoProcessor, AutoTokenizer, ProcessorMixin

from .rows import load_image

ORIENTATION = 0x0112  # EXIF's tag; 1 is upright


class GCLProcessor(ProcessorMixin):
    r"""
    Args:
        image_processor: any image processor of transformers.
        tokenizer: any tokenizer of transformers.
        text_padding (`str`, defaults to `"longest"`): `"longest"`, or `"max_length"` for text towers that were trained
            on full-length sequences without a mask (SigLIP).
        max_text_length (`int`, *optional*): longer texts are cut. Default: the tokenizer's `model_max_length`.
    """

    attributes = ["image_processor", "tokenizer"]

    def __init__(self, image_processor=None, tokenizer=None, text_padding="longest", max_text_length=None, **kwargs):
        self.text_padding = text_padding
        self.max_text_length = max_text_length
        super().__init__(image_processor, tokenizer, **kwargs)

    @classmethod
    def from_encoder(cls, encoder, *, revision=None, max_text_length=None):
        r"""
        The processor for a pretrained dual encoder or GCL checkpoint.

        Args:
            encoder (`str` or `Path`): Hub id or folder.
            revision (`str`, *optional*): Hub revision.
            max_text_length (`int`, *optional*): cut texts earlier than the text tower must.

        Raises:
            ValueError: the folder holds no image processor or no tokenizer.
        """
        processor = AutoProcessor.from_pretrained(encoder, revision=revision)
        image_processor = getattr(processor, "image_processor", None)
        tokenizer = getattr(processor, "tokenizer", None) or AutoTokenizer.from_pretrained(encoder, revision=revision)
        if image_processor is None:
            raise ValueError(f"{encoder}: no image processor found beside the weights (preprocessor_config.json)")
        # a tokenizer that makes no mask belongs to a text tower that attends to its padding: its length must be fixed
        fixed_length = "attention_mask" not in tokenizer.model_input_names
        return cls(
            image_processor=image_processor,
            tokenizer=tokenizer,
            text_padding="max_length" if fixed_length else getattr(processor, "text_padding", "longest"),
            max_text_length=max_text_length or getattr(processor, "max_text_length", None),
        )

    def __call__(self, images=None, text=None, **kwargs):
        r"""
        Args:
            images (`list` of PIL images, *optional*): turned upright by their EXIF orientation and made RGB, as in
                `GCLModel.encode`.
            text (`str` or `list[str]`, *optional*).
            **kwargs: as for any processor of transformers; padding and truncation default to this checkpoint's.

        Returns:
            `BatchFeature`: `pixel_values` (and what else the image processor makes), `input_ids`, `attention_mask`.
        """
        if images is not None:
            images = upright(images)
        limit = self.max_text_length or self.tokenizer.model_max_length
        defaults = {"padding": self.text_padding, "truncation": True}
        if limit < 1_000_000:  # tokenizers without a limit state 10^30
            defaults["max_length"] = limit
        given = kwargs.pop("text_kwargs", {})
        text_kwargs = {name: kwargs.pop(name, value) for name, value in defaults.items()} | given
        return super().__call__(images=images, text=text, text_kwargs=text_kwargs, **kwargs)


def upright(images):
    """PIL images, alone or in lists, as `load_image` makes them; what else a processor takes is left as it is."""
    if isinstance(images, (list, tuple)):
        return [upright(image) for image in images]
    if not isinstance(images, Image.Image):
        return images
    ready = images.mode == "RGB" and images.getexif().get(ORIENTATION, 1) == 1
    return images if ready else load_image(images)
