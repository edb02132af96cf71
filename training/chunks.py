"""Splits a batch into chunks of few pairs, with texts of similar length and no padding that a chunk can do without."""

from dataclasses import dataclass

import torch

# inputs with one column per token
TEXT_INPUTS = ("input_ids", "attention_mask", "token_type_ids", "position_ids")


@dataclass
class Chunk:
    """Some pairs of a micro-batch, which are copied only when `inputs` is called.

    Args:
        batch_inputs (`dict[str, torch.Tensor]`): the micro-batch, one row per pair.
        labels (`dict[str, torch.Tensor]`): labels of the chunk's own pairs, each of shape `(n,)`.
        rows (`torch.Tensor` of shape `(n,)`, int64, *optional*): the chunk's pairs; by default the whole micro-batch.
        num_tokens (`int`, *optional*): columns that its texts need; by default all.
    """

    batch_inputs: dict[str, torch.Tensor]
    labels: dict[str, torch.Tensor]
    rows: torch.Tensor | None = None
    num_tokens: int | None = None

    def inputs(self) -> dict[str, torch.Tensor]:
        """The model's inputs for these pairs."""
        if self.rows is None:
            return self.batch_inputs
        inputs = {name: values[self.rows] for name, values in self.batch_inputs.items()}
        return {
            name: values[:, : self.num_tokens] if name in TEXT_INPUTS else values for name, values in inputs.items()
        }


def split_batch(
    inputs: dict[str, torch.Tensor],
    labels: dict[str, torch.Tensor],
    size: int | None = None,
    trim_texts: bool = True,
) -> list[Chunk]:
    """
    Split a micro-batch into chunks whose sizes differ by one pair at most.

    Pairs are sorted by the length of their texts. Columns at the right in which all texts of a chunk are masked are cut
    off: text towers give the same results without them, except those trained on texts of one length. Texts without a
    mask, or padded on the left, keep all columns.

    Args:
        inputs (`dict[str, torch.Tensor]`): the model's inputs, one row per pair.
        labels (`dict[str, torch.Tensor]`): the labels of the pairs, each of shape `(n,)`.
        size (`int`, *optional*): the most pairs of a chunk; by default all pairs are one chunk.
        trim_texts (`bool`): False if the text tower needs texts of one length.

    Returns:
        `list[Chunk]`, shortest texts first. A micro-batch that fits in one chunk becomes that chunk unchanged.
    """
    num_pairs = len(next(iter(inputs.values())))
    if size is None or num_pairs <= size:
        return [Chunk(inputs, labels)]
    mask = inputs.get("attention_mask") if trim_texts else None
    if mask is None:
        order, lengths = torch.arange(num_pairs), None
    else:
        columns = torch.arange(1, mask.shape[1] + 1, device=mask.device)
        # the position of the last real token: with padding on the left this is the last column
        lengths, order = (mask.ne(0) * columns).amax(1).cpu().sort(stable=True)
    chunks = []
    for part in torch.arange(num_pairs).tensor_split(-(-num_pairs // size)):
        num_tokens = None if lengths is None else max(1, int(lengths[part[-1]]))
        rows = order[part].to(next(iter(inputs.values())).device)
        own_labels = {name: values[rows] for name, values in labels.items()}
        chunks.append(Chunk(inputs, own_labels, rows, num_tokens))
    return chunks


def widen_texts(inputs: dict[str, torch.Tensor], num_tokens: int) -> dict[str, torch.Tensor]:
    """`inputs` with texts of at least `num_tokens` columns, which take the memory of a long text. The last column is
    repeated."""
    widened = {}
    for name, values in inputs.items():
        missing = num_tokens - values.shape[1] if name in TEXT_INPUTS else 0
        widened[name] = torch.cat([values, values[:, -1:].expand(-1, missing)], 1) if missing > 0 else values
    return widened
