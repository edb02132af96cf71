"""Videos as files: which frames stand for one, and how they are decoded, by PyAV, which only this module needs."""

from transformers.utils import logging

logger = logging.get_logger(__name__)

VIDEO_SUFFIXES = (".avi", ".flv", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".ogv", ".webm", ".wmv")


class VideoError(ValueError):
    """A video that is missing, damaged or of a type that cannot be read."""


def frame_indices(total, num_frames):
    """
    Numbers of the frames that stand for a video of `total` frames: the middle of each of `num_frames` equal intervals,
    every frame of a video that has no more than those.

    Reference: `sample_frames` in src/data/embs.py of CoVR (https://github.com/lucas-ventura/CoVR, arXiv 2308.14746),
    the same for its 15 frames; for some other numbers, rounding there shifts a bound by one frame.
    """
    n = min(total, num_frames)
    return [(k * total // n + (k + 1) * total // n - 1) // 2 for k in range(n)]


def load_video_frames(path, num_frames=15):
    """
    Frames of a video, evenly spread: see `frame_indices`. Frames count by number, not by time, which differ where the
    frame rate varies. The whole video is decoded, but only the frames asked for are kept.

    Args:
        path (`str` or `Path`): a video file of any kind that FFmpeg reads.
        num_frames (`int`): how many, at least 1; a shorter video gives all it has.

    Returns:
        `list` of PIL images: RGB, in order of display, upright by the rotation that the file states.

    Raises:
        VideoError: no such file, no video in it, or damaged data, naming the file.
        ImportError: PyAV is not installed.
        ValueError: `num_frames` is below 1.
    """
    if num_frames < 1:
        raise ValueError(f"num_frames must be at least 1, got {num_frames}")
    return _load(path, lambda total: frame_indices(total, num_frames))


def middle_frame(path):
    """
    The frame of number `total // 2` of a video, a PIL image: CoVR's query. Arguments and errors as for
    `load_video_frames`.

    Reference: `get_middle_frame` in src/data/utils.py of CoVR.
    """
    return _load(path, lambda total: [total // 2])[0]


def _load(path, choose):
    """Frames of the numbers `choose(total)`. A container may state no number of frames, or a wrong one, which shows
    only at the end: then the video is decoded once more."""
    stated, total, frames = _decode(path, choose)
    if total != stated:
        frames = None  # not two sets of frames at a time
        _, _, frames = _decode(path, choose, total)
    return frames


def _decode(path, choose, total=None):
    """Read the video to its end, with `total` its supposed number of frames, by default the one its container states
    (0 where it states none). Returns that number, the number decoded, and the frames `choose(total)` as images."""
    try:
        import av
    except ImportError as error:
        raise ImportError(f"{path}: reading a video needs PyAV: pip install av") from error

    if str(path).startswith(("http://", "https://")):
        raise VideoError(f"{path}: videos are not downloaded; fetch it first and pass its path")
    count, end, frames = 0, 0.0, []
    try:
        with _open(av, path) as container:
            # the cover of a song is a video stream too
            streams = [stream for stream in container.streams.video if not _is_cover(stream)]
            if not streams:
                raise VideoError(f"{path}: holds no video")
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
    except Exception as error:  # damaged files raise ValueError, OSError, EOFError, MemoryError, ... out of FFmpeg
        reason = getattr(error, "strerror", None) or error
        raise VideoError(f"{path}: not a readable video ({reason})") from error
    if count == 0:
        raise VideoError(f"{path}: holds no frames")
    # Matroska gives no other sign; but a last frame may be meant to stay for long. Once, when no second pass follows
    if total == count and end < 0.95 * duration - 1:
        logger.warning(f"{path}: states {duration:.1f} s and ends after {end:.1f} s: perhaps cut short; used as it is")
    return total, count, frames


def _open(av, path):
    name = f"file:{path}"  # otherwise FFmpeg takes "concat:a|b", "tcp://..." and the like for protocols
    try:
        return av.open(name)
    except UnicodeDecodeError:  # a title in another encoding; PyAV 19 reads it and has no such argument
        return av.open(name, metadata_errors="replace")


def _is_cover(stream):
    return bool(stream.disposition & type(stream.disposition).attached_pic)
