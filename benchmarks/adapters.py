"""A training step that trains all weights, LoRA adapters, or the gates of the fusion alone.

    python -m benchmarks.adapters                  # about 5 minutes
    python -m benchmarks.adapters --batch 16 --tower small --rounds 1

The step is that of `benchmarks/step.py`: a CLIP ViT-B/32 with random weights, in one process, without GradCache. Its
memory is measured in two ways. `tensors` counts the tensors that a step creates, one by one. `bytes` is the growth of
the process's resident memory, which also includes what the C library's allocator can't hand back. The optimiser's state
comes on top: AdamW keeps two numbers for each of the `trained` parameters. `tests/training/test_lora.py` tests that
LoRA's gradient is right.
"""

import argparse
import json
from pathlib import Path

import torch

from benchmarks.measurement import (
    RESULTS,
    Measurement,
    argument_parser,
    environment,
    measure_rounds,
    run_worker,
    summarise,
    write_result,
)
from benchmarks.step import IMAGE_SIZE, SEED, TEXT_LENGTH, TOWERS, TrainingStep, build_model, measure_step, run_step
from universal_gcl.training.memory import count_peak

WAYS = ("all", "lora", "gates")


def measure_both(training_step: TrainingStep, model: torch.nn.Module, inputs: dict) -> Measurement:
    """Time and both memories of a step."""
    measurement = measure_step(training_step, model, inputs)
    model.zero_grad()
    tensors = count_peak(lambda: training_step(inputs), [*model.parameters(), *model.buffers()])
    return measurement | {"tensors": tensors}


def work(tower: str, batch: int, trained: str) -> None:
    """A worker's task."""
    print(json.dumps(run_step(tower, batch, None, measure_both, trained)), flush=True)


def trained_parameters(tower: str, trained: str) -> int:
    """The number of parameters that are trained."""
    return sum(parameter.numel() for parameter in build_model(tower, trained).parameters() if parameter.requires_grad)


def main() -> None:
    parser = argument_parser("adapters", __doc__)
    parser.add_argument("--tower", choices=TOWERS, default="vit-b-32")
    parser.add_argument("--batch", type=int, default=256, help="pairs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "adapters.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(**json.loads(arguments.worker))
        return
    task = {"tower": arguments.tower, "batch": arguments.batch}
    settings = task | {"rounds": arguments.rounds, "image_size": IMAGE_SIZE, "text_length": TEXT_LENGTH}
    series = measure_rounds(
        lambda trained: run_worker("benchmarks.adapters", task | {"trained": trained}, threads=arguments.threads),
        WAYS,
        arguments.rounds,
    )
    rows = {
        name: {"trained": trained_parameters(arguments.tower, name)} | summarise(series[name], {"all": series["all"]})
        for name in WAYS
    }
    print(json.dumps(rows), flush=True)
    write_result(
        arguments.out, {"environment": environment(arguments.threads, SEED), "settings": settings, "rows": rows}
    )


if __name__ == "__main__":
    main()
