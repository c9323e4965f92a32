"""Writes to trained parameters through ``data``, of which their versions do not tell.

A layer that is run again in backward must have the parameters that it had. Operations in place count up a parameter's
version, but what ``parameter.data`` returns counts for itself, and what it is set to may lie where the last values did.
While layers are run again ``nn.Parameter`` has a ``data`` of its own, which counts what is written by it. (Optimizers
ask for a parameter's exact class, so that cannot be another; their own steps are ``optimizer_steps``' to count.)
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from memplan.state.watched import Watched

_data: Any = torch.Tensor.data
_use_count: Any = getattr(torch.Tensor, "_use_count", lambda alias: 1)
"""Views of an alias hold it where Python does not see it. Where torch tells of no count they are not found."""
_MOST_UNHELD = 16
_BY_A_LIST = 3
"""References, as ``sys.getrefcount`` counts, to what a loop over a list is at and nobody else holds."""


class _Taken:
    """What was taken of one parameter's data."""

    __slots__ = ("aliases", "parameter", "writes")

    def __init__(self, parameter: nn.Parameter) -> None:
        key = id(parameter)
        self.parameter = weakref.ref(parameter, lambda _: _taken.pop(key, None))
        self.aliases: list[torch.Tensor] = []
        self.writes = 0
        """Of aliases that are gone, and by setting it."""

    def take(self, alias: torch.Tensor) -> torch.Tensor:
        if len(self.aliases) >= _MOST_UNHELD:
            self._drop_unheld()
        self.aliases.append(alias)
        return alias

    def set(self) -> None:
        """Note that it is another tensor's now: what was taken is none of it any more, and is not held."""
        self.writes = self.count() + 1
        self.aliases.clear()

    def count(self) -> int:
        return self.writes + sum(alias._version for alias in self.aliases)

    def _drop_unheld(self) -> None:
        held = []
        for alias in self.aliases:
            if sys.getrefcount(alias) > _BY_A_LIST or _use_count(alias) > 1:
                held.append(alias)
            else:
                self.writes += alias._version
        self.aliases = held


_taken: dict[int, _Taken] = {}
"""By the parameter's id."""


def watch(module: nn.Module) -> Callable[[], None]:
    """Count writes to parameters from now on, as long as there is a module. Return what ends that before."""
    return _watched.watch(module)


def _begin() -> None:
    nn.Parameter.data = property(_get, _set, doc=_data.__doc__)  # type: ignore[assignment]


def _end() -> None:
    del nn.Parameter.data
    _taken.clear()


_watched = Watched(_begin, _end)


def states(parameters: Iterable[nn.Parameter]) -> list[tuple[int, int, int]]:
    """Return of each parameter what is another once it was written to."""
    if not _taken:
        return [(p._version, p.data_ptr(), 0) for p in parameters]
    return [
        (p._version, p.data_ptr(), 0 if (taken := _taken.get(id(p))) is None else taken.count()) for p in parameters
    ]


def _of(parameter: nn.Parameter) -> _Taken:
    taken = _taken.get(id(parameter))
    if taken is None:
        taken = _taken[id(parameter)] = _Taken(parameter)
    return taken


def _get(parameter: nn.Parameter) -> torch.Tensor:
    alias: torch.Tensor = _data.__get__(parameter)
    return _of(parameter).take(alias) if parameter.requires_grad else alias


def _set(parameter: nn.Parameter, value: torch.Tensor) -> None:
    _data.__set__(parameter, value)
    if parameter.requires_grad:
        _of(parameter).set()
