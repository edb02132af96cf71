"""Whether bfloat16 is slow on this CPU.

A processor without AVX512-BF16 or AMX emulates bfloat16, and training in it can take many times as long as in float32.
Training warns about that and goes on as the recipe says; see docs/decisions.md.
"""

import logging
import time

import torch
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

SLOW = 1.5  # times as long as in float32
SIZE = 512  # of the matrices; a product takes milliseconds
ROUNDS = 3


def bfloat16_slowdown() -> float:
    """How many times as long a matrix product takes on the CPU in bfloat16 as in float32; best of three rounds."""
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(SIZE, SIZE, dtype=dtype)
        torch.mm(matrix, matrix)  # the first call sets up kernels
        rounds = []
        for _ in range(ROUNDS):
            started = time.perf_counter()
            torch.mm(matrix, matrix)
            rounds.append(time.perf_counter() - started)
        seconds[dtype] = min(rounds)
    return seconds[torch.bfloat16] / seconds[torch.float32]


def warn_if_bfloat16_is_slow(arguments: TrainingArguments) -> None:
    """Measure and warn, if the recipe asks for bf16 on a CPU that is slow in it. Only the first process does."""
    if not arguments.bf16 or arguments.device.type != "cpu" or arguments.process_index > 0:
        return
    slowdown = bfloat16_slowdown()
    if slowdown >= SLOW:
        logger.warning(
            f"this CPU is slow in bfloat16: a matrix product takes {slowdown:.1f} times as long as in float32. "
            "Training goes on in bf16, as the recipe says. --bf16 false trains in float32, with slightly other figures"
        )
