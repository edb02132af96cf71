"""Two towers of a layer each in float64 under GradCache, and parts that run out of memory."""

import torch
from torch import nn

from universal_gcl.training.gradcache import GradCache


class Toy(nn.Module):
    def __init__(self):
        super().__init__()
        self.image, self.text = nn.Linear(5, 4), nn.Embedding(9, 4)
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.seen = []

    def forward(self, pixel_values, input_ids, attention_mask):
        self.seen.append((torch.is_grad_enabled(), pixel_values, self.drop(self.image(pixel_values))))
        text = (self.text(input_ids) * attention_mask[..., None]).sum(1)
        return self.seen[-1][2], text, self.scale


def toy():
    torch.manual_seed(0)
    return Toy().double()


def toy_batch(n, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(7) < torch.randint(1, 8, (n, 1), generator=generator)
    inputs = {
        "pixel_values": torch.randn(n, 5, generator=generator, dtype=torch.float64),
        "input_ids": torch.randint(0, 9, (n, 7), generator=generator),
        "attention_mask": mask.long(),
    }
    return inputs, {"ids": torch.randint(0, 4, (n,), generator=generator)}


def toy_loss(embeds, scale, labels):
    logits = scale * embeds[0] @ embeds[1].T / 10
    hidden = (labels["ids"][:, None] == labels["ids"]).fill_diagonal_(False)
    logits = logits.masked_fill(hidden, -torch.inf)
    return nn.functional.cross_entropy(logits, torch.arange(len(logits))), "terms"


def grad_cache(chunk_size, **settings):
    return GradCache(
        lambda model, inputs: model(**inputs), toy_loss, lambda scalar: scalar.backward(),
        device=torch.device("cpu"), chunk_size=chunk_size, **settings,
    )  # fmt: skip


def gradients(model, batches, chunk_size):
    model.zero_grad()
    grad_cache(chunk_size).step(model, batches)
    return {name: p.grad.clone() for name, p in model.named_parameters()}


class Failing:
    """A backward or forward that runs out of memory at the given calls, counted from 0."""

    def __init__(self, call, at, error=None):
        self.call, self.at, self.calls = call, set(at), 0
        self.error = error or torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    def __call__(self, *args):
        self.calls += 1
        if self.calls - 1 in self.at:
            raise type(self.error)(*self.error.args)  # a new one: it will hold the frames it came through
        return self.call(*args)
