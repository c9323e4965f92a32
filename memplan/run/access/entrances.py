"""Backwards that enter a layer by a tensor that was made inside of it, of which no trigger tells.

A backward comes to a layer by a gradient of what the layer returned, which its trigger sees. Where it comes by another
tensor that was made in it (a hook's, a cache's), and by none of those, nothing brings the weights: autograd reads a
placeholder, or where it has saved a view of a slot another block's bytes, which look like any others. Layers that are
recomputed announce themselves, and quantized ones have triggers within. Of the rest their adapters tell, which have a
gradient of that backward, and inner modules that no adapter tells of (``hooks/taps.py``). Only where accesses are left
out that the plan has is this looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

import torch
from torch import nn

from memplan.errors import RunError

_WAY_OUT = 'plan with activations="recompute", or pin that layer to the device (pins={...: "device"})'


class Entrances:
    """The gradients of one model's adapters. ``layers``: the trained parameters within each trigger whose blocks come
    and go.
    """

    def __init__(self, trained: Sequence[nn.Parameter], layers: Mapping[str, Sequence[nn.Parameter]]) -> None:
        self._trained = tuple(trained)
        seen: dict[int, int] = {}
        for parameters in layers.values():
            for parameter in parameters:
                seen[id(parameter)] = seen.get(id(parameter), 0) + 1
        # One that several layers share tells of none.
        alone = {name: tuple(p for p in held if seen[id(p)] == 1) for name, held in layers.items()}
        self.layers = {name: held for name, held in alone.items() if held}
        self._watched = tuple((name, parameter) for name, held in self.layers.items() for parameter in held)
        self._marks = self._now()
        self._called: set[str] = set()
        self._announced: set[str] = set()

    def mark(self) -> None:
        """Note what gradients there are: a pass begins, or a backward has ended."""
        self._marks = self._now()

    def pass_begins(self) -> None:
        """Note that nothing was called yet."""
        self._called.clear()
        self._announced.clear()
        self.mark()

    def called(self, module: str) -> None:
        """Note that a module's forward makes a graph."""
        self._called.add(module)

    def announced(self, module: str) -> None:
        """Note that a module's backward was announced."""
        self._announced.add(module)

    def backward_ends(self, *, left_out: bool) -> None:
        """Raise RunError where a gradient was made of what lay in the place of a weight. ``left_out``: accesses
        were.
        """
        if left_out:
            self._refuse()
            _refuse_poison(self._trained)
        self._announced.clear()
        self.mark()

    # Where micro-batches take turns, gradients are of several: who gave one is asked for.

    def lane(self) -> tuple[set[str], set[str]]:
        """Return what is one micro-batch's own, for :meth:`be_lane`."""
        return self._called, self._announced

    def be_lane(self, lane: tuple[set[str], set[str]]) -> None:
        """Go on with another micro-batch."""
        self._called, self._announced = lane

    def lane_ends(self, gave: Callable[[nn.Parameter], bool], *, left_out: bool) -> None:
        """Do the same as ``backward_ends`` for one of several. ``gave``: whether it has given a parameter a
        gradient.
        """
        if left_out:
            unseen = self._called - self._announced
            for name, parameter in self._watched:
                if name in unseen and gave(parameter) and parameter.grad is not None and bool(parameter.grad.any()):
                    refuse_entrance(name)
            _refuse_poison(self._trained)
        self._announced.clear()

    def _refuse(self) -> None:
        unseen = self._called - self._announced
        for (name, parameter), mark, now in zip(self._watched, self._marks, self._now(), strict=True):
            # Zeroed in between, it is another as well.
            if name in unseen and mark != now and parameter.grad is not None and bool(parameter.grad.any()):
                refuse_entrance(name)

    def _now(self) -> list[tuple[int, int]]:
        return [(0, 0) if (grad := p.grad) is None else (id(grad), grad._version) for _, p in self._watched]


def refuse_entrance(name: str) -> NoReturn:
    """Raise RunError of a layer that a backward has entered with nothing announcing it."""
    raise _entered(f"{name}, whose weights were not there: gradients are wrong")


def _entered(where: str) -> RunError:
    return RunError(
        "a backward entered a layer by a tensor that was made inside of it (taken by a hook, or from a cache), not "
        f"by what it returned: {where}. Do not step the optimizer; {_WAY_OUT}"
    )


def _refuse_poison(trained: Sequence[nn.Parameter]) -> None:
    """Raise RunError where a gradient is NaN that was made of a placeholder's.

    On the CPU its bits tell: those of a NaN that arithmetic itself makes are others.
    """
    for parameter in trained:
        gradient = parameter.grad
        if gradient is None or not gradient.is_floating_point() or gradient.layout != torch.strided:
            continue
        found = gradient[gradient.isnan()]
        if found.numel() and (found.device.type != "cpu" or not _is_of_arithmetic(found)):
            raise _entered("its weights were not there, and gradients are NaN")


def _is_of_arithmetic(found: torch.Tensor) -> bool:
    bits = found.float().view(torch.int32)
    made = torch.tensor([0x7FC00000, 0xFFC00000 - (1 << 32)], dtype=torch.int64).to(torch.int32)
    return bool(torch.isin(bits, made).all())
