"""A model whose embeddings a test chooses, so that rankings and metrics can be worked out by hand."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from modeling_gcl import ImageError


class PlantedModel:
    """Takes the place of a `GCLModel` for `universal_gcl.retrieval.embed.embed_rows`.

    Args:
        embed: the vector of a row, as a function of the row (it is normalised); a dict serves text rows. A row for
            which it raises KeyError counts as one that can't be read.
    """

    device = torch.device("cpu")

    def __init__(self, embed):
        self.embed = (lambda row: embed[row["text"]]) if isinstance(embed, dict) else embed
        self.calls = []
        self.config = SimpleNamespace(to_dict=lambda: {"planted": True})

    def eval(self):
        return self

    def state_dict(self):
        return {"planted": torch.zeros(1)}

    def encode(self, rows, processor=None, *, on_error="raise", **_):
        vectors, kept = [], []
        for number, row in enumerate(rows):
            try:
                vectors.append(torch.tensor(self.embed(row), dtype=torch.float32))
                kept.append(number)
            except KeyError as error:
                if on_error == "raise":
                    raise ImageError(f"row {number}: nothing is planted for {error}") from error
        embeds = F.normalize(torch.stack(vectors), dim=-1) if vectors else torch.zeros(0, 2)
        return (embeds, kept) if on_error == "skip" else embeds
