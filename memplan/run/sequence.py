"""Where in the cycle a run is, and which loads are due. Numbers only: no tensors, no threads.

Positions are *linear*: access ``k`` of the ``c``-th cycle is ``c * A + k``, so that nothing wraps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from memplan.analyze.graph import AccessKind
from memplan.program.schema import Channel, Plan


class Step(NamedTuple):
    """One access of the cycle."""

    kind: AccessKind
    module: str
    forward: int
    """Index of the forward access that it belongs to; -1 for loss and optimizer."""
    blocks: tuple[int, ...]
    """What it reads that is streamed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """One load of the cycle."""

    key: int
    """Of what is loaded: a block's id, or what offloaded activations are called."""
    channel: Channel
    load_after: int
    first_use: int
    last_use: int


Loads = Mapping[Channel, tuple[Due, ...]]
"""By channel, in their order."""


def offload_key(plan: Plan, item: int) -> int:
    """Return what an offloaded item is called where blocks are called by their ids; the next number is its way back's."""
    return len(plan.table.blocks) + 2 * item


class Sequence:
    """The accesses of a cycle by module, and its loads by channel."""

    def __init__(self, steps: tuple[Step, ...], loads: Loads, passes: int = 1) -> None:
        """``passes``: how many outermost backwards the cycle has."""
        self.steps = steps
        self.length = len(steps)
        self.loads = loads
        self.passes = passes
        self.forwards: dict[str, tuple[int, ...]] = {}
        self.backwards: dict[str, tuple[int, ...]] = {}
        self.backward_of: dict[int, int] = {}
        for index, step in enumerate(steps):
            if step.kind == "forward":
                self.forwards[step.module] = (*self.forwards.get(step.module, ()), index)
            elif step.kind == "backward":
                self.backwards[step.module] = (*self.backwards.get(step.module, ()), index)
                self.backward_of[step.forward] = index
        self.last_backward = max(self.backward_of.values(), default=-1)

    def next_forward(self, module: str, now: int) -> int | None:
        """Return the linear position of the module's next forward access after ``now``; None where it has none."""
        cycle, index = divmod(now, self.length)
        indices = self.forwards.get(module)
        if indices is None:
            return None
        for candidate in indices:
            if candidate > index:
                return cycle * self.length + candidate
        return (cycle + 1) * self.length + indices[0]

    def next_backward(self, module: str, now: int) -> int | None:
        """Return the linear position of the module's next backward access in this cycle, now's included, or None."""
        cycle, index = divmod(now, self.length)
        for candidate in self.backwards.get(module, ()):
            if candidate >= index:
                return cycle * self.length + candidate
        return None

    def backward_at(self, module: str, call: int) -> int | None:
        """Return the linear position of the backward of a forward of the module at ``call``, or None."""
        cycle, index = divmod(call, self.length)
        backward = self.backward_of.get(index)
        if call < 0 or backward is None or self.steps[backward].module != module:
            return None
        return cycle * self.length + backward

    def skipped_reads(self, now: int, position: int) -> bool:
        """Whether accesses that read weights lie strictly between the two."""
        if position - now > self.length:
            return True
        return any(self.steps[linear % self.length].blocks for linear in range(now + 1, position))


def planned(plan: Plan, reads: Mapping[int, tuple[int, ...]]) -> Sequence:
    """Return the plan's own sequence. ``reads``: what each access reads that is streamed."""
    steps = tuple(Step(a.kind, a.module, a.forward, reads[a.index]) for a in plan.table.accesses)
    device = {arena.id for arena in plan.arenas if arena.tier == "device"}
    found: dict[Channel, list[tuple[int, Due]]] = {}
    for stay in plan.residences:
        if stay.begins == "load" and stay.arena in device and stay.channel is not None:
            item = plan.items[stay.item]
            due = Due(
                key=item.block if item.kind == "weights" else offload_key(plan, item.id),
                channel=stay.channel,
                load_after=stay.load_after,
                first_use=stay.first_use,
                last_use=stay.last_use,
            )
            found.setdefault(stay.channel, []).append((stay.order, due))
    loads = {channel: tuple(due for _, due in sorted(rows, key=lambda row: row[0])) for channel, rows in found.items()}
    return Sequence(steps, loads)
