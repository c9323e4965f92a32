"""Doing a micro-batch over again after it ran out of device memory: what must be as it was before it."""

from __future__ import annotations

from typing import overload

import torch
from torch import nn

from memplan.model.weights import frozen_weights
from memplan.run.transfer.device import is_apart
from memplan.state.process_state import RandomStates

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device memory ran out, in torch's words or a library's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class Before:
    """The state that a forward and backward change: gradients of what is trained, buffers, random numbers."""

    def __init__(self, model: nn.Module) -> None:
        self._managed = {id(weight.tensor) for weight in frozen_weights("", model, deep=True)}
        self._gradients = [(p, _copy(p.grad)) for p in model.parameters() if p.requires_grad]
        self._model = model
        self.note_buffers()
        self._random = RandomStates()

    def note_buffers(self) -> None:
        """Have the buffers of now be those that were before."""
        self._buffers = [
            (module, name, buffer, _copy(buffer))
            for module in self._model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and id(buffer) not in self._managed
        ]

    def restore(self) -> None:
        """Have all of it as it was."""
        with torch.no_grad():
            for parameter, gradient in self._gradients:
                if gradient is None:
                    parameter.grad = None
                elif parameter.grad is None:
                    parameter.grad = gradient.to(parameter.device, copy=True)
                else:
                    parameter.grad.copy_(gradient)
            for module, name, buffer, value in self._buffers:
                buffer.copy_(value)
                module._buffers[name] = buffer  # a forward may have put another in its place
        self._random.restore()


@overload
def _copy(tensor: None) -> None: ...
@overload
def _copy(tensor: torch.Tensor) -> torch.Tensor: ...
def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    """Return a copy, in RAM where the tensor lies on a device: in the stream's order, without waiting for it."""
    if tensor is None or not is_apart(tensor.device):
        return None if tensor is None else tensor.detach().clone()
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor.detach(), non_blocking=True)
