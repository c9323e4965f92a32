"""Walking what modules take and return."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """Yield the tensors in nested tuples, lists, mappings (transformers' outputs among them) and dataclasses."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from tensors_in(part)
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from tensors_in(part)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors_in(getattr(value, field.name))


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
