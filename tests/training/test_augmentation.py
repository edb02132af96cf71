"""Crop and flip: sizes, contents and determinism."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from universal_gcl.training.augmentation import augment


def gradient(width, height):
    """An image whose red channel is the column and whose green channel is the row."""
    columns, rows = np.meshgrid(np.arange(width), np.arange(height))
    return Image.fromarray(np.stack([columns, rows, columns * 0], -1).astype(np.uint8))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 200), st.integers(1, 200), st.floats(0.01, 1), st.floats(0.01, 1), st.integers(0, 10**9))
def test_crop_is_a_part_of_the_image_with_the_share_asked_for(width, height, one, other, seed):
    low, high = sorted((one, other))
    crop = np.asarray(augment(gradient(width, height), np.random.default_rng(seed), (low, high), False))
    left, top = int(crop[0, 0, 0]), int(crop[0, 0, 1])
    cropped_height, cropped_width = crop.shape[:2]
    whole = np.asarray(gradient(width, height))
    np.testing.assert_array_equal(crop, whole[top : top + cropped_height, left : left + cropped_width])
    # a side is rounded to whole pixels, and is 1 at least
    assert (cropped_width + 0.5) * (cropped_height + 0.5) >= low * width * height * 0.999
    smallest = max(cropped_width - 0.5, 0), max(cropped_height - 0.5, 0)
    if min(cropped_width, cropped_height) > 1:
        assert smallest[0] * smallest[1] <= high * width * height * 1.001
        assert smallest[0] / (cropped_height + 0.5) <= 4 / 3 * width / height * 1.001


def test_crops_reach_all_four_borders():
    crops = [np.asarray(augment(gradient(20, 30), np.random.default_rng(s), (0.8, 0.9), False)) for s in range(60)]
    assert {crop[0, 0, 0] == 0 for crop in crops} == {True, False}
    assert {crop[-1, -1, 0] == 19 for crop in crops} == {True, False}
    assert {crop[0, 0, 1] == 0 for crop in crops} == {True, False}
    assert {crop[-1, -1, 1] == 29 for crop in crops} == {True, False}


def test_flip_mirrors_about_half_and_leaves_the_crop_alone():
    image = gradient(20, 30)
    mirrored = 0
    for seed in range(200):
        plain = np.asarray(augment(image, np.random.default_rng(seed), (0.5, 0.9), False))
        flipped = np.asarray(augment(image, np.random.default_rng(seed), (0.5, 0.9), True))
        if not np.array_equal(plain, flipped):
            np.testing.assert_array_equal(flipped, plain[:, ::-1])
            mirrored += 1
    assert 70 <= mirrored <= 130


def test_nothing_asked_nothing_done():
    image = gradient(20, 30)
    assert augment(image, np.random.default_rng(0), None, False) is image


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(0, 10**9), st.booleans(), st.sampled_from([None, (0.3, 1)]))
def test_tensors_are_cropped_and_mirrored_as_images(width, height, seed, flip, crop_scale):
    image = gradient(width, height)
    pixels = torch.from_numpy(np.array(image))
    expected = augment(image, np.random.default_rng(seed), crop_scale, flip)
    found = augment(pixels, np.random.default_rng(seed), crop_scale, flip)
    np.testing.assert_array_equal(found.numpy(), np.asarray(expected))
    if not flip:
        assert found.untyped_storage().data_ptr() == pixels.untyped_storage().data_ptr()  # no copy
