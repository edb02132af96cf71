"""A training step with GradCache against the plain one, and the loss of a batch that processes share.

    python -m benchmarks.step                 # about 8 minutes
    python -m benchmarks.step --batch 128 --chunk 32 --tower small --rounds 1

The step is `GCLTrainer.training_step` in float32: towers, loss and backward, without the optimiser. The model is a CLIP
ViT-B/32 with random weights on images of 96 pixels and texts of 16 tokens. It runs in one process, and under torchrun
in several that share the machine and the batch. The shared loss is also measured alone, with one thread per process,
with gathered rows and with the half ring; its time is that of the slowest process. Two gates must pass: GradCache's
gradient equals that of the plain step, and a process's gradient of the shared loss equals that of the whole batch in
float64.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import CLIPConfig, CLIPModel

from benchmarks.loss import SCALE, definition_of_gcl, make_embeds
from benchmarks.measurement import (
    RESULTS,
    Measurement,
    argument_parser,
    environment,
    measure,
    measure_rounds,
    run_worker,
    summarise,
    write_result,
)
from benchmarks.scaling import loss_flops
from modeling_gcl import GCLModel, gcl_loss
from universal_gcl.retrieval.processes import world_size
from universal_gcl.training.arguments import LoraArguments
from universal_gcl.training.distributed import BatchProcesses
from universal_gcl.training.freezing import freeze_parts
from universal_gcl.training.lora import add_lora
from universal_gcl.training.trainer import GCLTrainer
from universal_gcl.training.training_arguments import GCLTrainingArguments

SEED = 0
IMAGE_SIZE, TEXT_LENGTH = 96, 16
TOWERS = {  # layers; then of the image and of the text tower: width, width of the feed-forward layer, heads
    "vit-b-32": (12, (768, 3072, 12), (512, 2048, 8)),
    "small": (2, (64, 128, 2), (64, 128, 2)),
}
GATE_TOLERANCE = 1e-4

TrainingStep = Callable[[dict], Any]  # of a batch's inputs


# A step


def build_model(tower: str, trained: str = "all") -> torch.nn.Module:
    """A CLIP with random weights. `trained` is "all", "lora", or "gates" for only the gates of its fusion."""
    layers, *shapes = TOWERS[tower]
    vision, text = (
        {"num_hidden_layers": layers, "hidden_size": w, "intermediate_size": f, "num_attention_heads": h}
        for w, f, h in shapes
    )
    vision |= {"image_size": IMAGE_SIZE, "patch_size": 32}
    torch.manual_seed(SEED)
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=512))
    model = GCLModel.from_encoder(clip, fusion="gated_sum" if trained == "gates" else "sum")
    if trained == "gates":
        freeze_parts(model, ["image", "text", "logit_scale"])
    return add_lora(model, LoraArguments(), "unnamed") if trained == "lora" else model


class RandomPairs(torch.utils.data.Dataset):
    """Numbers from 0 on. `collate` makes a batch of random pairs of them."""

    def __init__(self, num_pairs: int):
        self.num_pairs = num_pairs

    def __len__(self) -> int:
        return self.num_pairs

    def __getitem__(self, index: int) -> int:
        return index

    def set_epoch(self, epoch: int) -> None:
        """Every epoch is the same."""

    @staticmethod
    def collate(indices: list[int]) -> dict[str, Any]:
        """A batch with one random pair for each index."""
        generator = torch.Generator().manual_seed(SEED + indices[0])
        n = len(indices)
        tokens = torch.randint(1000, 40000, (n, TEXT_LENGTH), generator=generator)
        tokens[:, -1] = 49407  # CLIP's end of text
        return {
            "pixel_values": torch.randn(n, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator),
            "input_ids": tokens,
            "attention_mask": torch.ones_like(tokens),
            "ids": torch.tensor(indices),
            "caption_ids": torch.tensor(indices),
            "broken": [],
        }


def run_step(
    tower: str,
    batch: int,
    chunk: int | None,
    use: Callable[[TrainingStep, torch.nn.Module, dict], Any],
    trained: str = "all",
) -> Any:
    """Train for one step with `batch` pairs per process and return what `use(training_step, model, inputs)` returns."""
    answers = []

    class UsedTrainer(GCLTrainer):
        def training_step(self, model: torch.nn.Module, inputs: dict, *more: Any) -> torch.Tensor:
            step = super().training_step
            answers.append(use(lambda inputs: step(model, dict(inputs), *more), model, inputs))
            return step(model, first_rows(inputs), *more)

    with tempfile.TemporaryDirectory() as folder:
        arguments = GCLTrainingArguments(
            output_dir=folder, per_device_train_batch_size=batch, max_steps=1, optim="sgd", save_strategy="no",
            eval_strategy="no", report_to="none", dataloader_num_workers=0, disable_tqdm=True, use_cpu=True, seed=SEED,
            grad_cache_chunk=chunk, ddp_backend="gloo" if distributed() else None,
        )  # fmt: skip
        trainer = UsedTrainer(
            model=build_model(tower, trained),
            args=arguments,
            train_dataset=RandomPairs(batch * arguments.world_size),
            data_collator=RandomPairs.collate,
        )
        trainer.train()
        assert world_size() == arguments.world_size and len(answers) == 1
    return answers[0]


def first_rows(inputs: dict, rows: int = 8) -> dict:
    """The first rows of a batch."""
    return {name: values[:rows] for name, values in inputs.items()}


def measure_step(training_step: TrainingStep, model: torch.nn.Module, inputs: dict) -> Measurement:
    """Time and memory of a step, of the slowest process."""

    def step() -> None:
        model.zero_grad()
        training_step(inputs)

    return slowest(measure(step, steps=1, warm_up=lambda: training_step(first_rows(inputs))))


def gradient_of_step(training_step: TrainingStep, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """The gradient of all parameters in one vector."""
    model.zero_grad()
    training_step(inputs)
    gradient = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    model.zero_grad()
    return gradient


def gate_step(tower: str, batch: int, chunk: int) -> dict[str, float]:
    """Relative error of GradCache's gradient against that of the plain step.

    Raises:
        SystemExit: it exceeds the tolerance.
    """
    plain, cached = (run_step(tower, batch, size, gradient_of_step) for size in (None, chunk))
    return {"gradient": within_tolerance("GradCache's gradient", cached, plain)}


# The loss that processes share


def shared_loss(embeds: list[torch.Tensor], half_ring: bool) -> None:
    """The loss of all processes' rows, forward and backward."""
    gcl_loss(*embeds, SCALE, processes=BatchProcesses(half_ring=half_ring)).backward()


