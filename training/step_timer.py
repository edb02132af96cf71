"""Where the time of training steps goes: waiting for data, the encoder, the loss.

On an accelerator the parts are bounded by events on its stream, which are read only when an entry is logged: nothing
waits for the device because it is measured. A part then lasts from when the device reaches its begin to when it reaches
its end, so that time in which the host runs ahead is nobody's, and waiting for data is time in which the device idles.
"""

import time
from collections import defaultdict
from contextlib import contextmanager

import torch
from transformers import TrainerCallback

PARTS = ("data_wait", "encoder", "loss")


class StepTimer:
    """
    Args:
        device (`torch.device`): where the model is.
    """

    def __init__(self, device: torch.device):
        module = torch.get_device_module(device) if device.type != "cpu" else None
        self._event = getattr(module, "Event", None)
        self._spans: dict[str, list] = defaultdict(list)
        self._step_began = None
        self._pairs = 0

    @contextmanager
    def measure(self, part: str):
        """A context whose time counts for `part`, one of `PARTS`."""
        began = self._now()
        try:
            yield
        finally:
            self._spans[part].append((began, self._now()))

    def begin_step(self):
        """To be called before the batches of an optimiser step are fetched."""
        self._step_began = self._now()

    def end_step(self):
        """To be called after the optimiser's step; what comes until the next `begin_step` (evaluation, saving) counts
        for no step."""
        if self._step_began is not None:
            self._spans["step"].append((self._step_began, self._now()))
            self._step_began = None

    def add_pairs(self, number: int):
        """Count pairs trained on, of all processes."""
        self._pairs += number

    def pop_shares(self) -> dict[str, float]:
        """Shares of the time of the steps ended since the last call, `share_data_wait`, `share_encoder` and
        `share_loss` (the rest is the optimiser and the host), and `pairs_per_second`; empty if no step has ended."""
        spans, self._spans = self._spans, defaultdict(list)
        pairs, self._pairs = self._pairs, 0
        seconds = sum(self._seconds(*span) for span in spans["step"])
        if not seconds:
            return {}
        shares = {f"share_{part}": sum(self._seconds(*span) for span in spans[part]) / seconds for part in PARTS}
        return shares | {"pairs_per_second": pairs / seconds}

    def _now(self):
        if self._event is None:
            return time.perf_counter()
        event = self._event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, began, ended):
        if self._event is None:
            return ended - began
        ended.synchronize()
        return began.elapsed_time(ended) / 1000


class StepTimerCallback(TrainerCallback):
    """Ends a timed step when its weights have changed."""

    def __init__(self, timer: StepTimer):
        self.timer = timer

    def on_step_end(self, args, state, control, **kwargs):
        self.timer.end_step()
