"""Random numbers that a trace makes up: each within the range that it is drawn from, the same in every trace.

Where they decide (is this layer dropped, which block is left out) any of the range may come, so integers are spread
evenly over it from its least on, and a permutation is the identity. A single fraction is the highest that there is:
what is dropped by chance is kept.

On a GPU dropout is another operator than on a CPU: see :func:`dropout_of`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional

from memplan.device_kinds import is_apart

_MOST_ELEMENTS = 1 << 20
"""Values of larger tensors are not made up: nobody asks for one of them."""

_aten = torch.ops.aten
_INTEGERS = {_aten.randint, _aten.randint_like, _aten.random, _aten.random_}
_FRACTIONS = {_aten.rand, _aten.rand_like, _aten.uniform, _aten.uniform_}
DRAWS = {*_INTEGERS, *_FRACTIONS, _aten.randperm}


def drawn(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], like: torch.Tensor) -> torch.Tensor | None:
    """Return what one of ``DRAWS`` is taken to have drawn into ``like``; None where it does not matter."""
    packet, count = func._overloadpacket, like.numel()
    if packet in _FRACTIONS:
        return torch.full(like.shape, _highest(args, like.dtype, packet), dtype=like.dtype) if count == 1 else None
    if count > _MOST_ELEMENTS:
        return None
    numbers = torch.arange(count)
    if packet is _aten.randperm:
        return numbers.to(like.dtype)
    low, high = _range(func, args, kwargs)
    if high is None:  # up to the most that the dtype holds
        return torch.full(like.shape, low, dtype=like.dtype)
    return (low + numbers % max(1, high - low)).reshape(like.shape).to(like.dtype)


def _range(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int | None]:
    """Return the least of the integers that are drawn from, and the first beyond."""
    named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
    low = named.get("low", named.get("from", 0))
    high = named.get("high", named.get("to"))
    return int(low or 0), int(high) if type(high) is int else None


def _highest(args: tuple[Any, ...], dtype: torch.dtype, packet: Any) -> float:
    low, high = 0.0, 1.0
    if packet in (_aten.uniform, _aten.uniform_):
        low = args[1] if len(args) > 1 else low
        high = args[2] if len(args) > 2 else high
    if not high > low:
        return float(low)
    below = torch.nextafter(torch.tensor(high, dtype=dtype), torch.tensor(-math.inf, dtype=dtype))
    return float(below)


_ATTENTION = "scaled_dot_product_attention"


@contextmanager
def dropout_of(device: str) -> Iterator[None]:
    """Within it dropout runs, and saves for backward, what it does on a kind of device.

    A CPU keeps a mask in the input's dtype, a GPU one of a byte an element (``native_dropout``; see
    ``is_fused_kernel_acceptable`` in torch's ``aten/src/ATen/native/Dropout.cpp``). Attention that drops is one kernel
    on a GPU (its flash and memory-efficient ones take ``dropout_p``), and on a CPU many, with all scores: there it is
    seen as it would be without. Fake tensors are of the CPU.
    """
    if not is_apart(device):
        yield
        return

    def dropout(tensor: torch.Tensor, p: float, train: bool) -> torch.Tensor:
        if train and 0 < p < 1 and tensor.numel():
            return torch.native_dropout(tensor, p, train)[0]
        return kept(tensor, p, train)

    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        **more: Any,
    ) -> torch.Tensor:
        return kept_attention(query, key, value, attn_mask, 0.0 if dropout_p < 1 else dropout_p, **more)

    kept, kept_attention = torch.dropout, functional.scaled_dot_product_attention
    stand_ins = ((torch._VF, "dropout", dropout), (torch, "dropout", dropout), (functional, _ATTENTION, attention))
    before = [(place, name, getattr(place, name)) for place, name, _ in stand_ins]
    try:
        for place, name, function in stand_ins:
            setattr(place, name, function)
        yield
    finally:
        for place, name, function in before:
            setattr(place, name, function)
