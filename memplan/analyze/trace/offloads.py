"""Offloading as the trace has it: what goes away is no longer counted, what comes back lies in memory of the plan's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import _disable_current_modes

from memplan.analyze.trace.recorder import Recorder
from memplan.hooks.offload import Layout, copy_of
from memplan.units import align_up


class Offloads:
    """How many bytes each module's forward saves that would be offloaded."""

    def __init__(self, recorder: Recorder, mode: FakeTensorMode) -> None:
        self.size_bytes: dict[str, int] = {}
        """By module: the most of its forwards."""
        self._recorder = recorder
        self._mode = mode

    def beginning(self, module: str) -> Callable[[], _Call]:
        """Return what begins a forward of ``module``."""
        return lambda: _Call(module, self.size_bytes, self._recorder, self._mode)


class _Call:
    """A :class:`memplan.hooks.offload.Call` on fake tensors."""

    def __init__(self, module: str, size_bytes: dict[str, int], recorder: Recorder, mode: FakeTensorMode) -> None:
        self._module = module
        self._size_bytes = size_bytes
        self._recorder = recorder
        self._mode = mode
        self._used = 0
        self._kept: dict[int, torch.Tensor] = {}

    def is_outside(self, tensor: torch.Tensor) -> bool:
        return self._recorder.is_ignored(tensor)

    def take(self, tensor: torch.Tensor) -> int:
        size_bytes = align_up(tensor.untyped_storage().nbytes())
        with _disable_current_modes(), self._mode:
            kept = torch.empty(size_bytes, dtype=torch.uint8)
        self._recorder.ignore(kept)
        offset = self._used
        self._kept[offset] = kept
        self._used += size_bytes
        return offset

    def give(self, offset_bytes: int, like: Layout) -> torch.Tensor:
        return copy_of(self._kept[offset_bytes], like)

    def ended(self) -> None:
        self._size_bytes[self._module] = max(self._size_bytes.get(self._module, 0), self._used)
