"""An independent count of live device bytes: it shares no code with the package's own ledger."""

from __future__ import annotations

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators return or that were told, while they are alive."""

    def __init__(self, tensors=()):
        super().__init__()
        self.alive = weakref.WeakKeyDictionary()
        self.peak = 0
        for tensor in tensors:
            self.alive[tensor.untyped_storage()] = True
        self.look()

    def look(self):
        self.peak = max(self.peak, sum(storage.nbytes() for storage in self.alive))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        grown = False
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.alive:
                self.alive[tensor.untyped_storage()] = True
                grown = True
        if grown:
            self.look()
        return result


def held_by(model, optimizer):
    """Every tensor that is there before a step: parameters, buffers, gradients, optimizer state."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor
        if tensor.grad is not None:
            yield tensor.grad
    for state in optimizer.state.values():
        yield from (value for value in state.values() if isinstance(value, torch.Tensor))
