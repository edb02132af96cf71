"""Preprocessing on uint8 tensors against the image processors of transformers that it stands in for."""

import io

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.efficientnet.image_processing_pil_efficientnet import EfficientNetImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from modeling_gcl.rows import load_image
from tests.support.backbones import IMAGE_SIZE, tiny_encoder, tiny_processor
from universal_gcl.training.decoding import decode_rgb
from universal_gcl.training.preprocessing import (
    MAX_SHARE_OVER_ONE,
    TensorPreprocessing,
    UnsupportedProcessor,
    choose_preprocessing,
)

PROCESSORS = {
    "clip": CLIPImageProcessorPil(),
    "towers": CLIPImageProcessorPil(  # as universal_gcl.conversion.towers makes it
        size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}, image_mean=[127 / 255] * 3,
        image_std=[128 / 255] * 3,
    ),
    "siglip": SiglipImageProcessorPil(),
    "vit": ViTImageProcessorPil(),
    "deit": DeiTImageProcessorPil(),
    "bilinear": CLIPImageProcessorPil(resample=2),
    "oblong": SiglipImageProcessorPil(size={"height": 50, "width": 121}),
    "odd crop": CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 51, "width": 64}),
    "padded crop": CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size={"height": 75, "width": 80}),
    "rescaled only": CLIPImageProcessorPil(do_normalize=False),
    "normalised only": CLIPImageProcessorPil(do_rescale=False),
}  # fmt: skip
FAST = {name: TensorPreprocessing.from_processor(processor) for name, processor in PROCESSORS.items()}
UNSUPPORTED = {
    "patch_size is 16": Siglip2ImageProcessorPil(),
    "crop_pct is 0.875": ConvNextImageProcessorPil(),
    "include_top is True": EfficientNetImageProcessorPil(),
    "resample is 1": CLIPImageProcessorPil(resample=1),
    "do_resize is False": CLIPImageProcessorPil(do_resize=False),
    "do_pad is True": CLIPImageProcessorPil(do_pad=True),
    "size .*shortest_edge.* without a crop": CLIPImageProcessorPil(do_center_crop=False),
    "size .*longest_edge.* without a crop": CLIPImageProcessorPil(size={"shortest_edge": 50, "longest_edge": 90}),
    "a different form": CLIPImageProcessorPil(do_rescale=False, do_normalize=False),
}


def photo(width, height, seed, smooth):
    """Noise, or something as smooth as the sky."""
    rng = np.random.default_rng(seed)
    if not smooth:
        return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
    return Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height), Image.BICUBIC)


def assert_close(name, image, **bounds):
    """In grey levels before rescaling, and as the model gets them."""
    processor, fast = PROCESSORS[name], FAST[name]
    expected = processor([image], return_tensors="pt")["pixel_values"]
    levels = fast.stack([fast.resize(torch.from_numpy(np.array(image)))])
    raw = processor([image], return_tensors="pt", do_rescale=False, do_normalize=False)["pixel_values"]
    assert levels.dtype == raw.dtype == torch.uint8 and levels.shape == raw.shape
    assert_few_grey_levels((levels.int() - raw.int()).abs(), **bounds)
    found = fast.normalize(levels)
    assert found.dtype == expected.dtype == torch.float32
    # the same pixels give the same floats; others differ by grey levels only
    torch.testing.assert_close(found, expected + (levels.int() - raw.int()) * fast.factor, atol=2e-6, rtol=1e-5)


def assert_few_grey_levels(difference, share_over_one=MAX_SHARE_OVER_ONE, mean=0.1):
    assert difference.max() <= 2
    assert (difference > 1).sum() <= 3 + share_over_one * difference.numel()
    assert difference.double().mean() < mean


@settings(max_examples=120, deadline=None)
@given(st.sampled_from(sorted(PROCESSORS)), st.integers(1, 700), st.integers(1, 700), st.integers(0, 9), st.booleans())
@example("clip", 1, 1, 0, False)
@example("clip", 3, 40, 0, False)
@example("siglip", 40, 1, 0, False)
@example("oblong", 2, 201, 0, False)
@example("clip", 224, 224, 0, False)
@example("clip", 375, 500, 0, False)
@example("clip", 500, 375, 0, True)
@example("towers", 160, 160, 0, False)
@example("towers", 256, 256, 0, True)
@example("clip", 320, 320, 0, True)
@example("vit", 64, 64, 0, False)
@example("towers", 4000, 3000, 0, False)
@example("siglip", 3000, 4000, 0, True)
def test_every_size_gives_the_processors_pixels(name, width, height, seed, smooth):
    if max(width, height) > 30 * min(width, height) and FAST[name].size is None:
        height = width  # a strip of pixels whose short side is enlarged to 224 fills the memory, here as there
    assert_close(name, photo(width, height, seed, smooth))


