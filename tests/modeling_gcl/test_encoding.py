"""encode(): rows of every form, order, padding, batch size, and bad rows."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from modeling_gcl import GCLModel, ImageError, VideoError, load_image, load_video_frames
from modeling_gcl.vista import VistaModel
from modeling_gcl.vista_config import VistaConfig
from tests.support.backbones import BACKBONES, LARGE, WORDS, random_image, tiny_encoder, tiny_processor


def tiny_vista():
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2} | LARGE
    text = tower | {"model_type": "bert", "vocab_size": 30, "max_position_embeddings": 24}
    vision = tower | {"model_type": "eva02_clip_vision", "image_size": 32, "patch_size": 16}
    return VistaModel(VistaConfig(text, vision, cls_token_id=2, sep_token_id=3))


@pytest.fixture(scope="module", params=[*BACKBONES, "vista"])
def door(request):
    if request.param == "vista":
        return GCLModel.from_encoder(tiny_vista(), fusion="native"), tiny_processor("clip")
    model = GCLModel.from_encoder(tiny_encoder(request.param), fusion="normalized_sum")
    return model, tiny_processor(request.param)


@pytest.fixture
def clip():
    return GCLModel.from_encoder(tiny_encoder("clip")), tiny_processor("clip")


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_each_row_as_if_alone_whatever_the_order_and_batch(door, data):
    """Texts of many lengths, so that batches are padded now more, now less."""
    model, processor = door
    images = st.integers(0, 5).map(random_image)
    texts = st.lists(st.sampled_from(WORDS), min_size=1, max_size=14).map(" ".join)
    row = st.one_of(
        texts,
        st.fixed_dictionaries({"image": images}, optional={"text": texts, "instruction": texts}),
        st.fixed_dictionaries({"video": st.lists(images, min_size=1, max_size=3)}, optional={"text": texts}),
    )
    rows = data.draw(st.lists(row, min_size=1, max_size=12))
    batch_size = data.draw(st.sampled_from([1, 2, 3, 64]))
    together = model.encode(rows, processor=processor, batch_size=batch_size)
    assert together.shape == (len(rows), model.config.projection_dim)
    assert together.dtype == torch.float32 and together.device.type == "cpu"
    torch.testing.assert_close(together.norm(dim=-1), torch.ones(len(rows)))
    for embedding, row in zip(together, rows):
        torch.testing.assert_close(embedding, model.encode([row], processor=processor)[0], atol=1e-5, rtol=0)


def test_texts_are_batched_by_their_tokens(clip, monkeypatch):
    model, processor = clip
    widths = []

    class Spy:
        tokenizer = processor.tokenizer

        def __call__(self, **kwargs):
            batch = processor(**kwargs)
            widths.append(batch["input_ids"].shape[1])
            return batch

    monkeypatch.setattr("modeling_gcl.encoding.TEXTS_AT_ONCE", 3)  # a last, smaller run too
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


def test_several_images_or_frames_are_the_normalised_mean(door):
    model, processor = door
    images = [random_image(i) for i in range(3)]
    rows = [{"image": images}, {"image": images, "text": "a dog"}, {"video": images}]
    rows += [{"video": images, "text": "dog", "instruction": "a"}, {"video": images, "instruction": "a dog"}, *images]
    rows += [{"image": image, "text": "a dog"} for image in images]
    embeds = model.encode(rows, processor=processor, batch_size=2)
    alone, fused = F.normalize(embeds[5:8].mean(0), dim=-1), F.normalize(embeds[8:].mean(0), dim=-1)
    for found, expected in zip(embeds, (alone, fused, alone, fused, fused)):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_instruction_is_the_text_before_the_text(clip):
    model, processor = clip
    image = random_image(0)
    with_instruction = [
        {"text": "a dog", "instruction": "the red"},
        {"image": image, "text": "a dog", "instruction": "the red"},
        {"image": image, "instruction": "the red"},
        {"image": image, "instruction": " "},
    ]
    written_out = [
        "the red a dog",
        {"image": image, "text": "the red a dog"},
        {"image": image, "text": "the red"},
        image,
    ]
    found, expected = (model.encode(rows, processor=processor) for rows in (with_instruction, written_out))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("dim", [1, 5, 24])
def test_embeddings_are_cut_and_normalised_before_the_mean(clip, dim):
    model, processor = clip
    images = [random_image(i) for i in range(3)]
    rows = ["a dog", {"image": images[0], "text": "a cat"}, {"image": images}]
    whole = model.encode([*rows[:2], *images], processor=processor).double()
    cut = whole[:, :dim] / whole[:, :dim].norm(dim=-1, keepdim=True)
    mean = cut[2:].mean(0) / cut[2:].mean(0).norm()
    found = model.encode(rows, processor=processor, truncate_dim=dim)
    assert found.shape == (3, dim) and found.dtype == torch.float32
    torch.testing.assert_close(found.double(), torch.stack([cut[0], cut[1], mean]), atol=1e-5, rtol=0)


def test_a_video_file_is_the_mean_of_its_middle_frames(door, tmp_path):
    pytest.importorskip("av")
    from tests.support.videos import write_video

    model, processor = door
    path = write_video(tmp_path / "x.mkv", 7)
    frames = load_video_frames(path, 3)
    rows = [path, {"video": str(path), "text": "a dog"}, {"video": frames}, {"video": frames, "text": "a dog"}]
    found = model.encode(rows, processor=processor, batch_size=2, num_frames=3)
    torch.testing.assert_close(found[:2], found[2:], atol=1e-5, rtol=0)
    every = model.encode([path, {"video": load_video_frames(path)}], processor=processor)
    torch.testing.assert_close(every[0], every[1], atol=1e-5, rtol=0)
    assert (every[0] - found[0]).abs().max() > 1e-4  # seven frames, not three


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_a_video_is_decoded_once_and_held_alone(clip, monkeypatch, batch_size):
    model, processor = clip
    loaded = []

    def load(path, num_frames):
        loaded.append(path)
        return [random_image(len(loaded))] * num_frames

    monkeypatch.setattr("modeling_gcl.rows.load_video_frames", load)
    rows = [{"video": "1.mp4"}, "a dog", {"video": "2.mp4", "text": "a dog"}, {"video": "3.mp4"}]
    model.encode(rows, processor=processor, batch_size=batch_size, num_frames=5)
    assert loaded == ["1.mp4", "3.mp4", "2.mp4"]


def test_encode_leaves_the_training_mode_as_it_was(clip):
    model, processor = clip
    model.train()
    model.encode(["a dog"], processor=processor)
    assert model.training
    model.towers["image"].eval()  # as a user may keep batch statistics fixed
    model.encode((row for row in ["a dog"]), processor=processor)  # any iterable
    assert model.training and model.towers["text"].training and not model.towers["image"].training


def test_a_row_costs_the_passes_of_its_own_kind_only():
    """VISTA could embed an image, a text and both of the same inputs, each in a pass of its own."""
    model, passes = GCLModel.from_encoder(tiny_vista(), fusion="native"), Counter()
    layers = {"image": model.towers["image"], "text": model.towers["text"].encoder}
    for name, module in layers.items():
        module.register_forward_pre_hook(lambda *_, name=name: passes.update([name]))
    model.encode([{"image": random_image(0), "text": "a dog"}], processor=tiny_processor("clip"))
    assert passes == {"image": 1, "text": 1}
    model.encode([{"video": [random_image(1)]}, "a cat"], processor=tiny_processor("clip"))
    assert passes == {"image": 2, "text": 3}


def test_progress_counts_rows(clip, monkeypatch):
    model, processor = clip
    steps = []

    class Bar:
        def __init__(self, total, **kwargs):
            steps.append(total)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def update(self, n):
            steps.append(n)

    monkeypatch.setattr("modeling_gcl.encoding.logging.tqdm", Bar)
    image = random_image(0)
    model.encode([{"image": [image] * 3}, {"video": [image] * 2}, image, "a"], processor=processor, batch_size=2)
    assert steps == [4, 1, 1, 1, 1]  # the batches hold images 1, 1 | 1, 2 | 2, 3 | and the text


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
        (Path(__file__), "row 1: .*test_encoding.py: not a readable image"),
        (np.zeros((4, 4, 3), dtype=np.float32), "row 1: .*arrays must be uint8"),
        ({"image": "https://example.com/x.png"}, "row 1: .*images are not downloaded"),
        ({"image": 3.5}, "row 1: cannot read an image from float"),
        ({"image": "some/x.mp4"}, "row 1: some/x.mp4: a video, not an image; give it as `video`"),
        ({"video": [random_image(0), b"x"]}, "row 1: frame 1: image of bytes: not a readable image"),
        ({"video": b"x"}, "row 1: video must be a path or a list of frames"),
        ({"text": "a dog", "instruction": 3}, "row 1: instruction must be a str, got int"),
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


@pytest.mark.parametrize("key", ["image", "video"])
@pytest.mark.parametrize("batch_size", [1, 64])
def test_a_bad_one_among_several_images_spoils_its_row(clip, key, batch_size):
    model, processor = clip
    rows = [{key: [random_image(0), b"x", random_image(1)]}, "a dog", {"image": random_image(0)}]
    embeds, kept = model.encode(rows, processor=processor, on_error="skip", batch_size=batch_size)
    assert kept == [1, 2]
    torch.testing.assert_close(embeds, model.encode(rows[1:], processor=processor), atol=1e-6, rtol=0)


def test_a_bad_video_file_is_named_or_skipped(clip, tmp_path):
    pytest.importorskip("av")
    model, processor = clip
    (tmp_path / "x.mp4").write_bytes(b"no video")
    rows = ["a dog", {"video": tmp_path / "x.mp4"}, {"video": "nowhere.mp4"}]
    for row, message in ((rows[1], "x.mp4: not a readable video"), (rows[2], "nowhere.mp4: no such file")):
        with pytest.raises(VideoError, match=f"row 1: .*{message}"):
            model.encode(["a dog", row], processor=processor)
    embeds, kept = model.encode(rows, processor=processor, on_error="skip")
    assert kept == [0] and embeds.shape == (1, 24)


def test_bad_calls(clip):
    model, processor = clip
    with pytest.raises(ValueError, match="wrap a single row in a list"):
        model.encode("a dog", processor=processor)
    for single in (random_image(0), Path("x.png"), np.zeros((4, 4, 3), dtype=np.uint8), {"text": "a dog"}):
        with pytest.raises(ValueError, match="wrap a single row in a list"):
            model.encode(single, processor=processor)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        model.encode(["a dog"], processor=processor, batch_size=0)
    for dim in (0, 25):
        with pytest.raises(ValueError, match=f"truncate_dim must be between 1 and the embeddings' 24 .*, got {dim}"):
            model.encode(["a dog"], processor=processor, truncate_dim=dim)
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        model.encode(["a dog"], processor=processor, num_frames=0)
    with pytest.raises(ValueError, match="row 0 has the key 'caption': call it 'text'"):
        model.encode([{"image": random_image(0), "caption": "a dog"}], processor=processor)
    with pytest.raises(ValueError, match="on_error='ignore' is unknown"):
        model.encode(["a dog"], processor=processor, on_error="ignore")


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

        monkeypatch.setattr("modeling_gcl.rows.ImageOps.exif_transpose", fail)
        with pytest.raises(ImageError, match="not a readable image .damaged"):
            load_image(png_bytes(random_image(0)))
