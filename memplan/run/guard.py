"""Moves, casts and copies of a managed module: what is harmless goes through, the rest is refused before it begins.

Streamed weights are placeholders and views of an arena: ``.to`` would make real tensors of the former and part the
latter from their slot. Trainers call ``.to`` all the same, mostly to where the model is already.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch
from torch import nn

from memplan.errors import MovedWeightsError, RunError


class Guard:
    """Stands before one module's ``_apply``, which ``.to``, ``.cuda``, ``.half`` and their like all go through."""

    def __init__(self, module: nn.Module, managed: frozenset[int]) -> None:
        self._module = module
        self._managed = managed
        own = {(p.dtype, p.device) for p in module.parameters() if id(p) in managed}
        self._kinds = tuple(sorted(own, key=str))
        # Found on the instance before the class, by torch, copy and pickle alike.
        module.__dict__.update(_apply=self, __deepcopy__=_refuse_copy, __reduce_ex__=_refuse_copy)

    def __call__(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        for dtype, device in self._kinds:
            moved = fn(torch.empty(1, dtype=dtype, device=device))
            if moved.dtype != dtype or moved.device != device:
                raise MovedWeightsError(
                    f"{type(self._module).__name__} was to go from {dtype} on {device} to {moved.dtype} on "
                    f"{moved.device}, but memplan streams its weights: leave placement to memplan, or detach() first"
                )
        parameters = self._module._parameters
        everything = dict(parameters)
        for name, parameter in everything.items():
            if parameter is not None and id(parameter) in self._managed:
                del parameters[name]
        try:
            type(self._module)._apply(self._module, fn, recurse)
        finally:
            kept = dict(parameters)
            parameters.clear()
            parameters.update({name: kept.get(name, parameter) for name, parameter in everything.items()})
        return self._module

    def remove(self) -> None:
        """Step aside."""
        for name in ("_apply", "__deepcopy__", "__reduce_ex__"):
            self._module.__dict__.pop(name, None)


def _refuse_copy(*args: object) -> NoReturn:
    raise RunError(_COPY)


_COPY = (
    "a model whose weights memplan streams was to be copied or pickled, which would keep placeholders: detach() first, "
    "or save inside `with memplan.materialise(model)` by state_dict"
)
