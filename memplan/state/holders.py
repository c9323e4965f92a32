"""Objects that hold others, each with what it held: listed, exchanged, described and put back, one class a kind."""

from __future__ import annotations

import array
import random
import sys
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterator
from functools import partial
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType
from typing import Any, Protocol

import torch

Change = Callable[[Any, str], Any]
"""From what is held, and the name that it is held by, to what is to be held instead."""

MOST_COPIED_BYTES = 64 << 20
"""Arrays beyond this are made read-only, not copied."""

ABSENT = object()


class Holder(Protocol):
    """An object, and what it held when this was made."""

    @property
    def owner(self) -> Any:
        """The object, for its name."""

    def items(self) -> Iterator[tuple[str, Any]]:
        """Yield what it held, by name."""

    def now(self) -> Iterator[Any]:
        """Yield the values that it holds now."""

    def change(self, change: Change) -> None:
        """Have it hold ``change(value, name)`` for each value."""

    def described(self, describe: Callable[[Any], object]) -> object:
        """Return what it holds now."""

    def restore(self) -> None:
        """Have it hold what it held."""


class Mapping:
    """A dictionary of any class."""

    def __init__(self, target: dict[Any, Any], owner: object = None) -> None:
        """``owner``: the object whose ``__dict__`` it is, if it is one."""
        self.target = target
        self.owner: Any = target if owner is None else owner
        self._class = type(self.owner)
        self._kind: Any = OrderedDict if isinstance(target, OrderedDict) else dict
        self._held: list[tuple[Any, Any]] = self._now()

    def _now(self) -> list[tuple[Any, Any]]:
        return list(self._kind.items(self.target))

    def items(self) -> Iterator[tuple[str, Any]]:
        for key, value in self._held:
            if type(key) is str:
                yield key, value
            else:
                yield repr(key) if isinstance(key, int) else "", value
                yield "", key

    def now(self) -> Iterator[Any]:
        return iter(list(self._kind.values(self.target)))

    def change(self, change: Change) -> None:
        for key, value in self._held:
            other = change(value, key if type(key) is str else repr(key))
            if other is not value:
                self._kind.__setitem__(self.target, key, other)

    def described(self, describe: Callable[[Any], object]) -> object:
        return [(str(key), describe(value)) for key, value in self._now() if not is_ours(value)]

    def restore(self) -> None:
        if type(self.owner) is not self._class:  # a parametrization gives its module another
            self.owner.__class__ = self._class
        now = self._now()
        if len(now) != len(self._held) or any(
            a is not b or v is not w for (a, v), (b, w) in zip(now, self._held, strict=True)
        ):
            self._kind.clear(self.target)
            for key, value in self._held:
                self._kind.__setitem__(self.target, key, value)


class Sequence:
    """A list, a deque or a set."""

    def __init__(self, target: Any) -> None:
        self.owner = self.target = target
        self._kind: Any = next(kind for kind in (list, deque, set) if isinstance(target, kind))
        self._held = list(self._kind.__iter__(target))

    def items(self) -> Iterator[tuple[str, Any]]:
        for index, value in enumerate(self._held):
            yield f"[{index}]", value

    def now(self) -> Iterator[Any]:
        return iter(list(self._kind.__iter__(self.target)))

    def change(self, change: Change) -> None:
        if self._kind is set:
            others = [change(value, "") for value in self._held]
            if any(a is not b for a, b in zip(others, self._held, strict=True)):
                self._put(others)
            return
        for index, value in enumerate(self._held):
            other = change(value, f"[{index}]")
            if other is not value:
                self._kind.__setitem__(self.target, index, other)

    def described(self, describe: Callable[[Any], object]) -> object:
        now = self._kind.__iter__(self.target)
        if self._kind is set:
            return sorted(repr(describe(value)) for value in now)
        return [describe(value) for value in now]

    def restore(self) -> None:
        now = list(self._kind.__iter__(self.target))
        if len(now) != len(self._held) or any(a is not b for a, b in zip(now, self._held, strict=True)):
            self._put(self._held)

    def _put(self, values: list[Any]) -> None:
        self._kind.clear(self.target)
        (self._kind.update if self._kind is set else self._kind.extend)(self.target, values)


