"""The steps of a training as lines that people can read:

    step  25/60   epoch 1.67   loss 3.2091   1/τ 14.27   lr 2.1e-04   21 pairs/s   00:42 left

A line is printed for every log entry (`logging_steps`). On a terminal, a bar below them moves with every step unless
`disable_tqdm` is set. Only the first process prints.
"""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback


class StepLines(TrainerCallback):
    """Prints a line for each log entry, instead of Trainer's dictionaries."""

    def __init__(self) -> None:
        self.bar: tqdm | None = None
        self.first_step = 0
        self.started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.first_step, self.started = state.global_step, time.monotonic()
        if state.is_world_process_zero and sys.stderr.isatty() and not args.disable_tqdm:
            options = {"total": state.max_steps, "initial": state.global_step, "leave": False, "dynamic_ncols": True}
            self.bar = tqdm(desc="training", unit=" steps", **options)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or not logs:
            return
        line = None
        if "loss" in logs:
            done = state.global_step - self.first_step
            seconds = (time.monotonic() - self.started) / max(done, 1) * (state.max_steps - state.global_step)
            line = step_line(logs, state.global_step, state.max_steps, seconds)
        elif "eval_headline_mean" in logs:
            line = evaluation_line(logs)
        if line is not None:
            with tqdm.external_write_mode(file=sys.stdout):
                print(line, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def use_step_lines(trainer: Trainer) -> None:
    """Let a trainer print lines instead of dictionaries and its own bar."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)
    trainer.add_callback(StepLines())


def step_line(logs: dict[str, Any], step: int, steps: int, seconds_left: float) -> str:
    """A log entry of a step as one line; figures that the entry lacks are left out."""
    parts = [f"step {step:>{len(str(steps))}}/{steps}"]
    parts += [f"epoch {logs['epoch']:.2f}"] if "epoch" in logs else []
    parts.append(f"loss {logs['loss']:.4f}")
    parts += [f"1/τ {logs['logit_scale']:.2f}"] if "logit_scale" in logs else []
    parts += [f"lr {logs['learning_rate']:.1e}"] if "learning_rate" in logs else []
    parts += [f"{logs['pairs_per_second']:,.0f} pairs/s"] if "pairs_per_second" in logs else []
    parts += [f"{tqdm.format_interval(seconds_left)} left"] if step < steps else []
    return "   ".join(parts)


def evaluation_line(logs: dict[str, Any]) -> str:
    """The headline of an evaluation as one line."""

    def percent(name: str) -> str:
        value = logs.get(f"eval_{name}")
        return "–" if value is None else f"{100 * value:.1f} %"

    line = (
        f"evaluated: hit@10 {percent('headline_mean')} (local pool {percent('headline_local')}, global pool "
        f"{percent('headline_global')})"
    )
    mixed = logs.get("eval_mixed_ndcg@10")  # None if the pairs have too few captions
    return line if mixed is None else f"{line}, mixed nDCG@10 {100 * mixed:.1f} %"
