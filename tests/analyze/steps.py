"""Real training steps on the CPU, watched in a way of their own: nothing here is shared with the analyzer."""

from __future__ import annotations

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.hooks.triggers import Triggers


class CountLive(TorchDispatchMode):
    """Live bytes of the storages that operators return, looked through anew at every operator."""

    def __init__(self, *, apart):
        super().__init__()
        self.apart = {t.untyped_storage()._cdata for t in apart}
        self.keep = [t.untyped_storage() for t in apart]
        self.seen = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.seen = {k: (ref, size) for k, (ref, size) in self.seen.items() if not ref.expired()}
        for value in torch.utils._pytree.tree_leaves(result):
            if isinstance(value, torch.Tensor):
                storage = value.untyped_storage()
                if storage._cdata not in self.apart:
                    self.seen[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.seen.values()))
        return result


def count_pass(model, batch, loss_of=lambda output: output["loss"]):
    """Peak bytes of one forward and backward besides weights, adapters, buffers, tensors in attributes, and batch."""
    model.train()
    held = torch.utils._pytree.tree_leaves([batch, *(vars(module) for module in model.modules())])
    counter = CountLive(
        apart=[*model.parameters(), *model.buffers(), *(t for t in held if isinstance(t, torch.Tensor))]
    )
    with counter:
        output = model(**batch)
        loss = loss_of(output)
        del output
        loss.backward()
    for parameter in model.parameters():
        parameter.grad = None
    return counter.peak


class Log:
    """Announcements of a real step, as the triggers give them."""

    def __init__(self):
        self.events = []
        self.current = None

    def _access(self, kind, module):
        if self.events[-1:] != [(kind, module)]:
            self.events.append((kind, module))

    def forward_begins(self, module, *, in_backward):
        self._access("backward" if in_backward else "forward", module)
        return 0

    def forward_ends(self, module, call, *, in_backward):
        pass

    def backward_begins(self, module, call):
        self._access("backward", module)

    def forward_failed(self):
        pass

    def backward_ends(self):
        pass


def real_order(model, batch, modules, loss_of=lambda output: output["loss"]):
    """Accesses of a real forward and backward, in the order announced, neighbours that are alike merged."""
    log = Log()
    triggers = Triggers(modules, log)
    try:
        model.train()
        loss_of(model(**batch)).backward()
    finally:
        triggers.remove()
    for parameter in model.parameters():
        parameter.grad = None
    return log.events
