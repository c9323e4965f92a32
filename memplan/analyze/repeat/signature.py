"""What a module is made of, as a value that can be compared: classes, shapes, dtypes, settings; no weights' values.

Two modules of equal description run the same operators on tensors of the same shapes, as far as their own state decides
it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

_SCALARS = (int, float, complex, str, bytes, bool, type(None), torch.dtype, torch.device)
_DEEPEST = 8
_SMALL = 64
"""Elements of a tensor of integers whose values count."""


class Described:
    """Describes modules; what several of them hold (a configuration) is described once."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, tuple[object, ...]]] = {}
        """By id, with the object itself, lest its id be used again."""

    def leaves(self, module: nn.Module) -> tuple[object, ...]:
        """Return the description of a module and all within it, flat."""
        found: list[object] = []
        first: dict[int, int] = {}
        for name, inner in module.named_modules(remove_duplicate=False):
            found += (name, type(inner), first.setdefault(id(inner), len(first)))
            found.extend(self._of(inner.__dict__, 0))
            tied = (*inner._parameters.values(), *inner._buffers.values())
            found.extend(first.setdefault(id(tensor), len(first)) for tensor in tied if tensor is not None)
        return tuple(found)

    def _of(self, value: Any, deep: int) -> Iterator[object]:
        if isinstance(value, (*_SCALARS, type)):
            yield value
        elif isinstance(value, torch.Tensor):
            yield from (type(value), tuple(value.shape), value.dtype, value.requires_grad)
            yield value.stride() if value.layout == torch.strided else value.layout
            if value.numel() <= _SMALL and not value.dtype.is_floating_point and type(value) is torch.Tensor:
                yield None if value.is_meta else tuple(value.flatten().tolist())  # a forward may ask for them
            if type(value) not in (torch.Tensor, nn.Parameter):  # a quantized one, with its state
                yield from self._of(value.__dict__, deep + 1)
        elif isinstance(value, nn.Module) or deep > _DEEPEST:
            yield type(value)  # it is described where it is named
        elif isinstance(value, dict):
            yield len(value)
            for name, part in value.items():
                # Children are described where they are named; of a module's many dictionaries most are empty.
                if deep or (name != "_modules" and not (isinstance(part, dict) and not part)):
                    yield name if isinstance(name, str) else type(name)  # hooks are kept by a running number
                    yield from self._of(part, deep + 1)
        elif isinstance(value, (list, tuple, set, frozenset)):
            yield from (type(value), len(value))
            for part in value:
                yield from self._of(part, deep + 1)
        elif isinstance(value, BuiltinFunctionType):
            yield value.__qualname__
        elif isinstance(value, MethodType):
            yield type(value.__self__)
            yield from self._of(value.__func__, deep + 1)
        else:
            yield from self._shared(value, deep)

    def _shared(self, value: Any, deep: int) -> tuple[object, ...]:
        if id(value) not in self._known:
            self._known[id(value)] = (value, ())  # what holds itself ends here
            self._known[id(value)] = (value, tuple(self._opened(value, deep)))
        return self._known[id(value)][1]

    def _opened(self, value: Any, deep: int) -> Iterator[object]:
        if isinstance(value, partial):
            parts: Iterable[Any] = (value.func, value.args, value.keywords)
        elif isinstance(value, FunctionType):
            yield from (value.__module__, value.__qualname__, value.__code__)
            yield from self._of((value.__defaults__, value.__kwdefaults__), deep + 1)
            parts = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        else:
            if not hasattr(value, "__dict__"):  # nothing that can be looked into: equal to itself alone
                yield id(value)
            parts = (getattr(value, "__dict__", {}),)
        yield type(value)
        for part in parts:
            yield from self._of(part, deep + 1)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018
    except ValueError:
        return False
    return True
