"""The optimizer's state where a plan has it wait in RAM: brought for each of the optimizer's steps, sent back behind
it.

[Note: whose optimizer] Nobody hands it over: torch tells of every optimizer's step, and one that steps a parameter of
the model is the model's. So it may be built before the model is attached, or after.

[Note: a step that runs the pass] With a closure (Lightning's steps have one) forward and backward run inside the step.
The state comes when the closure has returned.

[Note: sent beside the next forward] Where the plan has room for the state in the accesses that its copy may last, the
copy goes on a stream of its own, and the state's memory is the compute stream's again once it is done. Else the compute
waits for it, as it does for the state to come: its memory is taken in the compute's order, behind the whole backward.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import _disable_current_modes

from memplan.model.weights import plain_parts
from memplan.program.memory_timeline import timeline
from memplan.program.schema import Plan
from memplan.run.memory.arena import Arena, has_no_gaps
from memplan.run.transfer.device import current_stream, is_apart
from memplan.run.transfer.interrupts import defer_sigint
from memplan.units import align_up

_ALIGNMENT_BYTES = 16
"""Enough for a kernel's widest read. More would be bytes that no plan counts: there are hundreds of small tensors."""


@dataclass(frozen=True, slots=True, eq=False)
class _Place:
    """Where one tensor of the state lies in its room."""

    tensor: torch.Tensor
    offset_bytes: int
    size_bytes: int

    def bind(self, room: torch.Tensor) -> None:
        """Have the tensor lie in ``room``, of whatever device, as it lies in its memory now."""
        raw = room[self.offset_bytes : self.offset_bytes + self.size_bytes].view(self.tensor.dtype)
        self.tensor.data = raw.as_strided(self.tensor.size(), self.tensor.stride())


class _State:
    """The state of one optimizer."""

    def __init__(self, optimizer: Optimizer, device: torch.device, aside: torch.Stream | None) -> None:
        """``aside``: what it is sent on; None for the compute stream."""
        self._optimizer = weakref.ref(optimizer)
        self._device = device
        self._aside = aside
        self._places: tuple[_Place, ...] = ()
        self.room: torch.Tensor | None = None
        """On the host; None before there is a state."""
        self._there: torch.Tensor | None = None
        """The same bytes on the device, for a step."""
        self._sent: torch.Event | None = None

    def bring(self) -> None:
        """Have the state on the device. Raises torch's error where there is no room for it."""
        if self.room is None or self._there is not None:
            return
        # A load of a state from a file may have put others in their place.
        held = {id(tensor) for tensor in self._tensors()}
        places = [place for place in self._places if id(place.tensor) in held]
        if not places:
            return
        if self._sent is not None:
            current_stream(self._device).wait_event(self._sent)
        with defer_sigint():
            there = torch.empty_like(self.room, device=self._device)
            there.copy_(self.room, non_blocking=True)
            for place in places:
                place.bind(there)
            self._there = there

    def send(self, new_room: Callable[[int], torch.Tensor]) -> None:
        """Have the state in RAM."""
        with defer_sigint():
            self._send(self._tensors(), new_room)

    def _send(self, tensors: list[torch.Tensor], new_room: Callable[[int], torch.Tensor]) -> None:
        if self.room is None or [id(place.tensor) for place in self._places] != [id(tensor) for tensor in tensors]:
            self._lay_out(tensors, new_room)
        elif self._there is not None:
            self._copy_back(self.room, self._there)
            for place in self._places:
                place.bind(self.room)
        self._there = None

    def _copy_back(self, room: torch.Tensor, there: torch.Tensor) -> None:
        if not is_apart(self._device):
            room.copy_(there)
            return
        stream = compute = current_stream(self._device)
        if self._aside is not None and room.is_pinned():
            stream = self._aside
            stream.wait_stream(compute)
            there.record_stream(stream)
        with stream:
            room.copy_(there, non_blocking=True)
        self._sent = stream.record_event()  # who reads the state in RAM waits for it

    def wait(self) -> None:
        """Return once the state in RAM is whole."""
        if self._sent is not None:
            self._sent.synchronize()
            self._sent = None

    def _lay_out(self, tensors: list[torch.Tensor], new_room: Callable[[int], torch.Tensor]) -> None:
        """Move the state to a new room, one tensor after another."""
        self.wait()
        known = {id(tensor) for tensor in tensors}
        if not any(id(place.tensor) in known for place in self._places):
            self._places, self.room = (), None  # before another is there
        places, top = [], 0
        for tensor in tensors:
            places.append(_Place(tensor, top, tensor.numel() * tensor.element_size()))
            top = align_up(top + places[-1].size_bytes, _ALIGNMENT_BYTES)
        room = new_room(top)
        for place in places:
            before = place.tensor.data
            place.bind(room)
            place.tensor.data.copy_(before)
        self._places, self.room = tuple(places), room

    def _tensors(self) -> list[torch.Tensor]:
        """Return what moves, in the optimizer's own order. Numbers of steps stay where they are, as does what has gaps,
        or is the same memory as another tensor.
        """
        optimizer = self._optimizer()
        parts: dict[int, torch.Tensor] = {}
        for held in _tensors_in(list(optimizer.state.values()) if optimizer is not None else []):
            for part in plain_parts(held):
                # bitsandbytes' pages go where there is room by themselves.
                if (
                    part.numel() > 1
                    and not getattr(part, "is_paged", False)
                    and part.device.type in (self._device.type, "cpu")
                ):
                    parts.setdefault(id(part), part)
        once = Counter(part.data_ptr() for part in parts.values())
        return [part for part in parts.values() if once[part.data_ptr()] == 1 and has_no_gaps(part)]


