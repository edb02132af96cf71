"""The terms of the loss between two log entries."""

from collections import defaultdict
from collections.abc import Mapping

import torch


class LoggedTerms:
    """Adds up the terms of the loss and 1/τ, on the device, and gives their means over the optimiser steps."""

    def __init__(self) -> None:
        self._values: dict[str, list[torch.Tensor]] = defaultdict(list)
        self._num_steps = 0

    def add(
        self, terms: Mapping[str, torch.Tensor], logit_scale: torch.Tensor, *, num_batches: int, ends_step: bool
    ) -> None:
        """Add what a batch gave.

        Args:
            terms: name → detached scalar; logged as `loss_NAME`.
            logit_scale: detached scalar, 1/τ.
            num_batches: how many batches the loss of an optimiser step is averaged over.
            ends_step: whether the optimiser steps after this batch.
        """
        for name, term in terms.items():
            self._values[f"loss_{name}"].append(term / num_batches)
        self._values["logit_scale"].append(logit_scale / num_batches)
        self._num_steps += ends_step

    def pop_means(self) -> dict[str, float]:
        """The mean of each value over the steps since the last call."""
        means = {name: torch.stack(values).sum().item() / self._num_steps for name, values in self._values.items()}
        self.clear()
        return means

    def clear(self) -> None:
        """Forget everything that was added."""
        self._values.clear()
        self._num_steps = 0
