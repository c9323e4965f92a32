"""What a function can reach and so can change: of modules their attributes alone, neither weights nor other modules."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from memplan.state import holders
from memplan.state.snapshot import Snapshot

_TORCHS = frozenset(nn.Module().__dict__)
_MOST_OBJECTS = 20_000


class Reach(Snapshot):
    """All that can be reached from ``roots``, up to a number, as it is now. Nothing is kept from being changed."""

    def __init__(self, **roots: object) -> None:
        super().__init__(**roots)
        self._before = self.state(id)
        self._versions = [
            (holder, name, tensor, version)
            for holder in self._kept
            for name, tensor in holder.items()
            if isinstance(tensor, torch.Tensor) and (version := _version(tensor)) is not None
        ]

    def changed(self) -> frozenset[Hashable]:
        """Return what holds something else by now: see ``tokens``."""
        before, after = self._before, self.state(id)
        found: set[Hashable] = set()
        for key in {*before, *after}:
            was, now = before.get(key), after.get(key)
            if was != now:
                names = None
                if isinstance(was, list) and isinstance(now, list) and key[1] in ("Named", "Globals"):
                    names = {pair[0] for pair in (*was, *now) if pair not in was or pair not in now}
                found.update(token for token, _ in _tokens(self._seen[key[0]], key[1], names))
        for holder, name, tensor, version in self._versions:
            if _version(tensor) != version:
                found.update(token for token, _ in _tokens(holder.owner, type(holder).__name__, {name}))
        return frozenset(found)

    def tokens(self) -> dict[Hashable, object]:
        """Return what everything that was reached is known by, with what must live for that to be so."""
        found = {known_by(container): container for container in self._empty}
        for holder in self._kept:
            found.update(_tokens(holder.owner, type(holder).__name__, None))
        return found

    def _add(self, value: object, parent: int, name: str) -> None:
        if len(self._seen) < _MOST_OBJECTS:
            super()._add(value, parent, name)

    def _enter(self, value: Any) -> None:
        if isinstance(value, nn.Module):
            attributes = value.__dict__
            names = [name for name in attributes if name not in _TORCHS]
            get = partial(_attribute, attributes)
            self._hold(holders.Named(value, names, get, attributes.__setitem__, attributes.__delitem__))
            self._add(type(value), id(value), "")
        elif getattr(value, "nbytes", 0) <= holders.MOST_COPIED_BYTES:  # larger arrays would be made read-only
            super()._enter(value)


def known_by(value: object) -> Hashable:
    """Return what an object is known by."""
    return id(value)


def code_of(function: Any) -> object:
    """Return what functions have in common that were made at one place."""
    while isinstance(function, (partial, MethodType)):
        function = function.func if isinstance(function, partial) else function.__func__
    return function.__code__ if isinstance(function, FunctionType) else type(function)


def _tokens(owner: Any, kind: str, names: set[str] | None) -> Iterator[tuple[Hashable, object]]:
    """Yield what an object's parts are known by: variables that functions share by themselves. ``names``: of these
    alone.
    """
    if isinstance(owner, FunctionType) and kind == "Named":
        for name, cell in zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True):
            if names is None or name in names:
                yield ("cell", id(cell)), cell
    elif kind == "Globals":
        is_function = isinstance(owner, FunctionType)
        where = owner.__globals__ if is_function else vars(owner)
        for name in names if names is not None else owner.__code__.co_names if is_function else where:
            yield ("global", id(where), name), owner
    else:
        yield known_by(owner), owner


def _attribute(attributes: dict[str, Any], name: str) -> Any:
    return attributes.get(name, holders.ABSENT)


def _version(tensor: torch.Tensor) -> int | None:
    if tensor.is_inference():
        return None
    with torch._C.DisableTorchFunctionSubclass():
        return tensor._version
