"""Arenas: one flat allocation of a tier. Items are byte ranges of it; parameters are views of those."""

from __future__ import annotations

import logging

import torch
from torch import nn

from memplan.analyze.graph import Tensor
from memplan.errors import RunError
from memplan.run.page_lock import page_locked
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")

_POISON = 0xFF
"""All bits set: NaN in every floating-point format, -1 in every signed integer."""


def dtype_of(name: str) -> torch.dtype:
    """Return torch's dtype of that name; raises RunError for what is none."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise RunError(
            f"the plan names the dtype {name!r}, which this torch does not have: use the torch it was made with"
        )
    return dtype


class Arena:
    """Bytes of one tier. On the compute device, or on the host (page-locked where the device is a CUDA one).

    [Note: alignment changes bits] torch aligns CPU allocations to 64 bytes and CUDA ones to 512, and addresses are
    multiples of 512: a weight's alignment here is that of a tensor of its own, so results are a whole run's to the bit.
    """

    def __init__(self, size_bytes: int, device: torch.device, *, pinned: bool = False) -> None:
        # Lightning validates in inference mode; tensors made there could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            self.bytes = _allocate(size_bytes, device, pinned)
        self.size_bytes = size_bytes

    def part(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Return that byte range: uint8, one dimension, no copy."""
        with torch.inference_mode(False), torch.no_grad():
            return self.bytes[offset_bytes : offset_bytes + size_bytes]


def poison(part: torch.Tensor) -> None:
    """Fill a byte range so that whoever reads it too early gets NaN."""
    part.fill_(_POISON)


def view(part: torch.Tensor, tensor: Tensor, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return ``tensor`` as a view of its block's byte range ``part``; ``order`` as for :func:`shaped`."""
    with torch.inference_mode(False), torch.no_grad():
        return shaped(part[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes], tensor, order)


def shaped(raw: torch.Tensor, tensor: Tensor, order: tuple[int, ...] | None = None) -> torch.Tensor:
    """Return the bytes ``raw`` (uint8, one dimension) as ``tensor``. ``order``: as :func:`memory_order` gave it."""
    with torch.inference_mode(False), torch.no_grad():
        values = raw.view(dtype_of(tensor.dtype))
        if order is None:
            return values.view(tensor.shape)
        inverse = sorted(range(len(order)), key=order.__getitem__)
        return values.view([tensor.shape[dim] for dim in order]).permute(inverse)


def memory_order(tensor: torch.Tensor) -> tuple[int, ...] | None:
    """Return the dimensions from the slowest to the fastest in memory; None where that is their own order.

    [Note: strides change bits] A transposed weight goes another way through matmul than a contiguous copy of it, so it
    keeps its order in an arena. One with gaps (a column of a larger tensor) becomes contiguous.
    """
    if tensor.is_contiguous():
        return None
    strides = tensor.stride()
    order = tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))
    return order if tensor.permute(order).is_contiguous() else None


def own_storage(part: torch.Tensor) -> torch.Tensor:
    """Return the same memory (uint8, one dimension) under a storage of its own.

    What saves a tensor saves its storage, and takes tensors of one storage for one tensor: neither is meant here.
    """
    with torch.inference_mode(False), torch.no_grad():
        begin = part.storage_offset()
        return part.new_empty(0).set_(part.untyped_storage()[begin : begin + part.numel()])


def _allocate(size_bytes: int, device: torch.device, pinned: bool) -> torch.Tensor:
    """Return that many bytes. Where page-locking is refused (WSL2, containers), pageable ones. Raises RunError."""
    if pinned and size_bytes:
        try:
            return page_locked(size_bytes)
        except RuntimeError as error:
            _LOG.warning(
                "%s of page-locked memory were refused (%s): pageable memory is taken, and what comes from there is copied once more",
                format_bytes(size_bytes),
                str(error).splitlines()[0],
            )
    try:
        return torch.empty(size_bytes, dtype=torch.uint8, device=device)
    except (RuntimeError, MemoryError) as error:
        tier = "vram" if device.type != "cpu" else "memory"
        raise RunError(
            f"{format_bytes(size_bytes)} of {tier} for the plan's blocks could not be had ({str(error).splitlines()[0]}): "
            "end what else uses it, or make the plan with a smaller budget"
        ) from error


class Placeholders:
    """What parameters are while their block is away: one NaN element expanded to the true shape.

    Counts, shapes and dtypes hold; a stray read is loud; nothing is allocated.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._elements: dict[torch.dtype, torch.Tensor] = {}

    def of(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a tensor of that shape and dtype that holds no memory of its own."""
        with torch.inference_mode(False), torch.no_grad():
            element = self._elements.get(dtype)
            if element is None:
                element = torch.empty(1, dtype=dtype, device=self._device)
                element.view(torch.uint8).fill_(_POISON)
                self._elements[dtype] = _ELEMENTS[element.data_ptr()] = element
            return element.expand(shape) if shape else element[0]


_ELEMENTS: dict[int, torch.Tensor] = {}
"""The element of every placeholder by its address, kept: of a weight of one element nothing else tells."""


def is_placeholder(parameter: nn.Parameter | torch.Tensor) -> bool:
    """Whether a tensor is one element expanded over several, or the one of a placeholder."""
    if any(stride for stride, size in zip(parameter.stride(), parameter.shape, strict=True) if size > 1):
        return False
    return parameter.numel() > 1 or (parameter.numel() == 1 and parameter.data_ptr() in _ELEMENTS)
