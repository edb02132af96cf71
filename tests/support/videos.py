"""Videos whose frames bear their numbers, so that which frames were taken shows in their pixels."""

import struct
from fractions import Fraction

import numpy as np
import pytest

av = pytest.importorskip("av")

BITS = 8
SIZE = (BITS * 16, 32)  # width, height


def numbered_frame(number):
    """`number` (below 256) in binary, as black and white stripes, the highest bit at the left: (32, 128, 3) uint8."""
    bits = (number >> np.arange(BITS)[::-1]) & 1
    row = np.repeat(bits * 255, SIZE[0] // BITS).astype(np.uint8)
    return np.broadcast_to(row[None, :, None], (SIZE[1], SIZE[0], 3)).copy()


def number_of(image):
    """The number on an image of a numbered frame, however lossy the codec was."""
    stripes = np.asarray(image, dtype=float).mean((0, 2)).reshape(BITS, -1).mean(1)
    return int((stripes > 127) @ (1 << np.arange(BITS)[::-1]))


def write_video(path, frames, codec="libx264", times=None, rate=10, format_options=None, metadata=None):
    """
    Encode frames.

    Args:
        path: where to; its suffix is the container.
        frames: a number of numbered frames, or a list of (H, W, 3) uint8 arrays.
        codec (`str`): an encoder of FFmpeg.
        times (`list[int]`, *optional*): when each frame is shown, in ticks of 1/rate s; by default one a tick.
        rate (`int` or `Fraction`): ticks a second.
        format_options, metadata (`dict`, *optional*): of the container.
    """
    frames = [numbered_frame(n) for n in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=format_options or {}) as container:
        container.metadata.update(metadata or {})
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames[0].shape[:2] if frames else SIZE[::-1]
        stream.pix_fmt = "yuv420p"
        for n, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = (n if times is None else times[n]), 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_sound(path, cover=None):
    """A second of silence as AAC, behind an ID3 tag with a cover picture (a JPEG's bytes) if one is given."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    if cover is not None:
        picture = b"\0image/jpeg\0\x03\0" + cover
        tag = b"APIC" + struct.pack(">I", len(picture)) + b"\0\0" + picture
        size = bytes(len(tag) >> shift & 127 for shift in (21, 14, 7, 0))
        path.write_bytes(b"ID3\x03\0\0" + size + tag + path.read_bytes())
    return path
