"""What hooks of the script hold, which no module has: a list that takes each layer's output, a count, an object's own.

A loss that reads there what a hook has kept of the forward before it would find other micro-batches' as well.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

from torch import nn

from memplan.hooks.owner import is_of
from memplan.state.setting import Held, reached

_PLACES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_ABSENT = object()


def count_hooks(modules: Iterable[nn.Module]) -> int:
    """Return how many hooks modules have that are not memplan's."""
    return sum(1 for _ in _hooks(modules))


class HookState:
    """What hooks, or other functions of the script, hold when this is made; and its objects."""

    def __init__(self, hooks: Iterable[Any], attributes: Iterable[tuple[Mapping[str, Any], str]] = ()) -> None:
        """``attributes``: each by what has it (``vars``) and its name."""
        self._cells: list[tuple[CellType, object]] = []
        self._globals: list[tuple[Mapping[str, Any], str, object]] = []
        self._seen: dict[int, object] = {}
        self._values: list[object] = []
        for hook in hooks:
            self._open(hook)
        for held, name in attributes:
            self._globals.append((held, name, held.get(name)))
            self._open(held.get(name))
        self._state = Held(()).state(reached((self._values,), {})[0])

    def is_changed(self) -> bool:
        """Whether they hold anything else now."""
        return (
            any(_content(cell) is not value for cell, value in self._cells)
            or any(held.get(name) is not value for held, name, value in self._globals)
            or self._state.is_changed(frozenset())
        )

    def _open(self, value: Any) -> None:
        """Note what a hook holds, or a function that it calls."""
        if id(value) in self._seen:
            return
        self._seen[id(value)] = value
        if isinstance(value, partial):
            self._open(value.func)
            self._note(value.args, value.keywords)
        elif isinstance(value, MethodType):
            self._open(value.__func__)
            self._note(value.__self__)
        elif isinstance(value, FunctionType):
            cells = value.__closure__ or ()
            self._cells += [(cell, _content(cell)) for cell in cells]
            held = value.__globals__
            names = [name for name in value.__code__.co_names if name in held]
            self._globals += [(held, name, held[name]) for name in names]
            self._note(*map(_content, cells), value.__defaults__, value.__kwdefaults__, *(held[n] for n in names))
        else:
            self._note(value)

    def _note(self, *values: Any) -> None:
        for value in values:
            if isinstance(value, (FunctionType, MethodType, partial)):
                if not _is_own(value):
                    self._open(value)
            elif not isinstance(value, nn.Module):
                self._values.append(value)


def hooks_of(modules: Iterable[nn.Module], trained: Sequence[nn.Parameter]) -> Iterator[Any]:
    """Yield the hooks of modules and parameters that are not memplan's."""
    yield from _hooks(modules)
    yield from _of_the_script(parameter._backward_hooks for parameter in trained)


def _hooks(modules: Iterable[nn.Module]) -> Iterator[Any]:
    return _of_the_script(module.__dict__.get(place) for module in modules for place in _PLACES)


def _of_the_script(places: Iterable[dict[int, Any] | None]) -> Iterator[Any]:
    return (hook for hooks in places if hooks for hook in hooks.values() if not _is_own(hook))


def _is_own(hook: Any) -> bool:
    """Whether a hook is memplan's or torch's."""
    return is_of(hook, "memplan", "torch")


def _content(cell: CellType) -> object:
    try:
        return cell.cell_contents
    except ValueError:  # empty
        return _ABSENT
