"""Frames of WebVid-CoVR's videos as image files: extracted from the mp4s once for all models, or read from a folder.

A query video gives one frame, number `total // 2`. A target gives 15 frames, each the middle one of equal intervals, or
all its frames if it has fewer: see `modeling_gcl.video`. Sources:
- `Videos`: `ROOT/<folder>/<id>.mp4`, as the authors' script downloads them;
- `Frames`: images `ROOT/<folder>/<id>/*`, all frames of each video or evenly spread ones, from which the same rules
  choose by number; or what `extract_frames` wrote: `ROOT/queries/<folder>/<id>/00.png` and
  `ROOT/targets/<folder>/<id>/00.png`, …
"""

import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image

from modeling_gcl import ImageError, VideoError, load_image, load_video_frames, middle_frame
from modeling_gcl.video import frame_indices
from universal_gcl.retrieval.processes import Processes
from universal_gcl.retrieval.progress import Progress
from universal_gcl.retrieval.store import write_json

NUM_FRAMES = 15
ROLES = ("queries", "targets")
IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".webp")
_MADE = "frames.json"  # says which videos `extract_frames` extracted, and how
_READERS = 8  # threads, each of which decodes one video at a time


class Videos:
    """Files `root/<folder>/<id>.mp4`.

    Raises:
        FileNotFoundError: the folder doesn't exist.
    """

    def __init__(self, root: str | Path):
        self.root = _folder(root)

    def describe(self) -> dict:
        """Where the frames are from, and the side to which they were squashed."""
        return {"videos": str(self.root), "squash": None}

    def missing(self, role: str, video: str) -> str | None:
        """A message if the video's file does not exist, otherwise None."""
        path = self._path(video)
        return None if path.is_file() else f"{path}: no such file"

    def images(self, role: str, video: str) -> list[Image.Image]:
        """The frames that represent the video in this role (`"queries"`, `"targets"`), RGB.

        Raises:
            VideoError: the video can't be read.
        """
        path = self._path(video)
        return [middle_frame(path)] if role == "queries" else load_video_frames(path, NUM_FRAMES)

    def _path(self, video: str) -> Path:
        return self.root / f"{video}.mp4"


class Frames:
    """Image files in `root/<folder>/<id>/`, in the order of the numbers in their names; or the folder that
    `extract_frames` wrote, which holds such folders for each role.

    Raises:
        FileNotFoundError: the folder doesn't exist.
    """

    def __init__(self, root: str | Path):
        self.root = _folder(root)
        self.made = _read_made(self.root)
        self.roots = {role: self.root if self.made is None else self.root / role for role in ROLES}

    def describe(self) -> dict:
        """Where the frames are from, and the side to which they were squashed."""
        return {"frames": str(self.root), "squash": None} if self.made is None else self.made

    def missing(self, role: str, video: str) -> str | None:
        """A message if the video's folder does not exist or has no images, otherwise None."""
        return None if self._all(role, video) else f"{self.roots[role] / video}: no such folder, or no images in it"

    def files(self, role: str, video: str) -> list[Path]:
        """The frames that represent the video in this role, in their order."""
        files = self._all(role, video)
        if role == "queries":
            return [files[len(files) // 2]]
        return [files[number] for number in frame_indices(len(files), NUM_FRAMES)]

    def images(self, role: str, video: str) -> list[Image.Image]:
        """The images in those files.

        Raises:
            ImageError: one of them can't be read.
        """
        return [load_image(path) for path in self.files(role, video)]

    def _all(self, role: str, video: str) -> list[Path]:
        try:
            names = os.listdir(self.roots[role] / video)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = [name for name in names if name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")]
        return [self.roots[role] / video / name for name in sorted(names, key=_by_number)]


def extract_frames(
    source: Videos | Frames,
    wanted: Iterable[tuple[str, str]],
    folder: str | Path,
    *,
    squash: int | None = None,
    skip_unreadable: bool = False,
    show_progress: bool = False,
) -> dict[tuple[str, str], str]:
    """
    Write the frames that represent videos as PNG files, or continue where an earlier call ended. All processes of a
    launch must call this, because they share the work.

    Args:
        source: where the videos are.
        wanted: pairs of role and video, each once.
        folder: the folder to write, created if absent. `Frames` describes its contents. A frame of 596×336 takes about
            0.3 MB.
        squash: side in pixels of a square to which each frame is resized (bicubic, without keeping its proportions).
        skip_unreadable: go on after a video that can't be read.
        show_progress: show the progress on process 0.

    Returns:
        on all processes: (role, video) → why, for the videos that can't be read.

    Raises:
        ImageError, VideoError: (both ValueErrors) a video can't be read. The message names the file.
        ValueError: the folder holds frames of another source or size, or other files; `squash` is below 1.
    """
    if squash is not None and squash < 1:
        raise ValueError(f"squash must be at least 1 pixel, got {squash}")
    folder, processes = Path(folder), Processes()
    _claim(folder, source.describe() | {"squash": squash}, processes)
    mine = list(wanted)[processes.rank :: processes.size]

    def extract(one: tuple[str, str]) -> tuple[tuple[str, str], str | None]:
        try:
            _write(source.images, *one, folder, squash)
        except (ImageError, VideoError) as error:
            if not skip_unreadable:
                raise
            return one, str(error)
        return one, None

    unreadable = {}
    shown = show_progress and processes.rank == 0
    with ThreadPoolExecutor(_READERS) as executor, Progress("frames", len(mine), "videos", shown=shown) as progress:
        try:
            for one, why in executor.map(extract, mine):
                if why is not None:
                    unreadable[one] = why
                progress.update(1)
        except BaseException:
            executor.shutdown(wait=False, cancel_futures=True)
            raise
    return {one: why for part in processes.gather(unreadable) for one, why in part.items()}


def _claim(folder: Path, made: dict, processes: Processes) -> None:
    """Mark the folder as belonging to these frames, or check that it has this mark."""
    if processes.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        known = _read_made(folder)
        if known is None and any(folder.iterdir()):
            raise ValueError(f"{folder} holds files that are not frames: choose another folder, or empty it")
        if known not in (None, made):
            raise ValueError(f"{folder} holds frames of {known}, not of {made}: choose another folder, or delete it")
        write_json(folder / _MADE, made)
    processes.gather(None)


def _read_made(folder: Path) -> dict | None:
    path = folder / _MADE
    try:
        return json.loads(path.read_text()) if path.is_file() else None
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}): delete {folder}, and extract the frames again") from error


def _write(
    images_of: Callable[[str, str], list[Image.Image]], role: str, video: str, folder: Path, squash: int | None
) -> None:
    """Write the frames of one video, all or none."""
    target = folder / role / video
    if target.is_dir():
        return
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    images = images_of(role, video)
    partial.mkdir(parents=True)
    for number, image in enumerate(images):
        if squash is not None:
            image = image.resize((squash, squash), Image.Resampling.BICUBIC)
        image.save(
            partial / f"{number:02}.png", compress_level=1
        )  # takes half the time of the default level; files are a tenth larger
    os.replace(partial, target)


def _folder(root: str | Path) -> Path:
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"{root}: no such folder")
    return root


def _by_number(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts frame10.jpg after frame9.jpg."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"([0-9]+)", name) if part]
