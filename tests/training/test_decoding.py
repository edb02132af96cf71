"""Decoding against `load_image`: equal pixels for every kind of file, the same error for those that can't be read."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from modeling_gcl.rows import ImageError, load_image
from universal_gcl.training import decoding
from universal_gcl.training.decoding import decode_rgb, decoder_name

simplejpeg = pytest.importorskip("simplejpeg")


def pixels(width, height, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)


def encoded(image, format="JPEG", **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def rgb(width=37, height=23, seed=0):
    return Image.fromarray(pixels(width, height, seed=seed))


def oriented(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(rgb(), exif=exif)


XMP = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><a tiff:Orientation="6"/></x:xmpmeta>'
FILES = {
    "plain": encoded(rgb()),
    "one pixel": encoded(rgb(1, 1)),
    "grey": encoded(rgb().convert("L")),
    "cmyk": encoded(rgb().convert("CMYK")),
    "progressive": encoded(rgb(), progressive=True),
    "rgb colours": encoded(rgb(), keep_rgb=True),
    "full chroma": encoded(rgb(), subsampling=0),
    "half chroma": encoded(rgb(), subsampling=1),
    "restart markers": encoded(rgb(), restart_marker_blocks=2),
    "profile": encoded(rgb(), icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()),
    "xmp orientation": encoded(rgb(), xmp=XMP),
    "several images": encoded(rgb(), "MPO", save_all=True, append_images=[rgb(seed=1)]),
    "rubbish behind": encoded(rgb()) + b"rubbish",
    **{f"orientation {number}": oriented(number) for number in range(1, 9)},
    "png": encoded(rgb(), "PNG"),
    "png with alpha": encoded(Image.fromarray(pixels(9, 8, 4)), "PNG"),
    "palette": encoded(rgb().convert("P"), "GIF"),
    "webp": encoded(rgb(), "WEBP"),
}
# what simplejpeg must be left out of: it can't turn, and has other ideas of CMYK
LEFT_TO_PIL = {"cmyk", "xmp orientation", "png", "png with alpha", "palette", "webp"}
LEFT_TO_PIL |= {f"orientation {number}" for number in range(2, 9)}


def assert_equal(value):
    found = decode_rgb(value)
    assert found.dtype == torch.uint8
    np.testing.assert_array_equal(found.numpy(), np.asarray(load_image(value)))


@pytest.mark.parametrize("kind", FILES)
def test_every_kind_of_file_gives_pils_pixels(kind, monkeypatch):
    calls = []
    decode = simplejpeg.decode_jpeg
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *args, **kwargs: calls.append(1) or decode(*args, **kwargs))
    assert_equal(FILES[kind])
    assert bool(calls) == (kind not in LEFT_TO_PIL)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 90),
    st.integers(1, 90),
    st.integers(1, 100),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
    st.booleans(),
    st.booleans(),
)
def test_jpegs_of_every_size_and_quality_give_pils_pixels(width, height, quality, chroma, progressive, grey, smooth):
    image = rgb(width, height, seed=quality)
    if smooth:
        image = rgb(3, 3, seed=quality).resize((width, height))
    if grey:
        image = image.convert("L")
    assert_equal(encoded(image, quality=quality, subsampling=chroma, progressive=progressive))


@pytest.mark.parametrize("jpeg", [True, False])
def test_everything_that_load_image_takes(jpeg, tmp_path):
    data = FILES["plain" if jpeg else "png"]
    path = tmp_path / "image"
    path.write_bytes(data)
    values = [data, bytearray(data), path, str(path), load_image(path), np.asarray(load_image(path))]
    values += [{"bytes": data, "path": None}, {"bytes": data, "path": "gone.jpg"}, {"bytes": None, "path": str(path)}]
    for value in values:
        assert_equal(value)


def damaged_files():
    good = FILES["plain"]
    middle = len(good) // 2
    yield from (good[:end] for end in (2, 3, 20, middle, len(good) - 2, len(good) - 1))
    yield good[:middle] + bytes(40) + good[middle + 40 :]
    yield good[:middle] + b"\xff\xd9" + good[middle + 2 :]
    yield FILES["progressive"][: len(FILES["progressive"]) // 2]
    yield FILES["png"][:-30]
    yield b""
    yield b"not an image"
    yield b"\xff\xd8\xff\xd9"
    yield good.replace(b"\xff\xc0", b"\xff\xc9", 1)  # arithmetic coding, which the header alone announces


@pytest.mark.parametrize("number", range(len(list(damaged_files()))))
def test_damaged_files_fail_as_in_load_image_or_give_its_pixels(number, tmp_path):
    path = tmp_path / f"damaged {number}.jpg"
    path.write_bytes(list(damaged_files())[number])
    for value in (path, path.read_bytes()):
        try:
            load_image(value)
        except ImageError as error:
            with pytest.raises(ImageError) as found:
                decode_rgb(value)
            assert str(found.value) == str(error)
            assert not isinstance(value, bytes) and str(path) in str(error) or isinstance(value, bytes)
        else:
            assert_equal(value)


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 255), st.sampled_from(["plain", "progressive", "grey", "profile"]))
def test_a_changed_byte_never_gives_other_pixels_than_pil(place, byte, kind):
    data = bytearray(FILES[kind])
    data[2 + place % (len(data) - 2)] = byte
    try:
        load_image(bytes(data))
    except ImageError:
        with pytest.raises(ImageError):
            decode_rgb(bytes(data))
    else:
        assert_equal(bytes(data))


def test_missing_files_and_what_is_no_image(tmp_path):
    for value in (str(tmp_path / "gone.jpg"), "https://example.org/a.jpg", tmp_path, 3, np.zeros((2, 2)), {}):
        with pytest.raises(ImageError) as expected:
            load_image(value)
        with pytest.raises(ImageError) as found:
            decode_rgb(value)
        assert str(found.value) == str(expected.value)


def test_pixel_bombs_are_refused_as_by_pil(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ImageError, match="decompression bomb"):
        decode_rgb(FILES["plain"])


def test_without_simplejpeg_pil_decodes(monkeypatch):
    assert decoder_name() == f"simplejpeg {simplejpeg.__version__}"
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert decoder_name() == "PIL"
    assert_equal(FILES["plain"])
