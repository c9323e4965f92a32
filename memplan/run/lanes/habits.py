"""What a pass does that would be another where micro-batches take turns: looked at while one runs by itself.

[Note: what is in the way] What one micro-batch leaves for the next is there too early, or too late: random numbers that
were drawn; attributes, buffers and settings of torch's that a pass changes, or changes and puts back (adapters that are
off for a reference pass); what hooks of the script keep; casts of a weight that autocast makes once for several uses,
until any thread leaves it; an optimizer that steps within backward. A pass of which that is not known goes by itself,
and is looked at; so does the next one where something was in the way, since first passes do what others do not.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import nn

from memplan.errors import RunError
from memplan.hooks.compiled import is_compiled, untraced_deep
from memplan.hooks.triggers import Triggers
from memplan.run.lanes.device_numbers import DeviceNumbers, shapes_of
from memplan.run.lanes.hooked import HookState, count_hooks, hooks_of
from memplan.run.lanes.inherited import casting
from memplan.run.transfer.device import is_apart
from memplan.state.process_state import positions, settings
from memplan.state.setting import Held

TRIES = 3
"""Passes that are looked at until one is found with nothing in the way."""
MOST_CHANGES = 16
"""Times that modules' settings may change before what is in the way is taken for good."""

_PLAIN = (bool, int, float, str, type(None))


class Habits:
    """What is known of one model's passes."""

    def __init__(self, model: nn.Module, triggers: Triggers, device: torch.device, *, has_experts: bool) -> None:
        """``has_experts``: what is computed hangs on more than shapes."""
        self._model = model
        self._triggers = triggers
        self.numbers = DeviceNumbers(device) if is_apart(device) else None
        self._has_experts = has_experts
        self._kinds = casting(device)
        self._modules = tuple(model.modules())
        self._is_whole = is_compiled(model)
        self._known: str | None = None
        """What is in the way, or nothing, as long as modules have the same flags."""
        self._flags: Flags | None = None
        self._tries = self._changes = 0
        self._advances: dict[Hashable, int] = {}
        """By the shapes of a micro-batch, how far the device's generator goes on in its pass."""

    def in_the_way(self) -> str | None:
        """Return what is in the way of taking turns now, or nothing; None where a pass is to be looked at."""
        is_changed = self._flags is not None and self._flags.is_changed()
        if is_changed and (not self._known or self._changes < MOST_CHANGES):
            self._known, self._tries, self._changes = None, 0, self._changes + 1
            self._advances.clear()
        if self._is_whole:
            return "the model is compiled as a whole"
        if not torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            return "gradients are off"
        if torch._C._current_graph_task_id() != -1:
            return "it is called within a backward"
        if torch._C._functorch.peek_interpreter_stack() is not None:
            return "it is called within a transform of torch.func"
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            return "torch.distributed is in use, whose DDP sums gradients in each backward"
        if any(p._post_accumulate_grad_hooks for p in self._model.parameters() if p.requires_grad):
            return "a hook takes each gradient as soon as it is there (an optimizer within backward)"
        return self._known

    def look(self, run: Callable[[Any], Any], batch: Any) -> Any:
        """Return ``run(batch)``, looked at."""
        numbers, shapes = self.numbers, shapes_of(batch)
        begin = (0, 0) if numbers is None else numbers.at()
        trained = [p for p in self._model.parameters() if p.requires_grad]
        seen = _Pass(self._modules, self._drawn, numbers, trained, self._triggers, self._kinds)
        self._triggers.turns = seen
        try:
            result = run(batch)
        finally:
            self._triggers.turns = None
            seen.end()
        found = seen.in_the_way()
        if numbers is not None:
            end = numbers.at()
            self._advances[shapes] = end[1] - begin[1]
            if begin != end and (begin[0] != end[0] or end < begin or shapes is None or self._has_experts):
                found = found or "a micro-batch draws random numbers, and how many is not known of the next one"
        self._tries += 1
        if not found or self._tries >= TRIES:
            self._known, self._flags = found, Flags(self._modules)
        return result

    def advances(self, batches: Sequence[Any]) -> list[int]:
        """Return how far the device's generator goes on in each pass; of as many of the first as it is known of."""
        if not any(self._advances.values()):
            return [0] * len(batches)
        known = takewhile(lambda shapes: shapes in self._advances, map(shapes_of, batches))
        return [self._advances[shapes] for shapes in known]

    def is_changed(self) -> bool:
        """Whether modules have other settings than when their passes were looked at."""
        return self._flags is not None and self._flags.is_changed()

    def watch(self) -> Callable[..., None]:
        """Return what raises RunError where a group that is over did what no pass before it did. ``is_astray``: a
        lane's random numbers did not end where the next one's began.
        """
        drawn, buffers = self._drawn(), _versions(self._modules)

        def refuse(*, is_astray: bool) -> None:
            what = "random numbers were drawn" if self._drawn() != drawn else ""
            if _versions(self._modules) != buffers:
                what = "a buffer was written to"
            if is_astray:
                what = "more or fewer random numbers were drawn"
            if what:
                self._known, self._flags = f"in an earlier group {what}", Flags(self._modules)
                raise RunError(
                    f"{what} in micro-batches that took turns, which was not so in the one before them, so results "
                    "are not those of one by one: do not step the optimizer, zero the gradients and go on. From now on "
                    "they run one by one"
                )

        return refuse

    def _drawn(self) -> tuple[object, ...]:
        """Return what is another once the host's random numbers were drawn."""
        return (torch.get_rng_state().numpy().tobytes(), *positions())