class Numbers:
    """An object that holds no others, but numbers that ``get`` and ``put`` move out and in."""

    def __init__(self, owner: Any, get: Callable[[], Any], put: Callable[[Any], None]) -> None:
        self.owner = owner
        self._get, self._put = get, put
        self._held = get()

    def items(self) -> Iterator[tuple[str, Any]]:
        yield from ()

    def now(self) -> Iterator[Any]:
        yield from ()

    def change(self, change: Change) -> None:
        pass

    def described(self, describe: Callable[[Any], object]) -> object:
        return _text(self._get())

    def restore(self) -> None:
        if _text(self._get()) != _text(self._held):
            self._put(self._held)


class ReadOnly(Numbers):
    """A large array, which nothing may be written to until it is put back."""

    def __init__(self, owner: Any) -> None:
        self.owner = owner
        self.is_view = owner.base is not None
        self._writeable = owner.flags.writeable
        owner.flags.writeable = False

    def described(self, describe: Callable[[Any], object]) -> object:
        return None

    def restore(self) -> None:
        self.owner.flags.writeable = self._writeable


class Named:
    """Values that are got and put by name: slots, cells, class attributes, global names."""

    def __init__(
        self,
        owner: Any,
        names: Collection[str],
        get: Callable[[str], Any],
        put: Callable[[str, Any], None],
        drop: Callable[[str], None],
    ) -> None:
        """``get``: returns ``ABSENT`` where there is none of the name."""
        self.owner = owner
        self._names = names
        self._get, self._put, self._drop = get, put, drop
        self._held = {name: get(name) for name in names}

    def items(self) -> Iterator[tuple[str, Any]]:
        return ((name, value) for name, value in self._held.items() if value is not ABSENT)

    def now(self) -> Iterator[Any]:
        return (value for name in self._current() for value in (self._get(name),) if value is not ABSENT)

    def change(self, change: Change) -> None:
        for name, value in self.items():
            other = change(value, name)
            if other is not value:
                self._put(name, other)

    def described(self, describe: Callable[[Any], object]) -> object:
        found = ((name, self._get(name)) for name in self._current())
        return [(name, describe(value)) for name, value in found if value is not ABSENT]

    def restore(self) -> None:
        for name in self._current():
            value = self._held.get(name, ABSENT)
            if self._get(name) is not value:
                if value is ABSENT:
                    self._drop(name)
                else:
                    self._put(name, value)

    def _current(self) -> Collection[str]:
        return self._names


class Globals(Named):
    """What global names mean to a function, or names of a module's."""

    def __init__(self, target: FunctionType | ModuleType, names: Collection[str]) -> None:
        where: dict[str, Any] = target.__globals__ if isinstance(target, FunctionType) else vars(target)
        super().__init__(
            target,
            sorted(names),
            lambda name: where.get(name, ABSENT),
            where.__setitem__,
            lambda name: where.__delitem__(name),
        )


class Class(Named):
    """A class's own attributes. ``kinds``: of those that it is given with, only these are looked after."""

    def __init__(self, target: type, kinds: tuple[type, ...] | None) -> None:
        self._kinds = kinds
        self._target = target
        super().__init__(
            target,
            tuple(self._all()),
            lambda name: vars(target).get(name, ABSENT),
            lambda name, value: type.__setattr__(target, name, value),
            lambda name: type.__delattr__(target, name),
        )

    def _all(self) -> Iterator[str]:
        for name, value in list(vars(self._target).items()):
            own = not (name.startswith("__") and name.endswith("__")) and name != "_abc_impl"
            if own and (self._kinds is None or isinstance(value, self._kinds)):
                yield name

    def _current(self) -> Collection[str]:
        return {*self._names, *self._all()}


