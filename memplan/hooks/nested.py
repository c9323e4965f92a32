"""Walking what modules take and return."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

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
