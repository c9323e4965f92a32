"""Whether a layer that is run again in backward computes what it did the first time.

A forward may read what no one can keep for it: a global, a context variable, a mode or a patch around it, another
module's attribute. So checksums of what it saves are compared as backward takes it: of all layers in their first
passes, where what a script does in each shows, and later of two layers in turn, or two in :data:`MOST`, since what is
around a forward is around them all (the first may save nothing that depends on it). Frozen weights are left out, of
which others hear when they are written to, and what a GPU's kernels keep of random numbers, which is never written
where there are none.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn

from memplan.errors import RunError
from memplan.hooks.compiled import untraced_deep
from memplan.hooks.recompute import hooked, hooks_around

FIRST = 4
"""Passes in which all layers are looked at."""
MOST = 32
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_ROW, _ROWS = 512, 256
"""Words of a row, and rows of a part: 1 MiB."""
_PLACES = np.arange(1, _ROW + 1)
_KINDS = (torch.Tensor, nn.Parameter)


class Turns:
    """The layers of one model that take turns, and what a GPU has not told yet."""

    def __init__(self, is_weight: Callable[[int], bool]) -> None:
        """``is_weight``: whether a frozen weight lies at an address."""
        self.is_weight = is_weight
        self.count = 0
        self._untold: list[tuple[str, torch.Tensor, torch.Event]] = []
        """Whether a checksum differed, on its way to the host."""

    def later(self, name: str, differs: torch.Tensor) -> None:
        """Have a GPU's answer looked at once it is there."""
        told = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(differs, non_blocking=True)
        event = torch.Event(differs.device)
        event.record()
        self._untold.append((name, told, event))

    def look(self) -> None:
        """Raise RunError where an answer that is there by now says that something differed."""
        while self._untold and self._untold[0][2].query():
            name, told, _ = self._untold.pop(0)
            if told:
                raise refusal(name)


class SameAgain:
    """Looks at one layer."""

    def __init__(self, name: str, turns: Turns) -> None:
        self._name = name
        self._turns = turns
        self._turn = -1
        """Its place among those that have turns: a layer joins once it has saved something."""
        self._calls = 0

    def begin(self) -> Callable[[], Any] | None:
        """Note that a forward begins that may be run again. Return what makes the context for its first run, where it
        is looked at.
        """
        self._turns.look()
        self._calls += 1
        if self._calls <= FIRST:
            return self._compared_at_once
        every = min(self._turns.count, MOST)
        if self._turn >= 0 and (self._calls + self._turn) % every in (0, every // 2):
            return self._compared
        return None

    def _compared_at_once(self) -> Any:
        return self._compared(at_once=True)

    @contextmanager
    def _compared(self, *, at_once: bool = False) -> Iterator[None]:
        """Compare what backward takes of what the forward saves inside: RunError is raised there."""
        around = hooks_around()
        if around is None:
            yield
            return

        def pack(tensor: torch.Tensor) -> Any:
            return around[0](tensor), self._sum(tensor)

        def unpack(packed: Any) -> Any:
            value, first = around[1](packed[0]), packed[1]
            if first is not None and (second := self._sum(value)) is not None:
                self._compare(first, second, at_once=at_once)
            return value

        with hooked(untraced_deep(pack), untraced_deep(unpack)):
            yield

    def _sum(self, tensor: torch.Tensor) -> Any:
        """Return a checksum that depends on the places of the elements too; None of what is not compared."""
        if type(tensor) not in _KINDS or tensor.layout is not torch.strided or tensor.is_nested:
            return None
        on_cpu = tensor.device.type == "cpu"
        is_seed = tensor.dtype is torch.uint64 or (tensor.dtype is torch.int64 and tensor.dim() == 0)
        if (is_seed and not on_cpu) or self._turns.is_weight(tensor.data_ptr()):
            return None
        if self._turn < 0:
            self._turn, self._turns.count = self._turns.count, self._turns.count + 1
        if tensor._is_zerotensor():  # autograd's own, which has no memory
            return None
        plain = tensor.detach().resolve_conj().resolve_neg()
        plain = torch.view_as_real(plain) if plain.dtype is torch.complex128 else plain
        bits = plain.view(_BITS[plain.element_size()])
        if on_cpu:
            return checksum(bits.numpy()), tuple(bits.shape)  # no tensor's memory is taken
        rows = bits.reshape(-1, bits.shape[-1] if bits.dim() and bits.numel() else 1)
        sums = [rows.sum(dim, dtype=torch.int64) for dim in (0, 1)]
        return sum((part * torch.arange(1, len(part) + 1, device=part.device)).sum() for part in sums)

    def _compare(self, first: Any, second: Any, *, at_once: bool) -> None:
        differs = first != second
        if isinstance(differs, torch.Tensor) and differs.device.type != "cpu" and not at_once:
            self._turns.later(self._name, differs)
        elif differs:
            raise refusal(self._name)


def checksum(values: np.ndarray[Any, Any]) -> int:
    """Return a number that tells arrays apart whose elements differ, or lie elsewhere: sums over rows and over columns
    of words, weighted by their places, while a part is in the cache. 2.8 times as fast as zlib's CRC.
    """
    data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
    whole = data.size // (8 * _ROW) * (8 * _ROW)
    total = zlib.crc32(data[whole:].data)
    words = data[:whole].view(np.int64).reshape(-1, _ROW)
    for begin in range(0, len(words), _ROWS):
        part = words[begin : begin + _ROWS]
        found = int(part.sum(axis=0) @ _PLACES) + int(part.sum(axis=1) @ _PLACES[: len(part)])
        total = (31 * total + found) % (1 << 64)
    return total


def refusal(name: str) -> RunError:
    return RunError(
        f"the forward of {name} computed something else when the plan ran it a second time, in backward: it reads what "
        "has changed since, such as a global, a context around the forward, or another module's attribute, or is not "
        "the same twice by itself. Keep what it reads as it is until backward() has ended, or plan with "
        'activations="keep"'
    )
