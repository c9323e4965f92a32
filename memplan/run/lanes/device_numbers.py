"""A device's own random numbers, where micro-batches take turns: each begins where the one before it will end.

A device's generator is a seed and an offset, by how much of which a pass goes on hangs on shapes alone, where no router
chooses among experts. So it is known from a pass of the same shapes; each lane has an offset of its own, exchanged as
the turn goes on, and where one has not ended at its next one's beginning the results are refused.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from memplan.hooks.nested import tensors_in


class DeviceNumbers:
    """The default generator of a device that is not the CPU."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self._device = device

    def at(self) -> tuple[int, int]:
        """Return its seed and its offset."""
        seed, offset = self._module.get_rng_state(self._device).view(torch.int64).tolist()
        return seed, offset

    def lane(self) -> int:
        """Return the offset of the micro-batch whose turn it is."""
        return self.at()[1]

    def be_lane(self, lane: int) -> None:
        """Go on with another micro-batch's."""
        state = self._module.get_rng_state(self._device).clone()
        state.view(torch.int64)[1] = lane
        self._module.set_rng_state(state, self._device)


def shapes_of(batch: object) -> Hashable:
    """Return what the offset hangs on; None of a batch in which no tensor is found."""
    return tuple((tensor.shape, tensor.dtype) for tensor in tensors_in(batch)) or None