@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("size", [(500, 375), (375, 500), (640, 480), (1024, 683), (4000, 3000)])
@pytest.mark.parametrize("name", ["clip", "towers", "bilinear"])
def test_photos_of_common_sizes_are_within_one_grey_level_but_for_a_few_values(name, size, smooth):
    assert_close(name, photo(*size, 0, smooth), share_over_one=1e-5, mean=0.01)


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["clip", "towers", "siglip", "vit"]),
    st.integers(20, 600),
    st.integers(20, 600),
    st.integers(60, 95),
    st.booleans(),
    st.sampled_from(["RGB", "L", "CMYK"]),
    st.sampled_from([1, 3, 6]),
)
def test_jpeg_files_give_the_processors_pixel_values(name, width, height, quality, smooth, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    stream = io.BytesIO()
    photo(width, height, quality, smooth).convert(mode).save(stream, "JPEG", quality=quality, exif=exif)
    fast = FAST[name]
    found = fast.normalize(fast.stack([fast.resize(decode_rgb(stream.getvalue()))]))
    expected = PROCESSORS[name]([load_image(stream.getvalue())], return_tensors="pt")["pixel_values"]
    assert_few_grey_levels(((found - expected) / fast.factor).abs().round())


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_processors_that_are_not_known_do_their_own_work(reason):
    with pytest.raises(UnsupportedProcessor, match=reason):
        TensorPreprocessing.from_processor(UNSUPPORTED[reason])
    preprocessing, description = choose_preprocessing(UNSUPPORTED[reason])
    assert preprocessing is None
    assert description.startswith(f"{type(UNSUPPORTED[reason]).__name__} itself, on PIL images (no fast path: ")


@pytest.mark.parametrize("override", ["resize", "center_crop", "rescale", "normalize", "_preprocess"])
def test_a_subclass_that_computes_otherwise_is_found_out(override):
    class Other(CLIPImageProcessorPil):
        pass

    def resize(self, image, size, resample=None, **kwargs):
        return CLIPImageProcessorPil.resize(self, image, size, resample=5, **kwargs)

    def center_crop(self, image, size, **kwargs):
        return image[:, : size.height, : size.width]

    def rescale(self, image, scale, **kwargs):
        return CLIPImageProcessorPil.rescale(self, image, scale) - 0.5

    def normalize(self, image, mean, std, **kwargs):
        return CLIPImageProcessorPil.normalize(self, image, mean[::-1], std)

    def _preprocess(self, images, **kwargs):
        return CLIPImageProcessorPil._preprocess(self, images, **kwargs) | {"pixel_mask": torch.ones(len(images))}

    setattr(Other, override, locals()[override])
    with pytest.raises(UnsupportedProcessor):
        TensorPreprocessing.from_processor(Other())


def test_a_single_value_that_differs_much_is_found_out():
    class Other(CLIPImageProcessorPil):
        def normalize(self, image, mean, std, **kwargs):
            pixels = super().normalize(image, mean, std, **kwargs)
            pixels[0, 0, 0] += 0.2
            return pixels

    with pytest.raises(UnsupportedProcessor, match="by up to 1[0-9] grey levels"):
        TensorPreprocessing.from_processor(Other())


def test_the_description_names_decoder_and_processor():
    _, description = choose_preprocessing(PROCESSORS["clip"])
    assert description.endswith("torch on uint8, within 2 grey levels of CLIPImageProcessorPil")
    assert description.startswith(("simplejpeg 1", "PIL and"))


def test_the_tiny_processors_of_these_tests_are_known():
    for name, known in {"clip": True, "vision-text-dual-encoder": True, "siglip": True, "siglip2": False}.items():
        preprocessing, _ = choose_preprocessing(tiny_processor(name).image_processor)
        assert (preprocessing is not None) == known


def test_resize_takes_views_and_stack_is_channels_last():
    fast = FAST["clip"]
    image = torch.from_numpy(np.array(photo(90, 70, 0, False)))
    view = image[5:60, 7:80].flip(1)
    resized = fast.resize(view)
    assert torch.equal(resized, fast.resize(view.clone()))
    assert resized.shape == (224, 224, 3)
    batch = fast.stack([resized, resized])
    assert batch.shape == (2, 3, 224, 224) and batch.is_contiguous(memory_format=torch.channels_last)
    assert fast.normalize(batch).is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch[1].permute(1, 2, 0), resized)


def test_a_model_with_the_hook_takes_uint8_and_leaves_floats_alone():
    fast = TensorPreprocessing.from_processor(tiny_processor("clip").image_processor)
    model = tiny_encoder("clip")
    pixels = torch.randint(0, 256, (2, 3, IMAGE_SIZE, IMAGE_SIZE), dtype=torch.uint8)
    inputs = {"input_ids": torch.tensor([[2, 7, 3], [2, 8, 3]]), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with torch.no_grad():
        expected = model(pixel_values=fast.normalize(pixels), **inputs).image_embeds
        model.register_forward_pre_hook(fast.normalize_input, with_kwargs=True)
        assert torch.equal(model(pixel_values=pixels, **inputs).image_embeds, expected)
        assert torch.equal(model(pixel_values=fast.normalize(pixels), **inputs).image_embeds, expected)
