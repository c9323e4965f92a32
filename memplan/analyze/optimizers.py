"""Bytes that an optimizer keeps for the trained parameters, and those it needs for a moment, by formula."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

from memplan.errors import InputError

_STEP_BYTES = 4
"""A float32 scalar beside each parameter."""
_QUANTIZED_FROM = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
_QUANTIZED_BLOCK = 256
"""Elements that share one float32 scale there."""

Shape = tuple[tuple[int, ...], int]
"""Shape and bytes of an element."""


def _two_moments(shape: tuple[int, ...], item_bytes: int) -> int:
    return 2 * math.prod(shape) * item_bytes + _STEP_BYTES


def _one_moment(shape: tuple[int, ...], item_bytes: int) -> int:
    return math.prod(shape) * item_bytes


def _factored(shape: tuple[int, ...], item_bytes: int) -> int:
    """Adafactor: sums over rows and columns instead of a full second moment (Shazeer and Stern, 2018)."""
    if len(shape) < 2:
        return 4 * math.prod(shape) + _STEP_BYTES
    return 4 * (math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]) + _STEP_BYTES


def _two_moments_8bit(shape: tuple[int, ...], item_bytes: int) -> int:
    count = math.prod(shape)
    if count < _QUANTIZED_FROM:
        return 8 * count
    return 2 * (count + 4 * -(-count // _QUANTIZED_BLOCK))


_STATE: dict[str, Callable[[tuple[int, ...], int], int]] = {
    "adamw": _two_moments,
    "adam": _two_moments,
    "adamw_torch": _two_moments,
    "adamw_torch_fused": _two_moments,
    "adamw_8bit": _two_moments_8bit,
    "adamw_bnb_8bit": _two_moments_8bit,
    "paged_adamw_8bit": _two_moments_8bit,
    "adafactor": _factored,
    "lion": _one_moment,
    "momentum": _one_moment,
    "sgd": lambda shape, item_bytes: 0,
}
_IN_PLACE = ("adamw_torch_fused", "adamw_8bit", "adamw_bnb_8bit", "paged_adamw_8bit")


def check_optimizer(name: str) -> None:
    """Raise InputError where the optimizer is not known."""
    if name not in _STATE:
        raise InputError(f"the optimizer {name!r} is not known: give one of {', '.join(sorted(_STATE))}")


def state_bytes(name: str, trained: Iterable[Shape]) -> int:
    """Return the bytes of an optimizer's state. ``trained``: shape and element size of each parameter."""
    return sum(_STATE[name](shape, item_bytes) for shape, item_bytes in trained)


def workspace_bytes(name: str, trained: Sequence[Shape]) -> int:
    """Return the bytes that are alive only within a step of the optimizer.

    torch's loop over single tensors (the CPU) needs twice the largest, its foreach way (CUDA) one copy of all.
    """
    if name in _IN_PLACE:
        return 0
    sizes = [math.prod(shape) * item_bytes for shape, item_bytes in trained]
    return 0 if name == "sgd" else max(2 * max(sizes), sum(sizes))
