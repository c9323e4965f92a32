"""Arenas: one flat allocation of a tier. Items are byte ranges of it; parameters are views of those."""

from __future__ import annotations

import torch
from torch import nn

from memplan.analyze.graph import Tensor
from memplan.errors import RunError

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
            self.bytes = torch.empty(size_bytes, dtype=torch.uint8, device=device, pin_memory=pinned)
        self.size_bytes = size_bytes

    def part(self, offset_bytes: int, size_bytes: int) -> torch.Tensor:
        """Return that byte range: uint8, one dimension, no copy."""
        with torch.inference_mode(False), torch.no_grad():
            return self.bytes[offset_bytes : offset_bytes + size_bytes]


def poison(part: torch.Tensor) -> None:
    """Fill a byte range so that whoever reads it too early gets NaN."""
    part.fill_(_POISON)


def view(part: torch.Tensor, tensor: Tensor) -> torch.Tensor:
    """Return ``tensor`` as a view of its block's byte range ``part``."""
    with torch.inference_mode(False), torch.no_grad():
        raw = part[tensor.offset_bytes : tensor.offset_bytes + tensor.size_bytes]
        return raw.view(dtype_of(tensor.dtype)).view(tensor.shape)


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
                self._elements[dtype] = element
            return element.expand(shape) if shape else element[0]


def is_placeholder(parameter: nn.Parameter | torch.Tensor) -> bool:
    """Whether a tensor is one element expanded over several."""
    return parameter.numel() > 1 and all(stride == 0 for stride in parameter.stride())
