"""The chunks of a batch: few pairs each, of like text length, with no more padding than their longest text needs."""

from dataclasses import dataclass
from typing import Any

import torch

# inputs with one column per token
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass
class Chunk:
    """Some pairs of a micro-batch, copied out of it only on demand.

    Args:
        batch_inputs (`dict[str, torch.Tensor]`): the micro-batch, one row per pair.
        labels (`dict[str, torch.Tensor]`): of the chunk's own pairs, each of shape `(n,)`.
        rows (`torch.Tensor` of shape `(n,)`, int64, *optional*): the chunk's pairs; by default the whole micro-batch.
        num_tokens (`int`, *optional*): columns that its texts need; by default all.
    """

    batch_inputs: dict
    labels: dict
    rows: torch.Tensor | None = None
    num_tokens: int | None = None

    def inputs(self):
        """The model's inputs for these pairs."""
        if self.rows is None:
            return self.batch_inputs
        inputs = {name: values[self.rows] for name, values in self.batch_inputs.items()}
        return {
            name: values[:, : self.num_tokens] if name in TEXT_INPUTS else values for name, values in inputs.items()
        }


def split_batch(inputs, labels, size=None, trim_texts=True):
    """
    Split a micro-batch into chunks of equal length, give or take one pair.

    Pairs are sorted by the length of their texts, and columns in which all texts of a chunk are masked are cut off at
    the right: text towers give the same without them, except those trained on texts of one length. Texts without a
    mask, or padded at the left, are not touched.

    Args:
        inputs (`dict[str, torch.Tensor]`): the model's inputs, one row per pair.
        labels (`dict[str, torch.Tensor]`): what else goes with the pairs, each of shape `(n,)`.
        size (`int`, *optional*): most pairs of a chunk; by default all are one.
        trim_texts (`bool`): False where the text tower needs texts of one length.

    Returns:
        `list[Chunk]`, shortest texts first. A micro-batch that fits in one chunk is that chunk as it is.
    """
    num_pairs = len(next(iter(inputs.values())))
    if size is None or num_pairs <= size:
        return [Chunk(inputs, labels)]
    mask = inputs.get("attention_mask") if trim_texts else None
    if mask is None:
        order, lengths = torch.arange(num_pairs), None
    else:
        columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        # the last real token: where padding is at the left that is the last column
        lengths, order = (mask.ne(0) * columns).amax(1).cpu().sort(stable=True)
    chunks = []
    for part in torch.arange(num_pairs).tensor_split(-(-num_pairs // size)):
        num_tokens = None if lengths is None else max(1, lengths[part[-1]].item())
        rows = order[part].to(next(iter(inputs.values())).device)
        own_labels = {name: values[rows] for name, values in labels.items()}
        chunks.append(Chunk(inputs, own_labels, rows, num_tokens))
    return chunks


def widen_texts(inputs, num_tokens):
    """`inputs` with texts of at least `num_tokens` columns, the last one repeated: they take a long text's memory."""
    widened = {}
    for name, values in inputs.items():
        missing = num_tokens - values.shape[1] if name in TEXT_INPUTS else 0
        widened[name] = torch.cat([values, values[:, -1:].expand(-1, missing)], 1) if missing > 0 else values
    return widened


def most_tokens(processor: Any) -> int:
    """The most tokens that a text of this processor may have; 0 if that is not known."""
    tokenizer = getattr(processor, "tokenizer", None)
    limit = getattr(processor, "max_text_length", None) or getattr(tokenizer, "model_max_length", 0)
    return limit if limit < 1_000_000 else 0  # tokenizers without a limit state 10^30