def own_rows(num_pairs: int, dim: int) -> list[torch.Tensor]:
    """This process's share of N pairs."""
    rank, size = (dist.get_rank(), dist.get_world_size()) if distributed() else (0, 1)
    embeds = []
    for x in make_embeds(num_pairs, dim):
        x = x.detach().chunk(size)[rank].clone().requires_grad_()
        x.grad = torch.full_like(x, 0.0)
        embeds.append(x)
    return embeds


def measure_shared_loss(num_pairs: int, dim: int, half_ring: bool) -> Measurement:
    """Time and memory of the shared loss, of the slowest process."""
    embeds, small = own_rows(num_pairs, dim), own_rows(600, dim)
    if distributed():
        dist.barrier()
    return slowest(
        measure(lambda: shared_loss(embeds, half_ring), steps=2, warm_up=lambda: shared_loss(small, half_ring))
    )


def gate_shared_loss(half_ring: bool, num_pairs: int = 1100, dim: int = 64) -> dict[str, float]:
    """Relative error of the gradient of this process's rows, divided by the number of processes as DDP does."""
    embeds, whole = own_rows(num_pairs, dim), [x.detach().double() for x in make_embeds(num_pairs, dim)]
    for x in whole:
        x.requires_grad_()
    shared_loss(embeds, half_ring)
    definition_of_gcl(whole).backward()
    rank, size = (dist.get_rank(), world_size()) if distributed() else (0, 1)
    expected = torch.cat([x.grad.chunk(size)[rank] for x in whole])
    found = torch.cat([x.grad for x in embeds]).double() / size
    return {"gradient": within_tolerance("the shared loss's gradient", found, expected)}


# Both


def distributed() -> bool:
    """Whether this process runs under torchrun."""
    return torch.distributed.is_torchelastic_launched()


def slowest(measurement: Measurement) -> Measurement:
    """The measurement with the largest seconds and bytes of all processes."""
    if distributed():
        worst = torch.tensor([measurement["seconds"], measurement["bytes"]], dtype=torch.float64)
        dist.all_reduce(worst, dist.ReduceOp.MAX)
        measurement |= {"seconds": worst[0].item(), "bytes": int(worst[1])}
    return measurement


