"""An independent count of live device bytes: it shares no code with the package's own ledger."""

from __future__ import annotations

import ctypes
import mmap
import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators return or that were told, while they are alive."""

    def __init__(self, tensors=(), apart=(), arena=None):
        """``apart``: tensors whose storages are no device bytes. ``arena``: a plan's, of which the kernel says what is
        there.
        """
        super().__init__()
        self.segments = []
        if arena is not None and arena.is_elastic:
            self.segments, apart = [part for _, part in arena._segments], (*apart, arena.bytes)
        self.apart = {tensor.untyped_storage().data_ptr() for tensor in apart}
        self.alive = weakref.WeakKeyDictionary()
        self.peak = 0
        with torch._C.DisableTorchFunctionSubclass():  # of weights that are away: what is in their place
            for tensor in tensors:
                self.alive[tensor.untyped_storage()] = True
        self.look()

    def look(self):
        counted = (storage.nbytes() for storage in self.alive if storage.data_ptr() not in self.apart)
        there = (min(resident_bytes(part), part.numel()) for part in self.segments)
        self.now = sum(counted) + sum(there)
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "__tensor_flatten__") for kind in types):
            return NotImplemented  # made of other tensors: those are counted
        result = func(*args, **(kwargs or {}))
        grown = False
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.alive:
                self.alive[tensor.untyped_storage()] = True
                grown = True
        if grown:
            self.look()
        return result


def resident_bytes(tensor):
    """Bytes of the pages of a tensor's memory that the kernel holds."""
    pages = -(-tensor.numel() // mmap.PAGESIZE)
    found = (ctypes.c_ubyte * pages)()
    begin, size = ctypes.c_void_p(tensor.data_ptr()), ctypes.c_size_t(tensor.numel())
    if ctypes.CDLL(None, use_errno=True).mincore(begin, size, found):
        raise OSError(ctypes.get_errno(), "mincore")
    return sum(byte & 1 for byte in found) * mmap.PAGESIZE


def held_by(model, optimizer):
    """Every tensor that is there before a step: parameters, buffers, gradients, optimizer and quantization state."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield from parts_of(tensor)
        if tensor.grad is not None:
            yield tensor.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
    for module in model.modules():  # bitsandbytes' states
        for state in (getattr(getattr(module, "weight", None), "quant_state", None), getattr(module, "state", None)):
            for holder in (state, getattr(state, "state2", None)):
                held = vars(holder).values() if hasattr(holder, "__dict__") else ()
                yield from (value for value in held if isinstance(value, torch.Tensor))


def parts_of(tensor):
    """The tensors that a tensor is made of, or itself."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    for name in tensor.__tensor_flatten__()[0]:
        yield from parts_of(getattr(tensor, name))
