"""The learned temperature τ of the contrastive loss, stored as log(1/τ)."""

import math

import torch
from torch import nn


class LogitScale(nn.Module):
    """
    The learned temperature. It is a module, because PEFT's `modules_to_save` only trains and saves modules.

    Args:
        initial (`float`): initial value of 1/τ.
        maximum (`float`): largest value of 1/τ.
    """

    def __init__(self, initial: float, maximum: float) -> None:
        super().__init__()
        self.initial, self.maximum = math.log(initial), math.log(maximum)
        self.log_scale = nn.Parameter(torch.tensor(self.initial, dtype=torch.float32))

    def forward(self) -> torch.Tensor:
        """1/τ as a float32 scalar, at most `maximum`."""
        return self.log_scale.float().clamp(max=self.maximum).exp()

    @torch.no_grad()
    def reset_(self) -> None:
        """Set 1/τ to `initial`."""
        self.log_scale.fill_(self.initial)

    @torch.no_grad()
    def clamp_(self) -> None:
        """Limit the parameter to the maximum. Call it after each optimiser step: above the maximum, the parameter would
        get no gradient."""
        self.log_scale.clamp_(max=self.maximum)
