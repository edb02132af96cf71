"""Frames of video files: which ones, told by their content, upright and in RGB; and files that hold none."""

import io
import os
import struct
import subprocess
import sys
import weakref
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from modeling_gcl import GCLModel, VideoError, load_video_frames, middle_frame
from modeling_gcl.video import frame_indices, logger
from tests.support.backbones import random_image, tiny_encoder, tiny_processor
from tests.support.videos import SIZE, av, number_of, write_sound, write_video


def numbers(path, num_frames=15):
    return [number_of(frame) for frame in load_video_frames(path, num_frames)]


def middles(total, num_frames=15):
    """Cut range(total) into intervals as CoVR does, by np.linspace, and take the frame in the middle of each."""
    bounds = np.linspace(0, total, min(total, num_frames) + 1).astype(int)
    return [int(np.arange(a, b)[(b - a - 1) // 2]) for a, b in zip(bounds, bounds[1:])]


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 1_000_000))
def test_indices_are_those_of_covr(total):
    assert frame_indices(total, 15) == middles(total)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 200))
def test_indices_are_the_middles_of_equal_intervals(total, num_frames):
    """An interval holds the frames of numbers from its start (rounded down) to its end, without that one."""
    n, found = min(total, num_frames), frame_indices(total, num_frames)
    assert len(found) == n
    for k, index in enumerate(found):
        start, end = int(Fraction(k * total, n)), int(Fraction((k + 1) * total, n))
        assert start <= index < end and 0 <= (end - 1 - index) - (index - start) <= 1


def test_indices_written_out():
    assert frame_indices(30, 15) == list(range(0, 30, 2))
    assert frame_indices(10, 3) == [1, 4, 7]
    assert frame_indices(4, 15) == [0, 1, 2, 3]
    assert frame_indices(9, 1) == [4]


# H.264 stores its frames out of order; Matroska and WebM state no number of frames
@pytest.mark.parametrize(
    "name, codec", [("x.mp4", "libx264"), ("x.mkv", "libx264"), ("x.webm", "libvpx-vp9"), ("x.avi", "mpeg4")]
)
def test_the_frames_of_every_container(tmp_path, name, codec):
    path = write_video(tmp_path / name, 48, codec)
    assert numbers(path) == middles(48)
    assert numbers(str(path), 1) == [23] and number_of(middle_frame(path)) == 24
    frame = load_video_frames(path)[0]
    assert frame.mode == "RGB" and frame.size == SIZE


@pytest.mark.parametrize("total", [1, 2, 14, 15, 16])
def test_short_videos_give_what_they_have(tmp_path, total):
    path = write_video(tmp_path / "x.mp4", total)
    assert numbers(path) == list(range(min(total, 15)))
    assert number_of(middle_frame(path)) == total // 2


@pytest.mark.parametrize("stated", [0, 5, 47, 49, 9000])
def test_a_wrong_number_of_frames_in_the_header_is_found_out(tmp_path, stated):
    path = write_video(tmp_path / "x.avi", 48, "mpeg4")
    data = path.read_bytes()
    at = data.index(b"strh") + 8 + 32  # dwLength of the stream's header
    assert struct.unpack_from("<I", data, at) == (48,)
    path.write_bytes(data[:at] + struct.pack("<I", stated) + data[at + 4 :])
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == stated
    assert numbers(path) == middles(48) and number_of(middle_frame(path)) == 24


def test_frames_count_by_number_where_the_rate_varies(tmp_path):
    path = write_video(tmp_path / "x.mp4", 20, times=[n * n for n in range(20)])
    assert numbers(path, 4) == [2, 7, 12, 17]


def test_channels_are_red_green_blue(tmp_path):
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:] = (220, 120, 20)
    frame = middle_frame(write_video(tmp_path / "x.mp4", [pixels] * 3))
    np.testing.assert_allclose(np.asarray(frame).mean((0, 1)), (220, 120, 20), atol=6)


@pytest.mark.parametrize("turns, matrix", [(1, (0, -1, 1, 0)), (2, (-1, 0, 0, -1)), (3, (0, 1, -1, 0))])
def test_frames_are_upright(tmp_path, turns, matrix):
    """A phone that is held upright stores lying frames, and a matrix that turns them (`turns` quarters to the left)."""
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32] = 255
    path = write_video(tmp_path / "x.mp4", [pixels] * 3)
    data = bytearray(path.read_bytes())
    a, b, c, d = (value << 16 for value in matrix)
    struct.pack_into(">9i", data, data.index(b"tkhd") + 44, a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    upright = np.asarray(middle_frame(path)).astype(int)
    expected = np.rot90(pixels, turns).astype(int)
    assert upright.shape == expected.shape and abs(upright - expected).mean() < 8


def test_names_like_a_protocol_and_titles_that_are_no_utf8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "x.mkv", 5, metadata={"title": "café"})
    path = Path("x.mkv").rename("concat:a|b é %03d.mkv")
    data = path.read_bytes()
    assert data.count("é".encode()) == 1
    path.write_bytes(data.replace("é".encode(), b"\xe9 "))
    assert numbers(path) == [0, 1, 2, 3, 4]