def within_tolerance(what: str, found: torch.Tensor, expected: torch.Tensor) -> float:
    """The relative error; raises SystemExit if it exceeds the tolerance."""
    error = ((found - expected).norm() / expected.norm()).item()
    if not error <= GATE_TOLERANCE:
        raise SystemExit(f"relative error of {what} is {error:.1e} > {GATE_TOLERANCE}")
    return error


TASKS: dict[str, Callable[..., Any]] = {
    "step": lambda tower, batch, chunk: run_step(tower, batch, chunk, measure_step),
    "gate_step": gate_step,
    "shared_loss": measure_shared_loss,
    "gate_shared_loss": gate_shared_loss,
}


def work(kind: str, **task: Any) -> None:
    """A worker's task. The first process prints its answer."""
    if kind.endswith("shared_loss") and distributed():
        dist.init_process_group("gloo")
    answer = TASKS[kind](**task)
    if not distributed() or dist.get_rank() == 0:
        print(json.dumps(answer), flush=True)
    if distributed():
        dist.barrier()
        dist.destroy_process_group()


def main() -> None:
    parser = argument_parser("step", __doc__)
    parser.add_argument("--tower", choices=TOWERS, default="vit-b-32")
    parser.add_argument("--batch", type=int, default=256, help="pairs of all processes together")
    parser.add_argument("--chunk", type=int, default=64, help="chunk size of GradCache")
    parser.add_argument("--pairs", type=int, default=4096, help="pairs of the shared loss")
    parser.add_argument("--dim", type=int, default=512, help="dimensions of the shared loss")
    parser.add_argument("--threads", type=int, default=2, help="threads of one process; several processes share them")
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(**json.loads(arguments.worker))
        return
    settings = {name: getattr(arguments, name) for name in ("tower", "batch", "chunk", "pairs", "dim", "rounds")}
    settings |= {"image_size": IMAGE_SIZE, "text_length": TEXT_LENGTH}
    result: dict[str, Any] = {"environment": environment(arguments.threads, SEED), "settings": settings, "gates": {}}
    result |= {"step": {}, "shared_loss": {}}

    def run(processes: int, threads: int, **task: Any) -> Measurement:
        return run_worker("benchmarks.step", task, threads=threads, processes=processes)

    for processes in arguments.processes:
        threads = max(1, arguments.threads // processes)
        gate = run(processes, threads, kind="gate_step", tower="small", batch=24, chunk=8)
        step = {"kind": "step", "tower": arguments.tower, "batch": arguments.batch // processes}
        series = measure_rounds(
            lambda name, n=processes, t=threads, step=step: run(
                n, t, chunk=arguments.chunk if name == "grad_cache" else None, **step
            ),
            ["plain", "grad_cache"],
            arguments.rounds,
        )
        rows = {name: summarise(series[name], {"plain": series["plain"]}) for name in series}
        result["gates"][f"step, {processes} processes"] = gate
        result["step"][str(processes)] = rows
        print(f"step, {processes} processes", json.dumps(rows), flush=True)
        write_result(arguments.out, result)

    ways = {f"{n} processes, {way}": (n, way) for n in arguments.processes for way in ("gather", "half_ring") if n > 1}
    ways = {"1 process": (1, "gather")} | ways
    for name, (processes, way) in ways.items():
        gate = run(processes, 1, kind="gate_shared_loss", half_ring=way == "half_ring")
        result["gates"][f"shared loss, {name}"] = gate
    task = {"kind": "shared_loss", "num_pairs": arguments.pairs, "dim": arguments.dim}
    series = measure_rounds(
        lambda name: run(ways[name][0], 1, half_ring=ways[name][1] == "half_ring", **task), ways, arguments.rounds
    )
    for name, (processes, way) in ways.items():
        flops = loss_flops(arguments.pairs, processes, arguments.dim, half_ring=way == "half_ring")
        row = summarise(series[name], {"1 process": series["1 process"]}, flops)
        result["shared_loss"][name] = {"processes": processes, "way": way, "expected_flops": flops} | row
    print("shared loss", json.dumps(result["shared_loss"]), flush=True)
    write_result(arguments.out, result)


if __name__ == "__main__":
    main()
