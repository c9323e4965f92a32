"""Walking what modules take and return."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Mapping, MutableMapping
from typing import Any

import torch


def tensors_in(value: object) -> list[torch.Tensor]:
    """Return the tensors in nested tuples, lists, mappings (transformers' outputs among them) and dataclasses."""
    if isinstance(value, torch.Tensor):
        return [value]
    found: list[torch.Tensor] = []
    _find(value, found)
    return found


def _find(value: object, found: list[torch.Tensor]) -> None:
    # In each forward of each layer: a list that is filled takes a third of what generators within each other do.
    if isinstance(value, (tuple, list)):
        parts: Iterable[object] = value
    elif isinstance(value, Mapping):
        parts = value.values()
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in dataclasses.fields(value)]
    else:
        return
    for part in parts:
        if isinstance(part, torch.Tensor):
            found.append(part)
        elif part is not None:
            _find(part, found)


def changed(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return the same with each tensor changed, in containers of the same classes."""

    def within(part: Any) -> Any:
        return changed(part, change)

    other: Any
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(within, value))
    if isinstance(value, (tuple, list)):
        return type(value)(map(within, value))
    if type(value) is dict or (isinstance(value, Mapping) and not isinstance(value, MutableMapping)):
        return {name: within(part) for name, part in value.items()}
    if isinstance(value, MutableMapping):  # a tokenizer's batch has attributes besides
        other = copy.copy(value)
        for name, part in value.items():
            other[name] = within(part)
        return other
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        other = copy.copy(value)
        for field in dataclasses.fields(value):
            object.__setattr__(other, field.name, within(getattr(value, field.name)))
        return other
    return value
