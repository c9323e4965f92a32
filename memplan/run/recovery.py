"""Doing a micro-batch over again after it ran out of device memory: what must be as it was before it."""

from __future__ import annotations

import torch
from torch import nn

from memplan.model.weights import frozen_weights
from memplan.run.memory.arena import Arena, has_no_gaps
from memplan.run.transfer.device import is_apart
from memplan.state.process_state import RandomStates
from memplan.units import align_up

_WORDS = ("can't allocate memory", "not enough memory", "out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
_ALIGNMENT_BYTES = 16
"""Enough for any dtype."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device memory ran out, in torch's words or a library's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(word in str(error) for word in _WORDS)


class Room:
    """RAM in which what lies on a device waits while a micro-batch runs: had once, used for each, and pinned where a
    ``limit_bytes`` of pinned RAM leaves room (None: no limit).

    Copies come and go in the order of the compute stream, so one room does for all.
    """

    def __init__(self, limit_bytes: int | None) -> None:
        self._limit_bytes = limit_bytes
        self._held: torch.Tensor | None = None
        self._used_bytes = 0

    @property
    def size_bytes(self) -> int:
        """What it takes of RAM."""
        return 0 if self._held is None else self._held.numel()

    def empty_for(self, size_bytes: int) -> None:
        """Have it empty, and of so many bytes at least."""
        self._used_bytes = 0
        if size_bytes > self.size_bytes:
            self._held = None  # before another is there
            pinned = self._limit_bytes is None or size_bytes <= self._limit_bytes
            self._held = Arena(size_bytes, torch.device("cpu"), pinned=pinned).bytes

    def copy(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of what lies on a device, in the stream's order, without waiting for it where it is pinned."""
        assert self._held is not None
        begin = self._used_bytes
        self._used_bytes = begin + room_bytes(tensor)
        raw = self._held[begin : begin + tensor.nbytes].view(tensor.dtype)
        kept = raw.as_strided(tensor.size(), tensor.stride())
        return kept.copy_(tensor.detach(), non_blocking=True)


def room_bytes(tensor: torch.Tensor) -> int:
    """Return what a tensor takes of a room; 0 for one that is copied where it lies: on the CPU, sparse, with gaps."""
    if not is_apart(tensor.device) or tensor.layout != torch.strided or not has_no_gaps(tensor):
        return 0
    return align_up(tensor.nbytes, _ALIGNMENT_BYTES)


class _Oldest:
    """A graph of one node, older than what comes after it, to know when a device's thread is through with all of that.

    torch's engine runs backward of a device in a thread of that device. Where it fails the caller is told first, and
    the thread lets go of the graph then: it may be the last to hold it, and with it the arena that its tensors are
    views of, while another arena is to be had. It takes the latest nodes first, so this one comes after them.
    """

    def __init__(self, device: torch.device) -> None:
        with torch.inference_mode(False), torch.enable_grad():
            self._leaf = torch.empty(0, device=device, requires_grad=True)
            self._node = self._leaf.view(0)

    def backward(self) -> None:
        torch.autograd.grad(self._node, self._leaf, torch.empty_like(self._leaf), retain_graph=True)


class Before:
    """The state that a forward and backward change: gradients of what is trained, buffers, random numbers."""

    def __init__(self, model: nn.Module, room: Room) -> None:
        managed = {id(weight.tensor) for weight in frozen_weights("", model, deep=True)}
        trained = [p for p in model.parameters() if p.requires_grad]
        buffers = [
            (module, name, buffer)
            for module in model.modules()
            for name, buffer in module._buffers.items()
            if buffer is not None and id(buffer) not in managed
        ]
        held = [*(p.grad for p in trained if p.grad is not None), *(buffer for _, _, buffer in buffers)]
        room.empty_for(sum(map(room_bytes, held)))

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            return room.copy(tensor) if room_bytes(tensor) else tensor.detach().clone()

        self._gradients = [(p, None if p.grad is None else copy(p.grad)) for p in trained]
        self._buffers = [(module, name, buffer, copy(buffer)) for module, name, buffer in buffers]
        self._random = RandomStates()
        self._oldest = [_Oldest(device) for device in {p.device for p in trained} if is_apart(device)]

    def note_buffers(self) -> None:
        """Have the buffers of now be those that were before."""
        with torch.no_grad():
            for _, _, buffer, value in self._buffers:
                value.copy_(buffer)

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
        for oldest in self._oldest:
            oldest.backward()
