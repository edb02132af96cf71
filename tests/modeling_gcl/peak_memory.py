"""Print the peak resident bytes of one loss, forward and backward, beyond embeddings and gradients; and theirs.

Usage: python tests/modeling_gcl/peak_memory.py gcl|masked|alignclip|matryoshka NUM_PAIRS DIM
"""

import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from modeling_gcl import alignclip_loss, gcl_loss


def resident(which):
    """Bytes of VmRSS (now) or VmHWM (the peak; unlike getrusage's, a parent's does not pass to its children)."""
    return 1024 * int(re.search(rf"{which}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def step(loss, n, d):
    embeds = [F.normalize(torch.randn(n, d), dim=-1).requires_grad_() for _ in range(3)]
    for x in embeds:
        x.grad = torch.zeros_like(x)
    before = resident("VmRSS")
    if loss == "gcl":
        result = gcl_loss(*embeds, 20.0)
    elif loss == "masked":
        result = gcl_loss(*embeds, 20.0, ids=torch.arange(n) // 5, caption_ids=torch.arange(n) % (n // 2))
    elif loss == "matryoshka":
        result = gcl_loss(*embeds, 20.0, matryoshka_dims=[d // 2, d // 4, d // 8])
    else:
        result = alignclip_loss(*embeds[:2], 20.0)
    result.backward()
    return resident("VmHWM") - before, 3 * n * d * 4


if __name__ == "__main__":
    torch.set_num_threads(1)
    step(sys.argv[1], 600, 8)  # code and libraries are loaded now
    print(*step(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
