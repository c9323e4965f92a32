"""The autocast that a trace runs under: one that is asked for, else the caller's own; and the rest of the caller's
contexts, which a trace leaves.

[Note: a trace is on the CPU] So an autocast for a GPU is traced as the CPU's of the same dtype. Products are lowered
alike; a few operators that it keeps in float32 (norms, softmax) are not, and count for less than they will take.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from memplan import device_kinds
from memplan.model.arguments import autocast_name


def dtype_of_autocast(given: object) -> torch.dtype | None:
    """Return what products are computed in: ``given`` (a dtype or its name), else the caller's autocast; None: neither.

    Raises InputError for what autocast cannot compute in.
    """
    if given is not None:
        found: torch.dtype = getattr(torch, autocast_name(given))
        return found
    for device in sorted(device_kinds.known(), key=device_kinds.is_apart, reverse=True):
        if torch.is_autocast_enabled(device):
            return torch.get_autocast_dtype(device)
    return None


@contextlib.contextmanager
def outside_saving() -> Iterator[None]:
    """Leave what the caller does with tensors that autograd saves for a while: a checkpoint around counts them."""
    hooks: Any = torch._C._autograd
    away = []
    while (top := hooks._top_saved_tensors_default_hooks(False)) is not None:
        away.append(top)
        hooks._pop_saved_tensors_default_hooks()
    try:
        yield
    finally:
        for pack, unpack in reversed(away):
            hooks._push_saved_tensors_default_hooks(pack, unpack)


@contextlib.contextmanager
def outside_autocast() -> Iterator[None]:
    """Leave the caller's autocast for a while.

    torch drops the casts that it keeps for a second use when the outermost autocast is left: those of a forward as it
    ends, those of a recompute as that ends. Within a caller's all would stay.
    """
    enabled = torch.is_autocast_enabled("cpu")
    depth = torch.autocast_increment_nesting() - 1
    for _ in range(depth + 1):
        torch.autocast_decrement_nesting()
    torch.set_autocast_enabled("cpu", False)
    try:
        yield
    finally:
        for _ in range(depth):
            torch.autocast_increment_nesting()
        torch.set_autocast_enabled("cpu", enabled)
