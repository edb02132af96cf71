"""A training step that trains all weights, LoRA adapters, or the gates of the fusion alone.

    python -m benchmarks.adapters                  # about 5 minutes
    python -m benchmarks.adapters --batch 16 --tower small --rounds 1

The step is that of `benchmarks/step.py`, of a CLIP ViT-B/32 with random weights, on one process, without GradCache. Its
memory is given twice: of the tensors that a step makes, counted one by one, and as the process's resident memory grows,
to which the allocator of the C library adds what it can't hand back. The optimiser's, two numbers for each trained
parameter in AdamW, comes on top, as `trained` tells. That LoRA's gradient is right is tested in
`tests/training/test_lora.py`.
"""

import argparse
import json
from pathlib import Path

from benchmarks.protocol import RESULTS, environment, measure_rounds, run_worker, summarise, write_result
from benchmarks.step import IMAGE_SIZE, SEED, TEXT_LENGTH, TOWERS, build_model, measure_step, run_step
from universal_gcl.training.memory import count_peak

WAYS = ("all", "lora", "gates")


def measure_both(training_step, model, inputs):
    measurement = measure_step(training_step, model, inputs)
    model.zero_grad()
    tensors = count_peak(lambda: training_step(inputs), [*model.parameters(), *model.buffers()])
    return measurement | {"tensors": tensors}


def work(tower, batch, trained):
    print(json.dumps(run_step(tower, batch, None, measure_both, trained)), flush=True)


def trained_parameters(tower, trained):
    return sum(parameter.numel() for parameter in build_model(tower, trained).parameters() if parameter.requires_grad)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
        lambda trained: run_worker(__file__, task | {"trained": trained}, threads=arguments.threads),
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
