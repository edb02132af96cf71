"""encode(): rows of every form, order, padding, batch size, and bad rows."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from backbones import random_image, tiny_encoder, tiny_processor
from PIL import Image

from modeling_gcl import GCLModel, ImageError, load_image
from modeling_gcl.rows_gcl import parse_row

TEXTS = ["a red dog runs on the grass", "the cat", "one bird flies in the blue sky", "a house"]


@pytest.fixture(scope="module", params=["clip", "siglip", "siglip2", "vision-text-dual-encoder"])
def door(request):
    model = GCLModel.from_encoder(tiny_encoder(request.param), fusion="normalized_sum")
    return model, tiny_processor(request.param)


@pytest.fixture
def clip():
    return GCLModel.from_encoder(tiny_encoder("clip")), tiny_processor("clip")


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def mixed_rows():
    rows = [{"image": random_image(i)} for i in range(3)] + list(TEXTS)
    rows += [{"image": random_image(i), "text": text} for i, text in enumerate(TEXTS)]
    return rows


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_each_row_as_if_alone_whatever_the_order_and_batch(door, batch_size):
    model, processor = door
    rows = mixed_rows()
    permutation = np.random.default_rng(batch_size).permutation(len(rows))
    together = model.encode([rows[i] for i in permutation], processor=processor, batch_size=batch_size)
    assert together.shape == (len(rows), model.config.projection_dim)
    assert together.dtype == torch.float32 and together.device.type == "cpu"
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(rows)))
    for position, i in enumerate(permutation):
        alone = model.encode([rows[i]], processor=processor)
        torch.testing.assert_close(together[position], alone[0], atol=1e-5, rtol=0)


def test_texts_are_batched_by_their_tokens(clip):
    model, processor = clip
    widths = []

    class Spy:
        tokenizer = processor.tokenizer

        def __call__(self, **kwargs):
            batch = processor(**kwargs)
            widths.append(batch["input_ids"].shape[1])
            return batch

    # 10, 11, 12 and 13 characters: in that order few tokens would be padded to many
    rows = ["grasshouse", "a a a a a a", "grasseshouse", "a a a a a a a"]
    model.encode(rows, processor=Spy(), batch_size=2)
    assert sorted(widths) == [3, 9]


def test_every_form_of_an_image_is_the_same_row(clip, tmp_path):
    model, processor = clip
    image = random_image(5)
    image.save(tmp_path / "x.png")
    forms = [
        image,
        tmp_path / "x.png",
        png_bytes(image),
        np.asarray(image),
        {"image": str(tmp_path / "x.png")},
        {"image": {"bytes": png_bytes(image), "path": None}},
        {"image": [image], "text": "  "},
        {"image": image, "text": None, "id": 7},
    ]
    embeds = model.encode(forms, processor=processor)
    for row in embeds[1:]:
        torch.testing.assert_close(row, embeds[0], atol=1e-6, rtol=0)


def test_several_images_are_the_normalised_mean(clip):
    model, processor = clip
    images = [random_image(i) for i in range(3)]
    rows = [{"image": images}, {"image": images, "text": "a dog"}, *images] + [
        {"image": image, "text": "a dog"} for image in images
    ]
    embeds = model.encode(rows, processor=processor, batch_size=2)
    torch.testing.assert_close(embeds[0], F.normalize(embeds[2:5].mean(0), dim=-1), atol=1e-6, rtol=0)
    torch.testing.assert_close(embeds[1], F.normalize(embeds[5:8].mean(0), dim=-1), atol=1e-6, rtol=0)


def test_encode_leaves_the_training_mode_as_it_was(clip):
    model, processor = clip
    model.train()
    model.encode(["a dog"], processor=processor)
    assert model.training
    model.towers["image"].eval()  # as a user may keep batch statistics fixed
    model.encode((row for row in ["a dog"]), processor=processor)  # any iterable
    assert model.training and model.towers["text"].training and not model.towers["image"].training


def test_no_rows_give_no_embeddings(clip):
    model, processor = clip
    assert model.encode([], processor=processor).shape == (0, 24)


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"text": " "}, "row 1 has neither an image nor a text"),
        ({}, "row 1 has neither"),
        (None, "row 1 has neither"),
        ({"image": []}, "row 1: the list of images is empty"),
        ({"text": 3}, "row 1: text must be a str, got int"),
        (b"not an image", "row 1: image of bytes: not a readable image"),
        ({"image": "no/such/file.jpg", "text": "a dog"}, "row 1: no/such/file.jpg: no such file"),
        (Path(__file__), "row 1: .*test_encoding_gcl.py: not a readable image"),
        (np.zeros((4, 4, 3), dtype=np.float32), "row 1: .*arrays must be uint8"),
        ({"image": "https://example.com/x.png"}, "row 1: .*images are not downloaded"),
        ({"image": 3.5}, "row 1: cannot read an image from float"),
    ],
)
def test_bad_rows_are_named_or_skipped(clip, bad, message):
    model, processor = clip
    rows = ["a dog", bad, {"image": random_image(1), "text": "a cat"}]
    with pytest.raises(ValueError, match=message):
        model.encode(rows, processor=processor)
    embeds, kept = model.encode(rows, processor=processor, on_error="skip")
    assert kept == [0, 2]
    torch.testing.assert_close(embeds, model.encode([rows[0], rows[2]], processor=processor), atol=1e-6, rtol=0)


def test_a_bad_one_among_several_images_spoils_its_row(clip):
    model, processor = clip
    _, kept = model.encode(["a dog", {"image": [random_image(0), b"x"]}], processor=processor, on_error="skip")
    assert kept == [0]


def test_bad_calls(clip):
    model, processor = clip
    with pytest.raises(ValueError, match="wrap a single row in a list"):
        model.encode("a dog", processor=processor)
    for single in (random_image(0), Path("x.png"), np.zeros((4, 4, 3), dtype=np.uint8), {"text": "a dog"}):
        with pytest.raises(ValueError, match="wrap a single row in a list"):
            model.encode(single, processor=processor)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.encode(["a dog"], processor=processor, batch_size=0)
    with pytest.raises(ValueError, match="row 0 has the key 'caption': call it 'text'"):
        model.encode([{"image": random_image(0), "caption": "a dog"}], processor=processor)
    with pytest.raises(ValueError, match="on_error='ignore' is unknown"):
        model.encode(["a dog"], processor=processor, on_error="ignore")


def test_kinds_of_rows():
    assert parse_row("a", 0).kind == "t"
    assert parse_row({"image": b"", "text": "a"}, 0).kind == "it"
    assert parse_row({"bytes": b"x", "path": None}, 0).kind == "i"


def test_images_are_upright_rgb(tmp_path):
    image = Image.new("L", (4, 2))
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    loaded = load_image(tmp_path / "x.jpg")
    assert loaded.mode == "RGB" and loaded.size == (2, 4)
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "x.jpg").read_bytes()[:200])
    with pytest.raises(ImageError, match="cut.jpg: not a readable image"):
        load_image(tmp_path / "cut.jpg")


def test_deep_pixels_keep_their_range_or_are_refused(tmp_path):
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(ramp).save(tmp_path / "deep.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "deep.png"))[..., 0], np.arange(256).reshape(16, 16))
    Image.fromarray(np.linspace(0, 1, 16, dtype=np.float32).reshape(4, 4)).save(tmp_path / "float.tiff")
    with pytest.raises(ImageError, match="float.tiff: pixels are 32-bit numbers of unknown range"):
        load_image(tmp_path / "float.tiff")


def test_whatever_a_decoder_raises_is_an_image_error(monkeypatch):
    """Damaged AVIF, EXIF and DDS data raise RuntimeError, struct.error, NotImplementedError from inside Pillow."""
    for error in (RuntimeError, NotImplementedError, AttributeError, MemoryError):

        def fail(image, error=error):
            raise error("damaged")

        monkeypatch.setattr("modeling_gcl.rows_gcl.ImageOps.exif_transpose", fail)
        with pytest.raises(ImageError, match="not a readable image .damaged"):
            load_image(png_bytes(random_image(0)))