def of_container(value: Any) -> Holder:
    """Return the holder of a dictionary, a list, a deque, a set or a ``bytearray``."""
    if isinstance(value, dict):
        return Mapping(value)
    return _of_bytes(value) if isinstance(value, bytearray) else Sequence(value)


def of_numbers(value: Any) -> Holder | None:
    """Return the holder of a random generator, a NumPy array or another object of numbers alone; None for any other."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, torch.Generator):
        return Numbers(value, value.get_state, lambda kept: _set_state(value, kept))
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):
        return Numbers(value, value.getstate, value.setstate)
    if isinstance(value, array.array):
        return _of_bytes(value)
    if numpy is None:
        return None
    if isinstance(value, numpy.ndarray):
        if value.nbytes > MOST_COPIED_BYTES or isinstance(value, numpy.memmap):
            return ReadOnly(value)
        return Numbers(value, value.copy, lambda kept: numpy.copyto(value, kept)) if value.flags.writeable else None
    if isinstance(value, (numpy.random.Generator, numpy.random.BitGenerator)):
        bits = getattr(value, "bit_generator", value)
        return Numbers(value, lambda: bits.state, lambda kept: setattr(bits, "state", kept))
    if isinstance(value, numpy.random.RandomState):
        return Numbers(value, value.get_state, value.set_state)
    return None


def of_slots(value: Any) -> Holder | None:
    """Return the holder of what an object has in slots; None where it has none."""
    slots = {
        name: member
        for kind in type(value).__mro__
        if "__slots__" in vars(kind)
        for name, member in vars(kind).items()
        if isinstance(member, MemberDescriptorType)
    }
    if not slots:
        return None

    def get(name: str) -> Any:
        try:
            return slots[name].__get__(value, type(value))
        except AttributeError:
            return ABSENT

    def put(name: str, held: Any) -> None:
        slots[name].__set__(value, held)

    return Named(value, tuple(slots), get, put, lambda name: slots[name].__delete__(value))


def of_cells(function: FunctionType) -> Holder | None:
    """Return the holder of the variables that a function shares with where it was defined; None where there are
    none.
    """
    cells: dict[str, CellType] = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    if not cells:
        return None

    def get(name: str) -> Any:
        try:
            return cells[name].cell_contents
        except ValueError:
            return ABSENT

    def put(name: str, held: Any) -> None:
        cells[name].cell_contents = held

    def drop(name: str) -> None:
        del cells[name].cell_contents

    return Named(function, tuple(cells), get, put, drop)


def _set_state(generator: torch.Generator, kept: torch.Tensor) -> None:
    generator.set_state(kept)


def _of_bytes(value: Any) -> Holder:
    def put(kept: bytes) -> None:
        del value[:]
        value.extend(kept) if isinstance(value, bytearray) else value.frombytes(kept)

    return Numbers(value, lambda: bytes(value), put)


def is_ours(value: Any) -> bool:
    """Whether a value is a hook of memplan's, or what it has put in the place of a method."""
    if getattr(type(value), "is_memplans", False):
        return True
    while isinstance(value, (partial, MethodType)):
        value = value.func if isinstance(value, partial) else value.__func__
    return isinstance(value, FunctionType) and (value.__module__ or "").startswith("memplan.")


def _text(value: Any) -> object:
    """Return numbers as what can be compared."""
    if isinstance(value, torch.Tensor):
        return value.numpy().tobytes()
    if hasattr(value, "tobytes"):
        return (value.shape, value.dtype.str, value.tobytes()) if not value.dtype.hasobject else repr(value)
    if isinstance(value, dict):
        return {name: _text(part) for name, part in value.items()}
    if isinstance(value, tuple):
        return tuple(_text(part) for part in value)
    return value
