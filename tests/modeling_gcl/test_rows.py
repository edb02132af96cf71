"""Rows as users give them: kinds, instructions, videos, and what is refused."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_gcl import ImageError, load_image
from modeling_gcl.rows import Row, load_images, parse_row
from tests.support.backbones import random_image, tiny_processor

BLANK = st.sampled_from([None, "", "  "])
SOME = st.text(min_size=1).filter(str.strip)


def test_kinds_of_rows():
    assert parse_row("a", 0).kind == "t"
    assert parse_row({"image": b"", "text": "a"}, 0).kind == "it"
    assert parse_row({"bytes": b"x", "path": None}, 0).kind == "i"
    assert parse_row({"video": "x.mp4"}, 0).kind == "i"
    assert parse_row({"video": [b"x"], "text": "a", "image": None}, 0).kind == "it"


def test_a_bare_path_is_a_video_by_its_suffix():
    assert parse_row(Path("x.MP4"), 0) == Row(video=Path("x.MP4"))
    assert parse_row(Path("x.gif"), 0) == Row(images=[Path("x.gif")])
    assert parse_row("x.mp4", 0) == Row(text="x.mp4")


@settings(max_examples=30, deadline=None)
@given(text=SOME, instruction=SOME, blank=BLANK)
def test_the_instruction_goes_before_the_text(text, instruction, blank):
    assert parse_row({"text": text, "instruction": instruction}, 0) == Row(text=instruction + " " + text)
    assert parse_row({"text": text, "instruction": blank}, 0) == parse_row(text, 0)
    both = parse_row({"image": b"x", "text": text, "instruction": instruction}, 0)
    assert both == Row(text=instruction + " " + text, images=[b"x"])
    for key, rest in (("image", {"images": [b"x"]}), ("video", {"video": [b"x"]})):
        alone = parse_row({key: [b"x"], "text": blank, "instruction": instruction}, 0)
        assert alone == Row(text=instruction, **rest) and alone.kind == "it"
        assert parse_row({key: [b"x"], "text": blank, "instruction": blank}, 0).kind == "i"


@pytest.mark.parametrize(
    "value, message",
    [
        ({"instruction": "Find a dog."}, "row 7 has an instruction and nothing else"),
        ({"instruction": "Find a dog.", "text": " "}, "row 7 has an instruction and nothing else"),
        ({"text": "a", "instruction": ["b"]}, "row 7: instruction must be a str, got list"),
        ({"text": "a \ud83d"}, r"row 7: text holds '\\ud83d', half a character"),
        ({"image": b"x", "video": "x.mp4"}, "row 7 has both an image and a video"),
        ({"video": []}, "row 7: the list of frames is empty"),
        ({"image": b"x", "video": []}, "row 7 has both"),
        ({"video": ()}, "row 7: the list of frames is empty"),
        ({"video": b"x"}, "row 7: video must be a path or a list of frames, got bytes"),
        ({"video": np.zeros((2, 4, 4, 3), np.uint8)}, r"row 7: video must be .* got ndarray.*list\(array\)"),
        ({"video": random_image(0)}, "row 7: video must be .* a single picture is an `image`"),
        ({"text": "a", "videos": ["x.mp4"]}, "row 7 has the key 'videos': call it 'video'"),
        ({"text": "a", "frames": [b"x"]}, "row 7 has the key 'frames': call it 'video'"),
        ({"text": "a", "instructions": "b"}, "row 7 has the key 'instructions': call it 'instruction'"),
        ({"text": "a", "images": []}, "row 7 has the key 'images': call it 'image'"),
    ],
)
def test_rows_that_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        parse_row(value, 7)


def test_a_list_of_frames_is_read_whole_and_in_order():
    frames = [np.full((4, 4, 3), n, np.uint8) for n in range(20)]
    row = parse_row({"video": tuple(frames)}, 0)
    assert [np.asarray(image).max() for image in load_images(row, num_frames=3)] == list(range(20))
    assert list(load_images(parse_row("a", 0), num_frames=3)) == []


def test_a_bad_one_of_several_is_named():
    for key, name in (("image", "image"), ("video", "frame")):
        with pytest.raises(ImageError, match=f"^{name} 2: image of bytes: not a readable image"):
            list(load_images(parse_row({key: [random_image(0), random_image(1), b"x"]}, 0), 15))
        with pytest.raises(ImageError, match="^image of bytes: not a readable image"):
            list(load_images(parse_row({key: [b"x"]}, 0), 15))


def test_a_video_for_an_image_is_pointed_out():
    with pytest.raises(ImageError, match="x.mp4: a video, not an image; give it as `video`"):
        load_image("some/x.mp4")
    with pytest.raises(ImageError, match="frame 1: x.MKV: a video"):
        list(load_images(parse_row({"video": [random_image(0), Path("x.MKV")]}, 0), 15))


def test_the_processor_reads_images_as_encode_does(tmp_path):
    """Every door that takes PIL images leads through it."""
    phone = random_image(0).getexif()
    phone[0x0112] = 6  # lies on its side
    random_image(0).save(tmp_path / "phone.jpg", exif=phone)
    images = [Image.open(tmp_path / "phone.jpg"), random_image(1).convert("P"), random_image(2).convert("RGBA")]
    processor = tiny_processor("siglip")
    found = processor(images=images, return_tensors="pt")["pixel_values"]
    expected = processor(images=[load_image(image) for image in images], return_tensors="pt")["pixel_values"]
    assert torch.equal(found, expected)
    lying = processor.image_processor(images[0], return_tensors="pt")["pixel_values"]
    assert (found[:1] - lying).abs().max() > 0.1
    assert torch.equal(processor(images=images[0], return_tensors="pt")["pixel_values"], found[:1])
