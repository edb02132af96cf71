"""Video files: which frames represent a video, and how they are decoded. Only this module needs PyAV."""

from collections.abc import Callable
from os import PathLike

from PIL import Image
from transformers.utils import logging

logger = logging.get_logger(__name__)

VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")


class VideoError(ValueError):
    """A video is missing or damaged, or its type can't be read."""


def frame_indices(total: int, num_frames: int) -> list[int]:
    """
    Indices of the frames that represent a video with `total` frames: the middle frame of each of `num_frames` equal
    intervals. If the video has no more frames than that, all of them.

    Reference: `sample_frames` in src/data/embs.py of CoVR (https://github.com/lucas-ventura/CoVR, arXiv 2308.14746).
    Equal for 15 frames, as used there. For some other numbers, CoVR's rounding differs by one frame.
    """
    n = min(total, num_frames)
    return [(k * total // n + (k + 1) * total // n - 1) // 2 for k in range(n)]


def load_video_frames(path: str | PathLike, num_frames: int = 15) -> list[Image.Image]:
    """
    Read evenly spaced frames of a video; see `frame_indices`. They are spaced by index, not by time, which makes a
    difference if the frame rate varies. The whole video is decoded, but only these frames are kept in memory.

    Args:
        path (`str` or `Path`): a video file in any format that FFmpeg reads.
        num_frames (`int`): number of frames, at least 1. A shorter video gives all its frames.

    Returns:
        `list` of RGB PIL images, in display order, turned upright by the rotation stored in the file.

    Raises:
        VideoError: the file does not exist, contains no video, or is damaged. The message names it.
        ImportError: PyAV is not installed.
        ValueError: `num_frames` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return _load(path, lambda total: frame_indices(total, num_frames))


def middle_frame(path: str | PathLike) -> Image.Image:
    """
    The frame with index `total // 2` of a video, which CoVR uses as the query image. The errors are those of
    `load_video_frames`.

    Reference: `get_middle_frame` in src/data/utils.py of CoVR.
    """
    return _load(path, lambda total: [total // 2])[0]


def _load(path: str | PathLike, choose: Callable[[int], list[int]]) -> list[Image.Image]:
    """The frames with the indices `choose(total)`. If the container states no number of frames or a wrong one, which
    shows only at the end, the video is decoded a second time."""
    stated, total, frames = _decode(path, choose)
    if total != stated:
        frames = []  # don't hold two sets of frames
        _, _, frames = _decode(path, choose, total)
    return frames


def _decode(
    path: str | PathLike, choose: Callable[[int], list[int]], total: int | None = None
) -> tuple[int, int, list[Image.Image]]:
    """Decode the video to its end. `total` is the expected number of frames, by default the one that the container
    states, or 0 if it states none. Returns that number, the true one, and the frames with indices `choose(total)`."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: reading a video needs PyAV: pip install av") from error

    if str(path).startswith(("http://", "https://")):
        raise VideoError(f"{path}: videos are not downloaded; download it first and pass its path")
    count, end = 0, 0.0
    frames: list[Image.Image] = []
    try:
        with _open(av, path) as container:
            # the cover picture of a song is a video stream too
            streams = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not streams:
                raise VideoError(f"{path}: contains no video")
            stream = streams[0]
            stream.thread_type = "AUTO"
            total = stream.frames if total is None else total
            wanted = set(choose(total))
            for packet in container.demux():
                if packet.pts is not None:
                    end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream_index != stream.index:
                    continue
                decoded = packet.decode()
                if packet.is_corrupt or any(frame.is_corrupt for frame in decoded):
                    raise VideoError(f"{path}: damaged or cut short")
                for frame in decoded:
                    if count in wanted:
                        frames.append(frame.to_image().rotate(frame.rotation, expand=True))
                    count += 1
            duration = (container.duration or 0) / av.time_base
    except VideoError:
        raise
    except FileNotFoundError as error:
        raise VideoError(f"{path}: no such file") from error
    except IsADirectoryError as error:
        raise VideoError(f"{path}: a directory, not a video file") from error
    except Exception as error:  # for damaged files, FFmpeg raises ValueError, OSError, EOFError, MemoryError, ...
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: not a readable video ({reason})") from error
    if count == 0:
        raise VideoError(f"{path}: contains no frames")
    # A Matroska file that was cut shows no other sign. It is not an error, because the last frame may be meant to stay
    # on display. Warn only in the last pass.
    if total == count and end < 0.95 * duration - 1:
        logger.warning(
            f"{path}: should be {duration:.1f} s long and ends after {end:.1f} s: it may be cut short, but is used"
        )
    return total, count, frames


def _open(av, path):
    name = f"file:{path}"  # otherwise FFmpeg takes "concat:a|b" or "tcp://..." for a protocol
    try:
        return av.open(name)
    except UnicodeDecodeError:  # the title has another encoding; PyAV 19 reads it, and has no such argument
        return av.open(name, metadata_errors="replace")


def _is_cover(stream):
    return bool(stream.disposition & type(stream.disposition).attached_pic)