def test_only_the_frames_asked_for_are_kept(monkeypatch):
    """A stand-in for PyAV whose frames can be counted: of 1000 it decodes, none stays; 15 become images."""
    alive, images = weakref.WeakSet(), []

    class Frame:
        is_corrupt, rotation = False, 0

        def __init__(self):
            alive.add(self)

        def to_image(self):
            images.append(None)
            return random_image(0)

    class Packet:
        is_corrupt, pts, stream_index = False, None, 0

        def decode(self):
            assert len(alive) <= 2
            return [Frame()]

    class Container:
        duration, streams = (
            None,
            SimpleNamespace(video=[SimpleNamespace(index=0, frames=0, disposition=av.stream.Disposition(0))]),
        )

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def demux(self):
            return (Packet() for _ in range(1000))

    monkeypatch.setitem(sys.modules, "av", SimpleNamespace(open=lambda name: Container(), time_base=1_000_000))
    assert len(load_video_frames("x.mkv")) == len(images) == 15


def jpeg():
    buffer = io.BytesIO()
    random_image(0).save(buffer, "JPEG")
    return buffer.getvalue()


def empty_avi(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        container.start_encoding()


def cut(path, share, **kwargs):
    write_video(path, 40, **kwargs)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


BAD_FILES = {
    "missing.mp4": (lambda path: None, "no such file"),
    "folder.mp4": (os.mkdir, "a directory, not a video file"),
    "empty.mp4": (lambda path: path.write_bytes(b""), "not a readable video .Invalid data"),
    "text.mp4": (lambda path: path.write_text("no video" * 99), "not a readable video .Invalid data"),
    "headless.mp4": (lambda path: cut(path, 0.5), "not a readable video .Invalid data"),
    "cut.mp4": (lambda path: cut(path, 0.6, format_options={"movflags": "faststart"}), "damaged or cut short"),
    "cut.avi": (lambda path: cut(path, 0.6, codec="mpeg4"), "not a readable video|damaged or cut short"),
    "sound.mp4": (write_sound, "contains no video"),
    "cover.aac": (lambda path: write_sound(path, cover=jpeg()), "contains no video"),
    "no_frames.avi": (empty_avi, "contains no frames"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_files_that_are_no_video(tmp_path, name):
    make, message = BAD_FILES[name]
    make(tmp_path / name)
    with pytest.raises(VideoError, match=f"{name}: .*{message}"):
        load_video_frames(tmp_path / name)
    with pytest.raises(VideoError, match=f"{name}: .*{message}"):
        middle_frame(tmp_path / name)


def test_bad_arguments(tmp_path):
    with pytest.raises(VideoError, match="https://example.com/x.mp4: videos are not downloaded"):
        load_video_frames("https://example.com/x.mp4")
    with pytest.raises(ValueError, match="num_frames must be at least 1, got 0"):
        load_video_frames(write_video(tmp_path / "x.mp4", 3), 0)


def test_a_file_that_ends_early_without_a_sign_is_used_with_a_warning(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(logger, "warning", warnings.append)
    cut(tmp_path / "x.mkv", 0.6)
    found = numbers(tmp_path / "x.mkv", 5)
    assert len(found) == 5 and found[-1] < 30
    assert len(warnings) == 1 and "should be 4.0 s long and ends after" in warnings[0]
    numbers(write_video(tmp_path / "whole.mkv", 40), 5)
    numbers(write_video(tmp_path / "slow.mp4", 3, rate=Fraction(1, 10)), 5)  # the last frame stays for 10 s of 30
    assert len(warnings) == 1


def test_only_video_files_need_pyav(tmp_path):
    """Remote code is refused where a package that it imports is missing: PyAV must not be one of those."""
    GCLModel.from_encoder(tiny_encoder("clip")).save_pretrained(tmp_path / "saved")
    tiny_processor("clip").save_pretrained(tmp_path / "saved")
    script = (
        "import sys\n"
        "sys.modules['av'] = None\n"
        "import numpy as np\n"
        "from transformers import AutoModel, AutoProcessor\n"
        "model = AutoModel.from_pretrained('saved', trust_remote_code=True)\n"
        "assert type(model).__module__.startswith('transformers_modules')\n"
        "processor = AutoProcessor.from_pretrained('saved', trust_remote_code=True)\n"
        "frames = [np.zeros((40, 40, 3), np.uint8)] * 2\n"
        "assert model.encode(['a dog', {'video': frames}], processor=processor).shape == (2, 24)\n"
        "model.encode([{'video': 'x.mp4'}], processor=processor, on_error='skip')\n"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    last = run.stderr.strip().splitlines()[-1]
    assert last == "ImportError: x.mp4: reading a video needs PyAV: pip install av", run.stderr
