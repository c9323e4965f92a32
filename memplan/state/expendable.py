"""What a forward that is only looked at is given in place of what it would use up: iterators, files, cached functions.

[Note: what cannot be put back] A generator function's iterator cannot be rewound, and a file that is read has no copy:
in their places lie objects that raise ModelError with the name of what was asked. What is written to a file goes
nowhere.
"""

from __future__ import annotations

import functools
import io
import sys
import warnings
from collections.abc import Callable
from typing import Any

from memplan.errors import ModelError


def expendable(value: Any, where: str, keeps_cache: Callable[[Any], bool]) -> Any:
    """Return what a forward may use up in place of ``value``, which ``where`` names. ``keeps_cache``: whether a cached
    function is one that is to be called itself.
    """
    if isinstance(value, functools._lru_cache_wrapper):
        if keeps_cache(value):
            return value
        fresh = functools.lru_cache(**value.cache_parameters())(value.__wrapped__)
        return functools.update_wrapper(fresh, value.__wrapped__)
    if isinstance(value, io.IOBase):
        if value.closed or any(value is stream for stream in (sys.stdout, sys.stderr, sys.stdin)):
            return value
        if value.readable():
            return Unrepeatable(where, "an open file")
        return io.StringIO() if isinstance(value, io.TextIOBase) else io.BytesIO()
    try:
        return _copied(value)
    except (TypeError, AttributeError):
        return Unrepeatable(where, f"a {type(value).__name__}, which cannot be rewound")


def _copied(value: Any) -> Any:
    """Return an iterator that goes on as ``value`` would, and leaves that where it is."""
    if isinstance(value, tuple):
        return tuple(_copied(part) for part in value)
    if not hasattr(type(value), "__next__"):
        return value
    kind, arguments, *state = reduced(value)
    made = kind(*_copied(arguments))
    if state and state[0] is not None:
        held_on = state[0] if isinstance(state[0], tuple) else (state[0],)
        own = tuple(list(part) if isinstance(part, list) else _copied(part) for part in held_on)
        made.__setstate__(own if isinstance(state[0], tuple) else own[0])
    return made


def reduced(value: Any) -> Any:
    """Return what an iterator is made of anew."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # those of itertools lose it with Python 3.14
        return value.__reduce__()


class Unrepeatable:
    """Stands for what a look at the model would use up."""

    def __init__(self, where: str, what: str) -> None:
        self.__dict__["_message"] = (
            f"the forward draws from {where}, {what}: planning would use up what training is to see. Draw from it "
            "outside of the model and hand the values in, or hold a list and a position"
        )

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        raise ModelError(self.__dict__["_message"])

    def __getattr__(self, name: str) -> Any:
        raise ModelError(self.__dict__["_message"])
