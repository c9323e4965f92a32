"""What a model holds in depth, written down so that it can be put back: a forward that is only looked at leaves
nothing.

A forward may write to more than parameters and buffers: counters, lists of tensors and random generators of plain
objects, attributes of classes, global names that its functions use, caches, iterators. All of that is walked once, by
the references that lead there, and put back in place: whoever else holds an object sees it as it was. What cannot be
put back is not used up either (``expendable.py``). Large arrays are not copied: they are read-only meanwhile.
"""

from __future__ import annotations

import contextlib
import functools
import gc
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator
from types import (
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch

from memplan.model.names import canonical
from memplan.model.weights import is_quantizer_state
from memplan.state import holders
from memplan.state.closed import (
    ATOM_TYPES,
    ATOMS,
    is_closed,
    is_closed_name,
    is_library,
    is_used_up,
    keeps_cache,
    names_in,
)
from memplan.state.expendable import Unrepeatable, expendable, reduced
from memplan.state.process_state import random_states_kept, settings_kept

_EMPTY = {dict, OrderedDict, list, set, deque}
_CONTAINERS = (dict, list, set, deque, bytearray)

Origin = Callable[[torch.Tensor], "int | None"]


class Snapshot:
    """All that can be reached from ``roots`` (by name), as it is now.

    ``restore`` puts it back; ``exchange`` puts other tensors in the place of those that are held; ``state`` describes
    it.
    """

    def __init__(self, **roots: object) -> None:
        self._kept: list[holders.Holder] = []
        self._empty: list[Any] = []
        """Containers that held nothing: the hooks of every module, mostly."""
        self._seen: dict[int, object] = {}
        self._paths: dict[int, tuple[int, str]] = {}
        """Of each object the one through which it was reached first, by their ids, and under which name."""
        self._used_up: set[int] = set()
        """Ids of objects that a forward is given others for."""
        self._waiting: deque[object] = deque()
        with _without_collector():
            for name, root in roots.items():
                self._add(root, 0, name)
            while self._waiting:
                self._enter(self._waiting.popleft())

    # ---- what is done with it ----------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Put everything back. What fails is raised when all the rest is back."""
        failed: list[Exception] = []
        # A view may be written to only where what it is of may be.
        for holder in sorted(self._kept, key=lambda kept: getattr(kept, "is_view", False)):
            try:
                holder.restore()
            except Exception as error:
                failed.append(error)
        for container in self._empty:
            if container:
                container.clear()
        if failed:
            raise failed[0]

    def exchange(self, other: Callable[[torch.Tensor], torch.Tensor], state_of: Callable[[Any], Any]) -> None:
        """Put ``other(tensor)`` in the place of every tensor that is held, and of what cannot be put back what may be
        used up. ``state_of``: from a quantizer's state to one that may be written to.
        """
        made: dict[int, Any] = {}

        def changed(value: Any, name: str, owner: object) -> Any:
            if isinstance(value, torch.Tensor):
                return other(value)
            if isinstance(value, tuple) and type(value) is not torch.Size:
                parts = [changed(part, name, owner) for part in value]
                if all(a is b for a, b in zip(parts, value, strict=True)):
                    return value
                return type(value)(*parts) if hasattr(value, "_fields") else tuple.__new__(type(value), parts)
            if id(value) not in self._used_up:
                return value
            if id(value) not in made:
                where = self._path(owner, name)
                made[id(value)] = (
                    state_of(value) if is_quantizer_state(value) else expendable(value, where, keeps_cache)
                )
            return made[id(value)]

        for holder in self._kept:
            holder.change(functools.partial(changed, owner=holder.owner))

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that were held, by name."""
        for holder in self._kept:
            for name, value in holder.items():
                for tensor in _tensors(value):
                    yield self._path(holder.owner, name), tensor

    def state(self, origin: Origin) -> dict[tuple[int, str], object]:
        """Return what each object holds now, as values that are equal where it holds the same; by the object's id.

        ``origin``: the id of the tensor that one stands in for; None for one that is new.
        """
        filled = [holders.of_container(container) for container in self._empty if container]
        return {
            (id(holder.owner), _kind_of(holder)): holder.described(lambda v: self._described(v, origin, 0))
            for holder in (*self._kept, *filled)
        }

    def dropped(self, origin: Origin) -> Iterator[tuple[int, int, str]]:
        """Yield the tensors that objects held and do not hold now: the ids of the object and of the tensor, and its
        name.
        """
        for holder in self._kept:
            before = [(name, tensor) for name, value in holder.items() for tensor in _tensors(value)]
            if before:
                now = {origin(tensor) for value in holder.now() for tensor in _tensors(value)}
                for name, tensor in before:
                    if id(tensor) not in now:
                        yield id(holder.owner), id(tensor), self._path(holder.owner, name)

    def name_of(self, key: int) -> str:
        """Return the name of an object by its id."""
        return self._path(self._seen[key], "")

    def reaches(self, keys: set[int]) -> set[int]:
        """Return those of the ids that are of objects in here."""
        return keys.intersection(self._seen)

    # ---- the walk
    # ------------------------------------------------------------------------------------------------------

    def _add(self, value: object, parent: int, name: str) -> None:
        kind = type(value)
        if kind in ATOM_TYPES or id(value) in self._seen:
            return
        self._seen[id(value)] = value
        self._paths[id(value)] = (parent, name)
        if kind in _EMPTY and not value:
            self._empty.append(value)
            return
        if isinstance(value, ATOMS):
            return
        self._waiting.append(value)

    def _hold(self, holder: holders.Holder | None, *, is_global: bool = False) -> None:
        """``is_global``: of what global names mean, functions and classes of libraries are not entered."""
        if holder is not None:
            self._kept.append(holder)
            for name, value in holder.items():
                if not (is_global and isinstance(value, (FunctionType, type)) and is_library(value.__module__)):
                    self._add(value, id(holder.owner), name)

    def _enter(self, value: Any) -> None:
        kind = type(value)
        if isinstance(value, _CONTAINERS):
            self._hold(holders.of_container(value))
        elif isinstance(value, (tuple, frozenset)):
            for index, part in enumerate(value):
                self._add(part, id(value), f"[{index}]")
            return
        elif isinstance(value, MappingProxyType):
            self._add(dict(value), id(value), "")
            return
        elif isinstance(value, FunctionType):
            self._enter_function(value)
            return
        elif isinstance(value, MethodType):
            self._add(value.__self__, id(value), "")
            self._add(value.__func__, id(value), "")
            return
        elif isinstance(value, (staticmethod, classmethod)):
            self._add(value.__func__, id(value), "")
            return
        elif isinstance(value, property):
            for part in (value.fget, value.fset):
                self._add(part, id(value), "")
            return
        elif isinstance(value, functools.partial):
            for part in (value.func, value.args, value.keywords):
                self._add(part, id(value), "")
        elif isinstance(value, functools._lru_cache_wrapper):
            self._used_up.add(id(value))
            self._add(value.__wrapped__, id(value), "")
            return
        elif isinstance(value, type):
            self._enter_class(value)
            return
        elif is_used_up(value):
            self._used_up.add(id(value))
            return
        elif (numbers := holders.of_numbers(value)) is not None:
            self._hold(numbers)
        elif is_closed(kind):
            return
        attributes = getattr(value, "__dict__", None)
        if type(attributes) is dict:
            self._seen[id(attributes)] = attributes
            self._hold(holders.Mapping(attributes, value))
        self._hold(holders.of_slots(value))
        self._add(kind, id(value), "")

    def _enter_function(self, function: FunctionType) -> None:
        if is_closed_name(function.__module__ or ""):
            return
        self._hold(holders.of_cells(function))
        self._add(function.__defaults__, id(function), "")
        self._add(function.__kwdefaults__, id(function), "")
        self._add(function.__dict__, id(function), "")
        if is_library(function.__module__):
            return
        names = set(names_in(function.__code__))
        self._hold(holders.Globals(function, names), is_global=True)
        for name in names:  # a module of counters: ``state.count += 1``
            module = function.__globals__.get(name)
            if isinstance(module, ModuleType) and not is_library(module.__name__):
                self._hold(holders.Globals(module, names), is_global=True)

    def _enter_class(self, kind: type) -> None:
        for part in kind.__mro__:
            if part is object or is_closed(part) or part.__module__.partition(".")[0] in ("builtins", "torch", "numpy"):
                continue
            if part is not kind:
                self._add(part, id(kind), "")
                continue
            whole = not is_library(part.__module__)
            self._hold(holders.Class(part, None if whole else (*_CONTAINERS, bool, int, float, str, torch.Tensor)))

    # ---- names and descriptions
    # ----------------------------------------------------------------------------------------

    def _path(self, value: object, name: str) -> str:
        parts = [name] if name else []
        key = id(value)
        while key in self._paths:
            parent, own = self._paths[key]
            if parent and own not in ("", "_modules", "_parameters", "_buffers"):
                parts.append(own)
            key = parent
        return canonical(".".join(reversed(parts)).replace(".[", "["))

    def _described(self, value: Any, origin: Origin, depth: int) -> object:
        if isinstance(value, torch.Tensor):
            old = origin(value)
            return ("old", old) if old is not None else ("new", tuple(value.shape), value.dtype)
        if isinstance(value, float):
            return repr(value)
        if isinstance(value, (bool, int, str, bytes, type(None))):
            return value
        if id(value) in self._seen:
            return ("here", id(value))
        if depth > 4:
            return type(value).__qualname__
        within = functools.partial(self._described, origin=origin, depth=depth + 1)
        if isinstance(value, (list, tuple, deque)):
            return (type(value).__name__, *(within(part) for part in value))
        if isinstance(value, dict):
            return (type(value).__name__, *((str(name), within(part)) for name, part in value.items()))
        if isinstance(value, (set, frozenset)):
            return (type(value).__name__, len(value))
        if hasattr(type(value), "__next__") and not isinstance(value, (Unrepeatable, GeneratorType)):
            try:
                return (type(value).__name__, *(within(part) for part in reduced(value)[1:]))
            except (TypeError, AttributeError):
                return type(value).__name__
        attributes = getattr(value, "__dict__", None)
        if isinstance(attributes, dict) and not is_closed(type(value)):
            return (type(value).__qualname__, *((str(name), within(part)) for name, part in attributes.items()))
        return type(value).__qualname__


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the garbage collector from going over what is made here and stays: that is most of a walk's time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@contextlib.contextmanager
def unchanged(**roots: object) -> Iterator[None]:
    """Have all that can be reached from ``roots``, and the process's random states and settings, as before
    afterwards.
    """
    kept = Snapshot(**roots)
    try:
        with random_states_kept(), settings_kept():
            yield
    finally:
        kept.restore()


def _kind_of(holder: holders.Holder) -> str:
    """Return what tells the holders of one object apart: a ``Counter`` has attributes beside what it counts."""
    is_dictionary = isinstance(holder, holders.Mapping) and holder.target is holder.owner
    return "entries" if is_dictionary else type(holder).__name__


def _tensors(value: object) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple):
        for part in value:
            yield from _tensors(part)
