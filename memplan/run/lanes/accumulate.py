"""Running the micro-batches of an optimizer step in groups that share each load, or one by one where that must be."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import accumulate, islice
from typing import Any

import torch
from torch import nn

from memplan.cost.group import size_beside_gradients
from memplan.hooks.triggers import Triggers
from memplan.program.schema import Plan
from memplan.run.lanes.gradient_order import GradientOrder
from memplan.run.lanes.habits import Habits
from memplan.run.lanes.inherited import Inherited
from memplan.run.lanes.turns import Exchanged, Group
from memplan.run.schedule.conductor import Conductor

_LOG = logging.getLogger("memplan")


class Accumulation:
    """The groups of one model under one plan."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        modules: Mapping[str, nn.Module],
        triggers: Triggers,
        conductor: Conductor,
        device: torch.device,
        spans: Exchanged | None,
    ) -> None:
        """``modules``: the plan's trigger modules by name. ``spans``: who notes them, in traced mode alone."""
        self._model = model
        self._size = plan.group
        comes_and_goes = any(segment.absent for arena in plan.arenas for segment in arena.segments)
        self._beside_gradients = (
            size_beside_gradients(plan.table, plan.policies(), at_each=comes_and_goes) if plan.group > 1 else 1
        )
        self._triggers = triggers
        self._conductor = conductor
        self._device = device
        self._spans = spans
        has_experts = any(block.kind == "expert" for block in plan.table.blocks)
        self._habits = Habits(model, triggers, device, has_experts=has_experts)
        self._within = _within_recomputed(plan, modules)
        self._owners = _owners(modules)
        self._is_running = threading.Lock()
        self._said: set[str] = set()

    @property
    def takes_turns(self) -> bool:
        """Whether a group is under way."""
        return self._conductor.gave is not None

    def run(self, run: Callable[[Any], Any], batches: Iterable[Any]) -> list[Any]:
        """Return ``run(batch)`` of each, in order."""
        if not self._is_running.acquire(blocking=False):
            return self._one_by_one(run, batches, "it is called within itself")
        try:
            return list(self._results(run, iter(batches)))
        finally:
            self._is_running.release()

    def _results(self, run: Callable[[Any], Any], given: Iterator[Any]) -> Iterator[Any]:
        ahead: list[Any] = []
        """Micro-batches that were taken and have not run."""
        is_first = True
        while True:
            in_the_way = self._habits.in_the_way()
            # What makes them may draw the random numbers that a run draws: one at a time, unless they take turns.
            size = self._largest(is_first=is_first) if in_the_way == "" else 1
            is_first = False
            ahead += islice(given, max(size - len(ahead), 0))
            if not ahead:
                return
            count = 1
            if in_the_way:
                yield from self._one_by_one(run, ahead[:1], in_the_way)
            elif in_the_way is None or not (advances := self._habits.advances(ahead[:size])):
                yield self._habits.look(run, ahead[0])
            elif len(advances) == 1:
                yield run(ahead[0])
            else:
                count = len(advances)
                yield from self._in_turns(run, ahead[:count], advances)
            del ahead[:count]

    def _largest(self, *, is_first: bool) -> int:
        """Return how many may take turns now: fewer where the plan counts on gradients that are yet to be made."""
        size = self._beside_gradients
        if size == self._size or all(p.grad is None for p in self._model.parameters() if p.requires_grad):
            return self._size
        if is_first:
            self._say(
                f"groups have {size} micro-batches in place of {self._size}: gradients are there before the first one, "
                "and the plan has no room for them; let zero_grad() set them to None, and give accumulate() all "
                "micro-batches of a step at once"
            )
        return size

    def _say(self, what: str) -> None:
        if what not in self._said:
            self._said.add(what)
            _LOG.warning("%s", what)

    def _one_by_one(self, run: Callable[[Any], Any], batches: Iterable[Any], in_the_way: str) -> list[Any]:
        self._say(f"micro-batches run one by one, each with loads of its own: {in_the_way}")
        return [run(batch) for batch in batches]

    def _in_turns(self, run: Callable[[Any], Any], batches: list[Any], advances: list[int]) -> list[Any]:
        exchanged: list[tuple[Exchanged, list[Any]]] = []
        if self._spans is not None:
            exchanged.append((self._spans, [self._spans.lane(), *[None] * (len(batches) - 1)]))
        numbers = self._habits.numbers if any(advances) else None
        offsets: list[int] = []
        if numbers is not None:
            offsets = list(accumulate(advances, initial=numbers.lane()))
            exchanged.append((numbers, offsets[:-1]))
        refuse = self._habits.watch()
        trained = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        order = GradientOrder(trained, self._owners)
        try:
            group = Group(
                run,
                batches,
                self._triggers,
                self._conductor,
                self._within,
                exchanged,
                Inherited(self._device),
                self._habits.is_changed,
            )
            order.group, order.serve_again = group, self._conductor.serve_again
            self._conductor.gave = order.gave
            results = group.run()
        finally:
            self._conductor.gave = None
            order.remove()
        if numbers is not None:
            numbers.be_lane(offsets[-1])
        refuse(is_astray=numbers is not None and [lane.own[2][-1] for lane in group.lanes] != offsets[1:])
        return results


def _within_recomputed(plan: Plan, modules: Mapping[str, nn.Module]) -> frozenset[str]:
    """Return the triggers that others call, whose forwards memplan runs again."""
    again = plan.recomputed()
    inner = {part for name in again if name in modules for part in modules[name].modules() if part is not modules[name]}
    return frozenset(name for name, module in modules.items() if module in inner)


def _owners(modules: Mapping[str, nn.Module]) -> dict[int, str]:
    """Return, by the ids of parameters, the trigger module that each is in; the innermost, and of one alone."""
    found: dict[int, str] = {}
    shared: set[int] = set()
    # Those of longer names lie deeper.
    for name, module in sorted(modules.items(), key=lambda item: -len(item[0].split("."))):
        for parameter in module.parameters():
            other = found.setdefault(id(parameter), name)
            if other != name and module not in _parents(modules, other):
                shared.add(id(parameter))
    return {key: name for key, name in found.items() if key not in shared}


def _parents(modules: Mapping[str, nn.Module], name: str) -> list[nn.Module]:
    """Return the trigger modules that a trigger module lies in."""
    return [other for other in modules.values() if any(part is modules[name] for part in other.modules())]
