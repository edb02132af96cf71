"""The learned temperature τ of the contrastive loss, as log(1/τ)."""

import math

import torch
from torch import nn


class LogitScale(nn.Module):
    """The learned temperature, log(1/τ). A module, so that PEFT's `modules_to_save` trains and saves it."""

    def __init__(self, initial, maximum):
        super().__init__()
        self.initial, self.maximum = math.log(initial), math.log(maximum)
        self.log_scale = nn.Parameter(torch.tensor(self.initial, dtype=torch.float32))

    def forward(self):
        """1/τ as a float32 scalar, at most the configured maximum."""
        return self.log_scale.float().clamp(max=self.maximum).exp()

    @torch.no_grad()
    def reset_(self):
        """Go back to the configured initial value."""
        self.log_scale.fill_(self.initial)

    @torch.no_grad()
    def clamp_(self):
        """Bring the parameter back to its bound after an optimiser step, so that its gradient never dies there."""
        self.log_scale.clamp_(max=self.maximum)
