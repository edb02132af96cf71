"""The states of the random number generators, to draw the same numbers again."""

import torch


class RandomState:
    """The current states of the generators that a forward pass uses: the CPU's and the device's."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.on_cpu = torch.get_rng_state()
        self.on_device = None if device.type == "cpu" else torch.get_device_module(device).get_rng_state(device)

    def restore(self) -> None:
        """Set the generators back to these states."""
        torch.set_rng_state(self.on_cpu)
        if self.on_device is not None:
            torch.get_device_module(self.device).set_rng_state(self.on_device, self.device)
