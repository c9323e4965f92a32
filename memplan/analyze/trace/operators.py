"""What one operator costs: FLOPs of matrix products, bytes read and written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry

_aten = torch.ops.aten
_ROWS = {_aten.embedding.default, _aten.index_select.default, _aten.gather.default, _aten.index.Tensor}
"""They read as many elements as they write, however large the table."""
_NOT_READ = {"empty_like", "zeros_like", "ones_like", "full_like", "rand_like", "randn_like", "new_empty", "new_zeros"}
_FREE_NAMES = {"_unsafe_view", "detach", "lift_fresh", "alias", "empty", "empty_strided", "set_", "resize_"}
_FREE_NAMES |= {"_local_scalar_dense", "new_empty", "new_empty_strided", "empty_like"}
_ATTENTION = "_scaled_dot_product_flash_attention_for_cpu"
"""Missing in torch's registry: a CPU stands in for every device in a trace."""
_BITSANDBYTES = {"gemm_4bit", "gemv_4bit", "int8_scaled_mm", "int8_mixed_scaled_mm", "int8_linear_matmul"}
_STATISTICS = {
    "native_batch_norm": (3, 4),
    "cudnn_batch_norm": (3, 4),
    "miopen_batch_norm": (3, 4),
    "batch_norm_update_stats": (1, 2),
    "batch_norm_gather_stats": (3, 4),
    "batch_norm_gather_stats_with_counts": (3, 4),
}
"""Arguments that are written to without a word in the operator's schema; of the first three only in training."""
_ONLY_IN_TRAINING = {"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"}
_TRAINING = 5
"""Place of their argument that says so."""
_GROUPED = {"_grouped_mm", "grouped_mm_fallback", "grouped_mm_fallback_backward"}


class Operator:
    """What is known of an operator whatever its arguments."""

    __slots__ = ("_written", "is_free", "is_matmul", "name", "reads_rows", "reads_shape_only")

    def __init__(self, func: Any) -> None:
        self.name: str = func._overloadpacket.__name__
        self.is_free = func.is_view or self.name in _FREE_NAMES
        """No kernel: a view, or memory without contents."""
        self.is_matmul = (
            func._overloadpacket in flop_registry
            or self.name.startswith(_ATTENTION)
            or self.name in _GROUPED
            or (func.namespace == "bitsandbytes" and self.name in _BITSANDBYTES)
        )
        self.reads_rows = func in _ROWS
        self.reads_shape_only = self.is_free or self.name in _NOT_READ
        self._written: tuple[tuple[int, str], ...] = tuple(
            (place, argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write and self.name != "set_"
        ) + tuple((place, "") for place in _STATISTICS.get(self.name, ()))
        """Places and names of the arguments that it writes to. ``set_`` points a tensor elsewhere, and writes nothing.
        """

    def written(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[torch.Tensor]:
        """Yield the tensors that a call writes to."""
        if not self._written or (self.name in _ONLY_IN_TRAINING and not args[_TRAINING]):
            return
        for place, name in self._written:
            yield from tensors((args[place] if place < len(args) else kwargs.get(name),))


_known: dict[Any, Operator] = {}


def operator(func: Any) -> Operator:
    """Return what is known of an operator."""
    found = _known.get(func)
    if found is None:
        found = _known[func] = Operator(func)
    return found


def flops(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> int:
    """Return the FLOPs of a matrix product or an attention."""
    packet = func._overloadpacket
    counted = flop_registry.get(packet)
    if counted is not None:
        return int(counted(*args, **kwargs, out_val=result))
    name = packet.__name__
    if name == _ATTENTION:
        return _attention_flops(*args[:3], key_products=1, value_products=1)
    if name == _ATTENTION + "_backward":  # the scores again, and the gradients of query, key, scores and value
        return _attention_flops(*args[1:4], key_products=3, value_products=2)
    if name in _BITSANDBYTES:  # (rows, quantized matrix, …) -> rows of another width
        return 2 * int(args[0].numel()) * int(result.shape[-1])
    return _grouped_flops(name, [a for a in args if isinstance(a, torch.Tensor)])


def workspace_bytes(func: Any, args: tuple[Any, ...]) -> int:
    """Return the bytes that a product allocates within itself: a 4-bit matrix is dequantized for it."""
    if func._overloadpacket.__name__ != "gemm_4bit":
        return 0
    rows, columns = args[2]
    return int(rows) * int(columns) * int(args[0].element_size())


def tensors(arguments: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors among an operator's arguments or results."""
    for argument in arguments:
        if isinstance(argument, torch.Tensor):
            yield argument
        elif isinstance(argument, (list, tuple)):
            yield from tensors(argument)


def size_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes of a tensor's elements."""
    return tensor.numel() * tensor.element_size()


def _attention_flops(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, key_products: int, value_products: int
) -> int:
    """Products of scores' size, each over a head's width of keys or of values. torch 2.11 counts the same, but refuses
    fewer heads of keys than of queries, which the kernel takes.
    """
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[-2] * (key_products * width + value_products * value.shape[-1])


def _grouped_flops(name: str, given: list[torch.Tensor]) -> int:
    """Products of groups of rows with a matrix each: every row meets one matrix."""
    left, right = given[0], given[1]
    if name.endswith("_backward"):  # (input, weight, offsets, grad_output): both gradients
        return 4 * left.shape[0] * right.shape[-1] * right.shape[-2]
    return 2 * left.numel() * right.shape[-1]
