"""Rows → embeddings: parse, sort by kind and length, read, batch, embed, and put back in order."""

from itertools import islice
from pathlib import PurePath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import logging

from .modalities import FEATURES
from .rows import ImageError, load_images, parse_row
from .video import VideoError

TEXTS_AT_ONCE = 10_000  # tokenised only to be counted: some 4 kB each


@torch.inference_mode()
def encode_rows(model, rows, processor, batch_size, show_progress, on_error, truncate_dim, num_frames):
    """The work of `GCLModel.encode`, which documents it."""
    dim = model.config.projection_dim
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
    parsed, bad = {}, set()
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
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with logging.tqdm(total=len(order), disable=not show_progress, unit="row", desc="encode") as progress:
            last = None
            for batch in _batches(_items(parsed, order, num_frames, on_error, bad), parsed, batch_size):
                indices = [index for index, _ in batch]
                embeds = _embed(model, processor, [parsed[index] for index in indices], [image for _, image in batch])
                # unit vectors again before the mean, so that no image of a row weighs more than another
                sums.index_add_(0, torch.tensor(indices), F.normalize(embeds[:, :truncate_dim], dim=-1))
                progress.update(len(set(indices) - {last}))
                last = indices[-1]
    finally:
        for module, mode in modes.items():
            module.training = mode

    kept = [index for index in range(len(rows)) if index not in bad]
    embeds = F.normalize(sums[kept], dim=-1)
    return (embeds, kept) if on_error == "skip" else embeds


def _text_lengths(parsed, processor):
    """Tokens of each row's text. Batches sorted by characters instead have a fifth more tokens after padding, and the
    text tower's time follows them, while tokenising a second time takes a hundredth of it."""
    texts = {index: row.text for index, row in parsed.items() if row.text is not None}
    lengths, rest = [], iter(texts.values())
    while some := list(islice(rest, TEXTS_AT_ONCE)):
        lengths += map(len, processor.tokenizer(some, verbose=False)["input_ids"])
    return dict(zip(texts, lengths))


def _items(parsed, order, num_frames, on_error, bad):
    """What is embedded, as (index of the row, image or None): one item an image, so that rows of several batch like any
    other. Images are read as they are asked for, those of a row one after another: a video is decoded once, and one
    at a time is held. Rows with an image that cannot be read are added to `bad`."""
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


def _batches(items, parsed, batch_size):
    """Runs of at most `batch_size` items of one kind."""
    batch = []
    for item in items:
        if batch and (len(batch) == batch_size or parsed[item[0]].kind != parsed[batch[0][0]].kind):
            yield batch
            batch = []
        batch.append(item)
    if batch:
        yield batch


def _embed(model, processor, rows, images):
    """(N, D) float32 embeddings on the CPU of N items of one kind: a row and one of its images (or None) each."""
    kind = rows[0].kind
    images = images if "i" in kind else None
    texts = [row.text for row in rows] if "t" in kind else None
    inputs = processor(images=images, text=texts, return_tensors="pt").to(model.device)
    modality = FEATURES[kind]
    output = model(**inputs, modalities=(modality,), return_loss=False, return_dict=True)
    return output[f"{modality}_embeds"].float().cpu()
