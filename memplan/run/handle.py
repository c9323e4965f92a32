"""The handle of a model under a plan: its record, its weights to read, and the way back."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from types import TracebackType

import torch
from torch import nn

from memplan.program.record import RunRecord
from memplan.program.schema import STAGING_BYTES, Plan
from memplan.run.arena import Arena, Placeholders
from memplan.run.checked import CheckedReads
from memplan.run.conductor import Conductor, Streamed
from memplan.run.disk import DiskReader
from memplan.run.guard import guard_of
from memplan.run.home import Home
from memplan.run.interrupts import held_back
from memplan.storages import StorageLedger
from memplan.weights import Weight


class Parts:
    """What a model under a plan runs on."""

    def __init__(self, plan: Plan, device: torch.device, weights: Mapping[str, Weight]) -> None:
        self.device = device
        self.weights = weights
        sizes = {tier: sum(a.size_bytes for a in plan.arenas if a.tier == tier) for tier in ("device", "host")}
        self.arena = Arena(sizes["device"], device)
        self.host = Arena(sizes["host"], torch.device("cpu"), pinned=device.type == "cuda")
        on_disk = any(item.home == "disk" for item in plan.items)
        self.host_bytes = sizes["host"] + (STAGING_BYTES if on_disk else 0)
        self.reader = DiskReader()
        self.placeholders = Placeholders(device)
        self.homes: dict[int, Home] = {}
        self.streamed: dict[int, Streamed] = {}
        self.conductor: Conductor
        self.checked: CheckedReads | None = None

    def kept(self) -> dict[int, Callable[[], torch.Tensor]]:
        """Return what reads each managed tensor from its home, by the tensor's id."""

        def reading(home: Home, index: int) -> Callable[[], torch.Tensor]:
            return lambda: home.tensor(home.block.tensors[index])

        return {
            id(self.weights[tensor.name].tensor): reading(home, index)
            for home in self.homes.values()
            for index, tensor in enumerate(home.block.tensors)
        }


class Handle:
    """A model under a plan. ``detach`` gives it back; so does leaving the ``with`` block."""

    def __init__(self, model: nn.Module, plan: Plan, parts: Parts) -> None:
        self.model = model
        self.plan = plan
        self._parts: Parts | None = parts
        """None once detached: the arenas go, though the handle may stay for its record."""
        self.undo = ExitStack()
        """What ``detach`` unwinds."""
        self._vram_peak_bytes = 0
        self._readers = 0
        self._last: tuple[RunRecord, int] | None = None

    @property
    def record(self) -> RunRecord:
        """What was measured so far. ``vram_peak_bytes`` on the CPU is that of the steps inside ``watch_memory``."""
        return self._measured()[0]

    @property
    def checked_reads(self) -> int:
        """Saved weights that the checked mode looked at again; 0 outside it."""
        return self._measured()[1]

    def _measured(self) -> tuple[RunRecord, int]:
        parts = self._parts
        if parts is None:
            assert self._last is not None
            return self._last
        peak = self._vram_peak_bytes
        if parts.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(parts.device)
        record = parts.conductor.record(vram_peak_bytes=peak, ram_peak_bytes=parts.host_bytes)
        return record, parts.checked.checked if parts.checked else 0

    @contextlib.contextmanager
    def watch_memory(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Count live device bytes in the steps inside (CPU: slower there by a Python call an operator).

        The state of ``optimizer`` that exists already counts too.
        """
        parts = self._parts
        if parts is None or parts.device.type == "cuda":
            yield
            return
        with StorageLedger.of_training(self.model, optimizer, parts.arena.bytes) as ledger:
            yield
        self._vram_peak_bytes = max(self._vram_peak_bytes, ledger.peak_bytes)

    @contextlib.contextmanager
    def materialise(self) -> Iterator[nn.Module]:
        """Have every weight readable inside: where it lies in RAM, or mapped from disk. Only read them, call nothing.

        On exit what is streamed is away again.
        """
        parts = self._parts
        if parts is None:
            yield self.model
            return
        if not self._readers:
            parts.conductor.pause("inside materialise")
        self._readers += 1
        try:
            for block in parts.streamed:
                home = parts.homes[block]
                for tensor in home.block.tensors:
                    parts.weights[tensor.name].point(home.tensor(tensor))
            yield self.model
        finally:
            self._readers -= 1
            if not self._readers and self._parts is not None:
                for streamed in parts.streamed.values():
                    streamed.unpoint()
                parts.conductor.resume()

    def detach(self) -> nn.Module:
        """Give the model back as it was and return it: the same parameters with their weights, no hooks.

        A forward before it can have no backward after it. Raises TransferError where a block cannot be read from disk.
        """
        if self._parts is not None:
            with held_back():
                self._last = self._measured()
                self._parts = None
                self.undo.close()
        return self.model

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def handle_of(model: nn.Module) -> Handle | None:
    """Return the handle of a model that is attached, whole or in part, or None."""
    for module in model.modules():
        guard = guard_of(module)
        if guard is not None and guard.handle is not None:
            return guard.handle
    return None


@contextlib.contextmanager
def materialise(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which all weights of ``model`` are readable: for looking at them, comparing, hashing.

    Takes no memory: weights are read where they lie, in RAM or mapped from disk. A model that is not attached is left
    alone. Raises RunError where the model is called inside.
    """
    handle = handle_of(model)
    if handle is None:
        yield model
        return
    with handle.materialise():
        yield model
