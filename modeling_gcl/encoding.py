"""From rows to embeddings: `GCLModel.encode` parses rows, sorts and batches them, and embeds each batch."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from transformers.utils import logging

from .modalities import FEATURES
from .processing_gcl import GCLProcessor
from .rows import ImageError, Row, load_images, parse_row
from .video import VideoError

TEXTS_AT_ONCE = 10_000  # texts tokenised at a time to measure their lengths: about 4 kB of memory each

# the index of a row, and one of its images, or None for a row without images
_Item = tuple[int, Image.Image | None]


class EncodingMixin(nn.Module):
    """Gives GCLModel its method `encode`."""

    config: Any  # a GCLConfig
    device: torch.device

    @torch.inference_mode()
    def encode(
        self,
        rows: Sequence[Any],
        processor: GCLProcessor,
        batch_size: int = 64,
        show_progress: bool = False,
        on_error: str = "raise",
        truncate_dim: int | None = None,
        num_frames: int = 15,
    ) -> torch.Tensor | tuple[torch.Tensor, list[int]]:
        r"""
        Embed rows: images, videos, texts, or an image or video together with a text. Kinds may be mixed in one call.

        Args:
            rows (`Sequence`): one `dict` per row, with these keys, all optional:

                - `image`: a PIL image, path, `bytes` or uint8 array, or a list of these.
                - `video` (instead of `image`): the path of a video file (needs PyAV: `pip install av`), or a list of
                  images, the frames.
                - `text`: a `str`. A row with an image or video and a text gets one fused embedding.
                - `instruction`: a `str` that is put before the text, as `"{instruction} {text}"`. If the row has an
                  image or video and no text, the instruction is its text.

                If a row has several images or frames, each is embedded (with the text, if there is one), and the
                row's embedding is the normalised mean. Blank text counts as no text. A row may also be a bare value:
                a `str` is a text, a `Path` that ends like a video file is a video, and any other `Path`, a PIL image,
                `bytes` or an array is an image.
            processor (`GCLProcessor`): the processor of this checkpoint.
            batch_size (`int`): number of texts, images or frames per forward pass. Rows are sorted by kind and length
                first; the result is in the order of `rows`.
            show_progress (`bool`): show a progress bar with rows per second.
            on_error (`str`): `"raise"` stops at the first bad row, `"skip"` leaves bad rows out.
            truncate_dim (`int`, *optional*): keep only the first dimensions, for models trained with
                `matryoshka_dims`. Each embedding is cut and normalised again before the mean over images.
            num_frames (`int`): number of frames taken from a video file. The file is divided into as many equal
                intervals, and the middle frame of each is taken, as in WebVid-CoVR; a shorter video gives all its
                frames. Lists of frames are always used in full.

        Returns:
            `torch.FloatTensor` of shape `(N, D)` or `(N, truncate_dim)` on the CPU, with rows of unit norm in the order
            of `rows`. With `on_error="skip"`, a `tuple` of that tensor for the good rows and a `list[int]` with their
            indices.

        Raises:
            ValueError: a row has nothing to embed, both an image and a video, an empty list, or an image, frame or
                video that can't be read (the message names the row); or `truncate_dim`, `batch_size` or `num_frames`
                is out of range.
            ImportError: a row has a video file, and PyAV is not installed.
        """
        dim = self.config.projection_dim
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r} is unknown: choose 'raise' or 'skip'")
        for name, number in (("batch_size", batch_size), ("num_frames", num_frames)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        if truncate_dim is not None and not 1 <= truncate_dim <= dim:
            raise ValueError(f"truncate_dim must be between 1 and the embeddings' {dim} dimensions, got {truncate_dim}")
        if isinstance(rows, (str, bytes, dict, PurePath, np.ndarray, Image.Image)):
            raise ValueError("encode takes a sequence of rows; wrap a single row in a list")
        rows = list(rows)
        parsed: dict[int, Row] = {}
        bad: set[int] = set()
        for index, value in enumerate(rows):
            try:
                parsed[index] = parse_row(value, index)
            except ValueError:
                if on_error == "raise":
                    raise
                bad.add(index)
        lengths = _text_lengths(parsed, processor)
        order = sorted(parsed, key=lambda index: (parsed[index].kind, lengths.get(index, 0)))

        sums = torch.zeros(len(rows), truncate_dim or dim)
        modes = {module: module.training for module in self.modules()}
        self.eval()
        try:
            with logging.tqdm(total=len(order), disable=not show_progress, unit="row", desc="encode") as progress:
                last = None
                for batch in _batches(_items(parsed, order, num_frames, on_error, bad), parsed, batch_size):
                    indices = [index for index, _ in batch]
                    embeds = _embed(self, processor, [parsed[index] for index in indices], [item[1] for item in batch])
                    # normalised again once cut, so that each image of a row has the same weight in the mean
                    sums.index_add_(0, torch.tensor(indices), F.normalize(embeds[:, :truncate_dim], dim=-1))
                    progress.update(len(set(indices) - {last}))
                    last = indices[-1]
        finally:
            for module, mode in modes.items():
                module.training = mode

        kept = [index for index in range(len(rows)) if index not in bad]
        embeds = F.normalize(sums[kept], dim=-1)
        return (embeds, kept) if on_error == "skip" else embeds


def _text_lengths(parsed: dict[int, Row], processor: GCLProcessor) -> dict[int, int]:
    """Number of tokens of each row's text, to sort by. Sorting by characters leaves a fifth more tokens after padding,
    and with them a fifth more time in the text tower; tokenising twice costs a hundredth of that time."""
    texts = {index: row.text for index, row in parsed.items() if row.text is not None}
    lengths: list[int] = []
    rest = iter(texts.values())
    while some := list(islice(rest, TEXTS_AT_ONCE)):
        lengths += map(len, processor.tokenizer(some, verbose=False)["input_ids"])
    return dict(zip(texts, lengths))


def _items(parsed: dict[int, Row], order: list[int], num_frames: int, on_error: str, bad: set[int]) -> Iterator[_Item]:
    """Yield one item per image, so that rows with several images are batched like all others. Images are read only
    when their turn comes, and each video is decoded once: one video at a time is in memory. Rows with an image that
    can't be read are added to `bad`."""
    for index in order:
        if "i" not in parsed[index].kind:
            yield index, None
            continue
        try:
            for image in load_images(parsed[index], num_frames):
                yield index, image
        except (ImageError, VideoError) as error:
            if on_error == "raise":
                raise type(error)(f"row {index}: {error}") from error
            bad.add(index)


def _batches(items: Iterator[_Item], parsed: dict[int, Row], batch_size: int) -> Iterator[list[_Item]]:
    """Group consecutive items of one kind into batches of at most `batch_size`."""
    batch: list[_Item] = []
    for item in items:
        if batch and (len(batch) == batch_size or parsed[item[0]].kind != parsed[batch[0][0]].kind):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _embed(
    model: nn.Module, processor: GCLProcessor, rows: list[Row], images: list[Image.Image | None]
) -> torch.Tensor:
    """(N, D) float32 embeddings, on the CPU, of N rows of one kind, each with one of its images or None."""
    kind = rows[0].kind
    inputs = processor(
        images=images if "i" in kind else None,
        text=[row.text or "" for row in rows] if "t" in kind else None,
        return_tensors="pt",
    ).to(model.device)
    modality = FEATURES[kind]
    output = model(**inputs, modalities=(modality,), return_loss=False, return_dict=True)
    return output[f"{modality}_embeds"].float().cpu()
