"""Rows → embeddings: parse, sort by kind and length, batch, embed, and put back in order."""

from pathlib import PurePath

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from transformers.utils import logging

from .rows_gcl import ImageError, load_image, parse_row

EMBEDDING_OF_KIND = {"i": "image_embeds", "t": "text_embeds", "it": "fused_embeds"}


@torch.inference_mode()
def encode_rows(model, rows, processor, batch_size, show_progress, on_error):
    """The work of `GCLModel.encode`, which documents it."""
    if on_error not in ("raise", "skip"):
        raise ValueError(f"on_error={on_error!r} is unknown: choose 'raise' or 'skip'")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
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
    # one item an image, so that rows of several images batch like any other
    items = [(index, n) for index, row in parsed.items() for n in range(max(1, len(row.images)))]
    lengths = _text_lengths(parsed, processor)
    items.sort(key=lambda item: (parsed[item[0]].kind, lengths.get(item[0], 0)))

    sums = torch.zeros(len(rows), model.config.projection_dim)
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with logging.tqdm(total=len(items), disable=not show_progress, unit="row", desc="encode") as progress:
            for batch in _batches(items, parsed, batch_size):
                bad.update(_add_batch(model, processor, parsed, batch, sums, on_error))
                progress.update(len(batch))
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
    if not texts:
        return {}
    tokens = processor.tokenizer(list(texts.values()), verbose=False)["input_ids"]
    return dict(zip(texts, map(len, tokens)))


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


def _add_batch(model, processor, parsed, batch, sums, on_error):
    """Add each item's embedding to its row of `sums`; return the indices of rows whose image could not be read."""
    kind = parsed[batch[0][0]].kind
    bad, good, images = set(), [], []
    for index, n in batch:
        if "i" in kind:
            try:
                images.append(load_image(parsed[index].images[n]))
            except ImageError as error:
                if on_error == "raise":
                    raise ImageError(f"row {index}: {error}") from error
                bad.add(index)
                continue
        good.append(index)
    if good:
        texts = [parsed[index].text for index in good] if "t" in kind else None
        inputs = processor(images=images or None, text=texts, return_tensors="pt").to(model.device)
        embeds = model(**inputs, return_loss=False, return_dict=True)[EMBEDDING_OF_KIND[kind]]
        sums.index_add_(0, torch.tensor(good), embeds.float().cpu())
    return bad
