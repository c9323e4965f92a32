"""Who else holds the memory that frozen weights have before attach: they would part from the model without a word.

A ``state_dict``, a ``weight.data`` or a view that was taken before refers to memory that is the model's no more once
its blocks have homes: what is written to it does not reach the model, and it is not freed. Parameters and buffers that
lie there are refused, since they may be what is trained; of what else holds it is told once. Memory of a file, or of
NumPy, is shared by design.
"""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from memplan.errors import ModelError
from memplan.model.live_storages import storage_of
from memplan.model.weights import Weight, plain_parts
from memplan.run.memory.arena import strides_of
from memplan.run.memory.home import is_away
from memplan.units import format_bytes

_LOG = logging.getLogger("memplan")


def refuse_shared(model: nn.Module, weights: Mapping[str, Weight]) -> None:
    """Raise ModelError where a tensor of the model that is no frozen weight lies in the memory of one."""
    managed = {id(tensor) for weight in weights.values() for tensor in weight.everywhere()}
    ranges: dict[int, list[tuple[int, int, str]]] = {}
    for weight in weights.values():
        for key, begin, end in _range(weight.tensor):
            ranges.setdefault(key, []).append((begin, end, weight.name))
    for name, held in _registered(model):
        for part in plain_parts(held):
            if id(part) in managed:
                continue
            for key, begin, end in _range(part):
                for other_begin, other_end, weight_name in ranges.get(key, ()):
                    if begin < other_end and other_begin < end:
                        raise ModelError(
                            f"{name} shares the memory of the frozen weight {weight_name}, which memplan is to "
                            "move: they would no longer be one. Give it memory of its own "
                            "(tensor.clone()), or make both one parameter"
                        )


def refuse_gaps(weights: Mapping[str, Weight]) -> None:
    """Raise ModelError where a matrix lies in memory with gaps, or over itself: a copy of it goes another way through
    matmul.
    """
    for weight in weights.values():
        held = weight.tensor
        if held.ndim > 1 and not is_away(held) and strides_of(held) is None and not held.is_contiguous():
            raise ModelError(
                f"the frozen weight {weight.name} has gaps in its memory or overlaps itself (shape "
                f"{tuple(held.shape)}, strides {held.stride()}), and results of a copy of it may differ in their "
                "last bits: make it contiguous before plan() (weight.data = weight.data.contiguous())"
            )


class Watched:
    """The memory that frozen weights had before they were moved. Keeps none of it."""

    def __init__(self, weights: Mapping[str, Weight]) -> None:
        self._seen: dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]] = {}
        for weight in weights.values():
            # One that is a view of another tensor (a buffer that was squeezed) holds that one itself.
            is_apart = not is_away(weight.tensor) and not any(tensor._is_view() for tensor in weight.everywhere())
            storage = storage_of(weight.tensor) if is_apart else None
            if storage is not None and storage.nbytes() and storage.device.type != "meta" and storage.resizable():
                self._seen.setdefault(storage._cdata, (weakref.ref(storage), weight.name, storage.nbytes()))

    def tell(self, model: nn.Module) -> None:
        """Warn of what somebody holds still. Of memory that the model itself is in, others may well hold more."""
        if not self._alive():
            return
        gc.collect()  # what nobody can reach any more is no one's
        own = {key for _, held in _registered(model) for part in plain_parts(held) for key, _, _ in _range(part)}
        found = [seen for key, seen in self._alive().items() if key not in own]
        if found:
            _LOG.warning(
                "%d frozen weights (%s; the first is %s) have their old memory still, which something holds that was "
                "taken of them before attach (a state_dict, weight.data, a view, an output with its graph): it is "
                "not freed, and what is written to it does not reach the model. Drop it before attach; a state_dict "
                "that is taken after attach follows the model",
                len(found),
                format_bytes(sum(size for _, _, size in found)),
                found[0][1],
            )

    def _alive(self) -> dict[int, tuple[weakref.ref[torch.UntypedStorage], str, int]]:
        return {key: seen for key, seen in self._seen.items() if seen[0]() is not None}


def _registered(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the parameters and buffers of a model's modules by name, one that is registered twice twice.

    Plain attributes are told of, not refused: spectral norms keep one that each forward replaces.
    """
    for prefix, module in model.named_modules():
        for name, held in (*module._parameters.items(), *module._buffers.items()):
            if held is not None:
                yield f"{prefix}.{name}" if prefix else name, held


def _range(tensor: torch.Tensor) -> Iterator[tuple[int, int, int]]:
    """Yield the storage that a tensor lies in, and the bytes of it from the first to the last; nothing where it holds
    none.
    """
    storage = None if tensor.device.type == "meta" or not tensor.numel() or is_away(tensor) else storage_of(tensor)
    if storage is not None and tensor.layout == torch.strided:
        begin = tensor.storage_offset() * tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        yield storage._cdata, int(begin), int(begin + (last + 1) * tensor.element_size())