class Flags:
    """What modules have of plain values: whether they train, which adapter is active, and the like; how many hooks the
    script has on them; and settings of torch's.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self._places = [
            (module.__dict__, name, value)
            for module in modules
            for name, value in module.__dict__.items()
            if type(value) in _PLAIN
        ]
        self._lists = [
            (module.__dict__, name, value.copy())
            for module in modules
            for name, value in module.__dict__.items()
            if type(value) is list and all(type(part) in _PLAIN for part in value)
        ]
        self._modules = modules
        self._settings, self._hooks = settings(), count_hooks(modules)

    def is_changed(self) -> bool:
        """Whether any is another now."""
        return (
            any((now := held.get(name)) is not value and now != value for held, name, value in self._places)
            or any(held.get(name) != value for held, name, value in self._lists)
            or settings() != self._settings
            or count_hooks(self._modules) != self._hooks
        )


class _Pass:
    """One pass, by itself."""

    def __init__(
        self,
        modules: Sequence[nn.Module],
        drawn: Callable[[], tuple[object, ...]],
        numbers: DeviceNumbers | None,
        trained: Sequence[nn.Parameter],
        triggers: Triggers,
        kinds: Sequence[str],
    ) -> None:
        """``kinds``: of devices that autocast may be on for."""
        self._kinds = kinds
        self._ignored = triggers.own_hooks()
        self._modules = modules
        self._drawn_now = drawn
        self._held = Held(modules)
        self._state = self._held.state()
        self._hooked = HookState(hooks_of(modules, trained))
        self._settings = settings()
        self._buffers = _versions(modules)
        self._drawn = drawn()
        self._numbers = numbers
        self._at = (0, 0) if numbers is None else numbers.at()
        self._is_changed = False
        self._given = [0] * len(trained)
        self._hooks = [p.register_hook(self._counts(place)) for place, p in enumerate(trained)]
        self._way = ""
        self._casting: set[int] = set()
        """Trained parameters that were there to be cast by autocast, by their ids."""
        self._own = _to_cast(triggers.modules)

    def before_forward(self, module: str, *, in_backward: bool) -> None:
        if in_backward:
            return
        if not self._is_changed:
            self._look()
        if not self._way:
            self._look_at_process()
        if torch.is_autocast_cache_enabled() and any(map(torch.is_autocast_enabled, self._kinds)):
            own = self._own[module]
            if own & self._casting:
                self._way = "autocast has casts of a weight that several layers, or passes, of a micro-batch share"
            self._casting |= own

    def before_backward(self, module: str, call: int) -> None:
        pass

    @untraced_deep
    def _look(self) -> None:
        self._is_changed = self._held.is_changed() or self._state.is_changed(self._ignored)

    @untraced_deep
    def _look_at_process(self) -> None:
        before, self._at = self._at, (0, 0) if self._numbers is None else self._numbers.at()
        if self._drawn_now() != self._drawn:
            self._way = "a micro-batch draws random numbers (dropout)"
        elif self._at[0] != before[0] or self._at < before:
            self._way = "a micro-batch seeds a device's random numbers"
        elif settings() != self._settings:
            self._way = "a micro-batch changes settings of torch's"
        elif self._hooked.is_changed():
            self._way = "a hook keeps what it sees of a micro-batch"

    def _counts(self, place: int) -> Callable[[torch.Tensor], None]:
        def count(gradient: torch.Tensor) -> None:
            self._given[place] += 1

        return count

    def end(self) -> None:
        """Look at what has come of it."""
        for hook in self._hooks:
            hook.remove()
        self._look_last()

    def _look_last(self) -> None:
        if not self._way:
            self._look_at_process()
        if self._way:
            return
        if _versions(self._modules) != self._buffers:
            self._way = "a micro-batch writes to buffers"
        elif any(times > 1 for times in self._given):
            self._way = "a micro-batch gives parameters more than one gradient each"
        else:
            if not self._is_changed:
                self._look()
            if self._is_changed:
                self._way = "a micro-batch changes attributes of modules, or puts them back as it goes"

    def in_the_way(self) -> str:
        """Return what is in the way of taking turns, or nothing."""
        return self._way


def _versions(modules: Sequence[nn.Module]) -> list[tuple[int, int]]:
    """Return what is another once a buffer was written to, or another took its place."""
    return [
        (id(buffer), 0 if buffer.is_inference() else buffer._version)
        for module in modules
        for buffer in module._buffers.values()
        if buffer is not None
    ]


def _to_cast(modules: Mapping[str, nn.Module]) -> dict[str, set[int]]:
    """Return, by trigger, the ids of its parameters that autocast keeps casts of, and that no trigger within it has."""
    triggers = set(modules.values())
    found = {}
    for name, module in modules.items():
        others = [part for part in module.modules() if part in triggers and part is not module]
        inner = {id(p) for part in others for p in part.parameters()}
        mine = (p for p in module.parameters() if p.requires_grad and p.dtype == torch.float32)
        found[name] = {id(p) for p in mine if id(p) not in inner}
    return found
