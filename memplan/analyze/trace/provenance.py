"""What a storage's contents were made of, followed from operator to operator through a trace.

What is made of frozen weights alone, whatever the batch, is *derived*: autocast's casts, weights merged with an
adapter, transposed copies, dequantized weights. Where autograd saves it, weights are held once more.

[Note: rows are no copies] What a lookup gathers (an embedding's rows, a table of positions) is as large as what was
asked for, so it counts as the batch's, whoever made the indices. So does a product of frozen weights that is as large
as none of them (queries of the model's own that go through its layers).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from memplan.analyze.blocks.blocks import dtype_name
from memplan.analyze.trace.operators import Operator, tensors
from memplan.model.live_storages import storage_of

CASTS = "casts to "
"""How a copy was made that only has another dtype, before the name of that."""

_WEIGHTS, _BATCH = 1, 2
"""The greater wins. What is in neither (constants, buffers, what is trained) has no entry."""


class Origins:
    """Knows of each storage, by its address, whether weights alone or a batch went into it."""

    def __init__(self, frozen: Iterable[int], batch: Iterable[int]) -> None:
        """Addresses of the storages of frozen weights, and of the batch."""
        self._of = dict.fromkeys(frozen, _WEIGHTS) | dict.fromkeys(batch, _BATCH)
        self._made_by: dict[int, str] = {}

    def follow(self, known: Operator, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Note what an operator's results were made of."""
        if known.reads_shape_only:
            return
        given = (self._of.get(address, 0) for address in _addresses((*args, *kwargs.values())))
        origin = max(given, default=0)
        if origin and (known.reads_rows or (known.is_matmul and not _is_as_large(result, args))):
            origin = _BATCH
        if not origin:
            return
        for made in tensors((result,)):
            for address in _addresses((made,)):
                self._of[address] = origin
                self._made_by[address] = _how(known, made)

    def forget(self, address: int) -> str:
        """Take a storage as gone. Return how it was made if weights alone went into it, else nothing."""
        origin, how = self._of.pop(address, 0), self._made_by.pop(address, "")
        return how if origin == _WEIGHTS else ""

    def derived(self, address: int) -> str:
        """Return how a storage was made if weights alone went into it, else nothing."""
        return self._made_by.get(address, "") if self._of.get(address) == _WEIGHTS else ""


def _is_as_large(result: Any, args: tuple[Any, ...]) -> bool:
    """Whether a product is as large as something that went into it: a weight that another was added to."""
    sizes = {tensor.numel() for tensor in tensors(args)}
    return any(made.numel() in sizes for made in tensors((result,)))


def _addresses(arguments: Iterable[Any]) -> Iterable[int]:
    for tensor in tensors(arguments):
        storage = storage_of(tensor)
        if storage is not None:
            yield storage._cdata


def _how(known: Operator, made: torch.Tensor) -> str:
    return CASTS + dtype_name(made.dtype) if known.name == "_to_copy" else f"made by {known.name}"
