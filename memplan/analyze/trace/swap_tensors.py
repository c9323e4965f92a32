"""A model's tensors exchanged for others for a while.

The module objects stay the same, so hooks and names hold; on the way out every module is what it was, whatever a
forward left in it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from functools import cache
from typing import Any, Protocol

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan.model.weights import Weight, frozen_weights, is_quantized, is_quantizer_state, is_wrapper, rewrapped
from memplan.state.snapshot import Snapshot


class Make(Protocol):
    """Makes what stands in for a plain tensor: a parameter for a parameter."""

    def __call__(self, tensor: torch.Tensor, *, is_weight: bool) -> torch.Tensor:
        """``is_weight``: it is one that frozen weights are made of."""


@contextlib.contextmanager
def exchanged(
    model: nn.Module, make: Make, snapshot: Snapshot | None = None, *, as_it_is: bool = False
) -> Iterator[dict[int, torch.Tensor]]:
    """Have what ``make`` makes in place of all tensors that the model holds, in depth, in training mode.

    ``as_it_is``: in the mode that it is in instead. Gives what stands in for each tensor by the real one's id. The
    model is restored on any way out, with all that ``snapshot`` (by default: of the model) holds.
    """
    kept = snapshot if snapshot is not None else Snapshot(model=model)
    stand_ins = _StandIns(make)
    try:
        # Grads off, lest a user's graph grow by our views.
        with torch.no_grad():
            for weight in frozen_weights("", model, deep=True):
                stand_ins.of_weight(weight)
            kept.exchange(stand_ins.of, stand_ins.of)
            for module in model.modules():
                _refresh_recurrent(module)
        if not as_it_is:
            model.train()
        yield stand_ins.made
    finally:
        kept.restore()


class _StandIns:
    """What stands in for tensors, and for quantizers' states that hold tensors, each made once."""

    def __init__(self, make: Make) -> None:
        self.made: dict[int, torch.Tensor] = {}
        """By the id of the real tensor."""
        self._states: dict[int, Any] = {}
        self._make = make

    def of(self, value: Any) -> Any:
        """Return what stands in for a tensor or a quantizer's state."""
        if not isinstance(value, torch.Tensor):
            return self._of_state(value)
        found = self.made.get(id(value))
        if found is None:
            if is_wrapper(value):
                found = rewrapped(value, self.of)
                if isinstance(value, nn.Parameter):
                    found = nn.Parameter(found, requires_grad=value.requires_grad)
            else:
                found = self._make(value, is_weight=False)
            self.made[id(value)] = found
        if is_quantized(value) and id(value) not in self._states:
            self._states[id(value)] = found
            if type(found) is FakeTensor:  # PEFT knows bitsandbytes' by the name of their class
                found.__class__ = _named(type(value).__name__)
            self._hold(value, found)
        return found

    def of_weight(self, weight: Weight) -> None:
        """Make what stands in for a frozen weight, and have its twins share its memory."""
        made = self.made.get(id(weight.tensor))
        if made is None:
            made = self.made[id(weight.tensor)] = self._make(weight.tensor, is_weight=True)
        for twin in weight.twins:
            self.made.setdefault(id(twin), made.detach())

    def _of_state(self, state: Any) -> Any:
        found = self._states.get(id(state))
        if found is None:
            found = self._states[id(state)] = copy.copy(state)
            self._hold(state, found)
        return found

    def _hold(self, value: Any, stand_in: Any) -> None:
        for name, kept in list(value.__dict__.items()):
            if isinstance(kept, torch.Tensor) or is_quantizer_state(kept):
                stand_in.__dict__[name] = self.of(kept)
            elif isinstance(value, torch.Tensor):
                stand_in.__dict__[name] = kept


@cache
def _named(name: str) -> type[FakeTensor]:
    """Return a class of fake tensors of another name."""
    return type(name, (FakeTensor,), {})


def _refresh_recurrent(module: nn.Module) -> None:
    """A recurrent module keeps its weights in a list besides."""
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]
