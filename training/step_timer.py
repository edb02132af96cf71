"""Measures the time that training steps spend waiting for data, in the encoder, and in the loss.

On an accelerator, events on its stream mark the begin and end of each part. They are read only when an entry is logged,
so measuring never waits for the device. A part lasts from the moment the device reaches its begin until it reaches its
end: time in which the host runs ahead of the device is not counted, and waiting for data is time in which the device is
idle.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

PARTS = ("data_wait", "encoder", "loss")


class StepTimer:
    """
    Args:
        device (`torch.device`): where the model is.
    """

    def __init__(self, device: torch.device) -> None:
        module = torch.get_device_module(device) if device.type != "cpu" else None
        self._event = getattr(module, "Event", None)
        self._spans: dict[str, list] = defaultdict(list)
        self._step_began: Any = None
        self._pairs = 0

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """A context whose time is counted for `part`, one of `PARTS`."""
        began = self._now()
        try:
            yield
        finally:
            self._spans[part].append((began, self._now()))

    def begin_step(self) -> None:
        """Call it before the batches of an optimiser step are fetched."""
        self._step_began = self._now()

    def end_step(self) -> None:
        """Call it after the optimiser's step. The time until the next `begin_step` (evaluation, saving) is not
        counted."""
        if self._step_began is not None:
            self._spans["step"].append((self._step_began, self._now()))
            self._step_began = None

    def add_pairs(self, number: int) -> None:
        """Count pairs that all processes together trained on."""
        self._pairs += number

    def pop_shares(self) -> dict[str, float]:
        """How the time of the steps since the last call was spent: `share_data_wait`, `share_encoder` and `share_loss`
        (the rest is the optimiser and the host), and `pairs_per_second`. Empty if no step has ended."""
        spans, self._spans = self._spans, defaultdict(list)
        pairs, self._pairs = self._pairs, 0
        seconds = sum(self._seconds(*span) for span in spans["step"])
        if not seconds:
            return {}
        shares = {f"share_{part}": sum(self._seconds(*span) for span in spans[part]) / seconds for part in PARTS}
        return shares | {"pairs_per_second": pairs / seconds}

    def _now(self) -> Any:
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began: Any, ended: Any) -> float:
        if self._event is None:
            return ended - began
        ended.synchronize()
        return began.elapsed_time(ended) / 1000


class StepTimerCallback(TrainerCallback):
    """Ends a timed step after its weights have changed."""

    def __init__(self, timer: StepTimer) -> None:
        self.timer = timer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.timer.end_step()
