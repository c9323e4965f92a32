"""Whether a layer that is run again in backward computes what it did the first time.

A forward may read what no one can keep for it: a global, a context variable, a mode or a patch around it, another
module's attribute. So sums of the bits of what it saves are compared: of all layers in their first passes, where what a
script does in each shows, and later of one layer in turn, or one in :data:`MOST`, since what is around a forward is
around them all. Weights are left out, of which others hear when they are written to, and what torch's kernels keep of
random numbers, which is never written where there are none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.checkpoint import checkpoint

from memplan.errors import RunError
from memplan.hooks.recompute import hooked, hooks_around

FIRST = 4
"""Passes in which all layers are looked at."""
MOST = 32
_BITS = {
    torch.bool: torch.uint8,
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
    torch.int32: torch.int32,
    torch.int64: torch.int64,
}
"""What is compared, and as what it is summed."""
_SEED = 2
"""Elements of what a kernel keeps of its random numbers."""
_Noted = tuple[torch.Size, Any]
"""Shape and sum: a number where the tensor is on the CPU."""


class SameAgain:
    """Looks at one layer."""

    def __init__(self, name: str, turns: list[SameAgain], is_weight: Callable[[int], bool]) -> None:
        """``turns``: the layers that have turns, of all those that are run again; each joins once it has saved
        something. ``is_weight``: whether a frozen weight lies at an address.
        """
        self._name = name
        self.is_weight = is_weight
        self._calls = 0
        self._turns, self._turn = turns, -1
        self._unread: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        """Whether sums differed, on its way to the host."""

    def begin(self) -> Pass | None:
        """Note that a forward begins that may be run again; return what looks at it, if anything does."""
        self._calls += 1
        is_early = self._calls <= FIRST
        if not is_early and (self._turn < 0 or (self._calls + self._turn) % min(len(self._turns), MOST)):
            return None
        return Pass(self, is_early=is_early)

    def compared(self, found: list[tuple[Any, Any]], *, is_early: bool) -> None:
        """Raise RunError where two sums differ; on a GPU, after the first passes, of those that have been computed."""
        if not found:
            return
        if self._turn < 0:
            self._turn = len(self._turns)
            self._turns.append(self)
        if not all(isinstance(one, torch.Tensor) for pair in found for one in pair):
            self._refuse(any(first != second for first, second in found))
            return
        differ = torch.stack([first for first, _ in found]).ne(torch.stack([second for _, second in found])).any()
        if is_early or differ.device.type != "cuda":
            self._refuse(bool(differ))
            return
        while self._unread and self._unread[0][1].query():
            self._refuse(bool(self._unread.pop(0)[0]))
        told = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(differ, non_blocking=True)
        event = torch.cuda.Event()
        event.record()
        self._unread.append((told, event))

    def _refuse(self, differs: bool) -> None:
        if differs:
            raise refusal(self._name)


class Pass:
    """One forward that is looked at."""

    def __init__(self, of: SameAgain, *, is_early: bool) -> None:
        self._of = of
        self._is_early = is_early
        self._first: list[_Noted] = []

    @contextmanager
    def first(self) -> Iterator[None]:
        """Return the context in which it runs the first time."""
        with _noting(self._first, self._of.is_weight):
            yield

    @contextmanager
    def again(self) -> Iterator[None]:
        """Return the context in which it runs again. Raises RunError."""
        second: list[_Noted] = []
        try:
            with _noting(second, self._of.is_weight):
                yield
        except Exception as error:
            if type(error).__module__ == checkpoint.__module__:  # it has all that is wanted
                self._compare(second)
            raise
        self._compare(second)

    def _compare(self, second: list[_Noted]) -> None:
        pairs = list(zip(self._first, second, strict=False))
        if any(a[0] != b[0] for a, b in pairs):
            raise refusal(self._of._name)
        self._of.compared([(a[1], b[1]) for a, b in pairs], is_early=self._is_early)


def refusal(name: str) -> RunError:
    return RunError(
        f"the forward of {name} computed something else when the plan ran it a second time, in backward: it reads what "
        "has changed since, such as a global, a context around the forward, or another module's attribute. Keep that "
        'as it is until backward() has ended, or plan with activations="keep"'
    )


def _sum(bits: torch.Tensor) -> Any:
    if bits.device.type == "cpu":
        return int(bits.numpy().sum(dtype=np.int64))  # nothing of it is a tensor's memory
    return bits.sum(dtype=torch.int64)


@contextmanager
def _noting(noted: list[_Noted], is_weight: Callable[[int], bool]) -> Iterator[None]:
    around = hooks_around()
    if around is None:
        yield
        return

    def pack(tensor: torch.Tensor) -> Any:
        bits = _BITS.get(tensor.dtype) if type(tensor) is torch.Tensor and tensor.layout is torch.strided else None
        is_seed = bits is tensor.dtype and tensor.numel() <= _SEED
        if bits is not None and not is_seed and not is_weight(tensor.data_ptr()):
            noted.append((tensor.shape, _sum(tensor.detach().view(bits))))
        return around[0](tensor)

    with hooked(pack, around[1]):
        yield
