"""Containers and objects that are changed in place, compared and filled as their own kind does it: subclasses may do
otherwise, and are put back past what they override.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from enum import Enum
from operator import is_
from types import FunctionType, MemberDescriptorType, ModuleType
from typing import Any

import torch
from torch import nn

EXACT = frozenset({dict, OrderedDict, defaultdict, Counter, list, set, deque})
"""Those whose own methods do."""
_KINDS: tuple[Any, ...] = (OrderedDict, dict, list, set, deque)
_MAPPINGS = (OrderedDict, dict)
_OTHERS = frozenset(
    {"torch", "torchao", "bitsandbytes", "peft", "memplan", "threading", "logging", "_thread", "weakref", "functools"}
    | {"queue", "_queue", "asyncio", "concurrent", "multiprocessing", "socket", "io", "_io"}
)
"""Packages whose objects are no settings: what quantizers keep beside a weight comes and goes with its block, and what
threads share is not for one of them to put back.
"""
ABSENT: Any = object()

_KIND_OF: dict[type, Any] = {}
_HOLDS: dict[type, bool] = {}
_SLOTS: dict[type, tuple[Any, ...]] = {}


def kind_of(kind: type) -> Any:
    """Return which kind of container a class is, None for any other."""
    try:
        return _KIND_OF[kind]
    except KeyError:
        is_one = kind in EXACT or not _is_others(kind)
        found = next((one for one in _KINDS if issubclass(kind, one)), None) if is_one else None
        return _KIND_OF.setdefault(kind, found)


def holds_attributes(kind: type) -> bool:
    """Whether objects of a class hold plain attributes, as a configuration or a context of the script's does: in a
    dictionary, or in slots.
    """
    try:
        return _HOLDS[kind]
    except KeyError:
        is_one = bool(getattr(kind, "__dictoffset__", 0)) or bool(_slots_of(kind))
        no_settings = (nn.Module, torch.Tensor, type, BaseException, ModuleType, FunctionType, Enum)
        return _HOLDS.setdefault(kind, is_one and not issubclass(kind, no_settings) and not _is_others(kind))


def attributes_of(value: Any) -> dict[str, Any]:
    """Return the dictionary of an object's attributes; an empty one where it has slots alone."""
    return value.__dict__ if type(value).__dictoffset__ else {}


def _is_others(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in _OTHERS


def _slots_of(kind: type) -> tuple[Any, ...]:
    try:
        return _SLOTS[kind]
    except KeyError:
        members = [m for one in kind.__mro__ if "__slots__" in vars(one) for m in vars(one).values()]
        return _SLOTS.setdefault(kind, tuple(m for m in members if isinstance(m, MemberDescriptorType)))


def in_slots(value: Any) -> tuple[Any, ...]:
    """Return what an object holds in its slots, ``ABSENT`` for what it does not."""
    return tuple(_in_slot(slot, value) for slot in _slots_of(type(value)))


def _in_slot(slot: Any, value: Any) -> Any:
    try:
        return slot.__get__(value)
    except AttributeError:
        return ABSENT


def put_in_slots(value: Any, held: tuple[Any, ...]) -> None:
    """Have an object hold that in its slots."""
    for slot, part in zip(_slots_of(type(value)), held, strict=True):
        if (now := _in_slot(slot, value)) is part:
            continue
        if part is not ABSENT:
            slot.__set__(value, part)
        elif now is not ABSENT:
            slot.__delete__(value)


def size_of(value: Any) -> int:
    """Return how many a container holds."""
    return len(value) if type(value) in EXACT else kind_of(type(value)).__len__(value)


def parts_of(value: Any) -> list[Any]:
    """Return what a container holds, keys apart."""
    kind = kind_of(type(value))
    return list(kind.values(value) if kind in _MAPPINGS else kind.__iter__(value))


def copied(value: Any) -> Any:
    """Return a container of the same kind that holds the same."""
    if type(value) in EXACT:
        return value.copy()
    kind = kind_of(type(value))
    if kind is deque:
        return deque(deque.__iter__(value), value.maxlen)
    return kind(kind.items(value) if kind in _MAPPINGS else kind.__iter__(value))


def is_same(now: Any, held: Any) -> bool:
    """Whether a container holds the very objects that a copy of it does, in the same order."""
    now = now if type(now) in EXACT else copied(now)
    if type(now) is set:  # a copy's order may be another
        return bool(now == held)
    if len(now) != len(held) or not all(map(is_, now, held)):
        return False
    return not isinstance(now, dict) or all(map(is_, now.values(), held.values()))


def fill(value: Any, held: Any) -> None:
    """Have a container hold what a copy of it does."""
    kind = kind_of(type(value))
    kind.clear(value)
    if kind is OrderedDict:
        for key, part in held.items():
            OrderedDict.__setitem__(value, key, part)
    elif kind is dict or kind is set:
        kind.update(value, held)
    else:
        kind.extend(value, held)


def clear(value: Any) -> None:
    """Have a container hold nothing."""
    kind_of(type(value)).clear(value)