class OptimizerState:
    """Keeps the state of a model's optimizers in RAM between their steps, until ``close``."""

    def __init__(
        self, model: nn.Module, device: torch.device, *, is_pageable: bool = False, is_sent_aside: bool = False
    ) -> None:
        """``is_pageable``: whether it may not be page-locked for a device. ``is_sent_aside``: whether it may be on the
        device still while the next forward begins.
        """
        self._device = device
        self._aside = torch.Stream(device) if is_sent_aside and is_apart(device) else None
        self._is_pageable = is_pageable
        self._parameters = {id(parameter) for parameter in model.parameters()}
        self._states: weakref.WeakKeyDictionary[Optimizer, _State] = weakref.WeakKeyDictionary()
        self.watch: Callable[[torch.Tensor], None] | None = None
        """Told each room before anything lies in it."""
        self._undo = ExitStack()
        dropped = weakref.finalize(model, self._undo.close)  # who drops a model does not always detach it
        self._undo.callback(dropped.detach)
        self._undo.callback(register_optimizer_step_pre_hook(self._steps).remove)
        self._undo.callback(register_optimizer_step_post_hook(self._stepped).remove)

    def rooms(self) -> Iterator[torch.Tensor]:
        """Yield what lies in RAM."""
        yield from (state.room for state in self._states.values() if state.room is not None)

    def adopt(self, optimizer: Optimizer) -> None:
        """Send the state of an optimizer of the model to RAM, where it has one already; nothing for one that is
        known.
        """
        if optimizer not in self._states and self._state_of(optimizer) is not None:
            self._send(optimizer)

    def _send(self, optimizer: Optimizer) -> None:
        state = self._states.get(optimizer)
        if state is not None:
            state.send(self._new_room)

    def close(self) -> None:
        """Give every optimizer its state back on the device."""
        self._undo.close()
        with ExitStack() as brought:
            brought.callback(self._states.clear)
            for state in self._states.values():
                brought.callback(state.bring)

    def _wait(self, optimizer: Optimizer) -> None:
        self._states[optimizer].wait()

    def _state_of(self, optimizer: Optimizer) -> _State | None:
        found = self._states.get(optimizer)
        if found is None and any(
            id(p) in self._parameters for group in optimizer.param_groups for p in group["params"]
        ):
            found = self._states[optimizer] = _State(optimizer, self._device, self._aside)
            for hook in (
                optimizer.register_state_dict_pre_hook(self._wait),
                optimizer.register_load_state_dict_post_hook(self._send),
            ):
                self._undo.callback(hook.remove)
        return found

    def _steps(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Bring the state for a step, behind the pass where that is run by it."""
        state = self._state_of(optimizer)
        if state is None:
            return None
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            state.bring()
            return None

        def passed() -> Any:
            result = closure()
            state.bring()
            return result

        if kwargs.get("closure"):
            return args, {**kwargs, "closure": passed}
        return (args[0], passed, *args[2:]), kwargs

    def _stepped(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._send(optimizer)

    def _new_room(self, size_bytes: int) -> torch.Tensor:
        with _disable_current_modes():  # whoever counts what operators return is told instead
            pinned = is_apart(self._device) and not self._is_pageable
            room = Arena(size_bytes, torch.device("cpu"), pinned=pinned).bytes
        if self.watch is not None:
            self.watch(room)
        return room


def _tensors_in(held: object) -> Iterator[torch.Tensor]:
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for value in held.values():
            yield from _tensors_in(value)
    elif isinstance(held, (list, tuple)):
        for value in held:
            yield from _tensors_in(value)


def has_room_aside(plan: Plan) -> bool:
    """Whether a plan has room for the optimizer's state in the accesses that run while it is sent to RAM: those of
    twice the time that the link takes for it.
    """
    state_bytes = plan.table.state_on_host_bytes
    left_s = 2 * state_bytes / plan.table.device_to_host_bytes_per_s
    for moment, row in zip(timeline(plan), plan.table.accesses, strict=True):
        if moment.vram_bytes + state_bytes > plan.budgets.vram_bytes:
            return False
        left_s -= row.time_s
        if left_s <= 0:
            break
    return True
