"""Where in the cycle a run is, and which loads are due. Numbers only: no tensors, no threads.

Positions are *linear*: access ``k`` of the ``c``-th cycle is ``c * A + k``, so that nothing wraps.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
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
    """What it reads on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedLoad:
    """One load of the cycle."""

    key: int
    """Of what is loaded: a block's id, or what offloaded activations are called."""
    channel: Channel
    load_after: int
    first_use: int
    last_use: int
    uses: tuple[int, ...]
    """Accesses that read it meanwhile, from ``first_use`` to ``last_use``; none for offloaded activations."""


Loads = Mapping[Channel, tuple[PlannedLoad, ...]]
"""By channel, in their order."""


def offload_key(plan: Plan, item: int) -> int:
    """Return what an offloaded item is called where blocks are called by their ids; the next number is its way
    back's.
    """
    return len(plan.table.blocks) + 2 * item


class Sequence:
    """The accesses of a cycle by module, and its loads by channel."""

    def __init__(
        self,
        steps: tuple[Step, ...],
        loads: Loads,
        experts: frozenset[int],
        absent: Mapping[int, frozenset[int]],
        passes: int = 1,
    ) -> None:
        """``experts``: blocks that are only read where they are chosen. ``absent``: by segment of the device arena that
        is not always there, the steps without it. ``passes``: its number of outermost backwards.
        """
        self.steps = steps
        self.length = len(steps)
        self.loads = loads
        self.experts = experts
        self.absent = absent
        self.passes = passes
        self.forwards: dict[str, tuple[int, ...]] = {}
        self.backwards: dict[str, tuple[int, ...]] = {}
        self._backwards_of: dict[int, tuple[int, ...]] = {}
        """Backward accesses of each forward: two where it runs again among others before its backward."""
        for index, step in enumerate(steps):
            if step.kind == "forward":
                self.forwards[step.module] = (*self.forwards.get(step.module, ()), index)
            elif step.kind == "backward":
                self.backwards[step.module] = (*self.backwards.get(step.module, ()), index)
                self._backwards_of[step.forward] = (*self._backwards_of.get(step.forward, ()), index)
        self.last_backward = max((i for indices in self.backwards.values() for i in indices), default=-1)
        self.turn_around = self._turn_around()
        """The backward that a micro-batch of a group goes on to from its last forward before others take their turn:
        so logits and losses are those of one at a time. -1 where there is none.
        """

    def _turn_around(self) -> int:
        first = min((i for indices in self.backwards.values() for i in indices), default=-1)
        before = [i for i in range(first) if self.steps[i].kind == "forward"]
        return first if before and self.steps[first].forward == before[-1] else -1

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

    def passed_expert(self, module: str, now: int) -> int | None:
        """Return the linear position of the module's forward that the experts just called stand in place of, or None.

        A router may call its experts in any order, and one more than once: as long as nothing but experts has come
        since where the plan has this one, it is a call of this pass.
        """
        cycle, index = divmod(now, self.length)
        for candidate in self.forwards.get(module, ()) if self.experts else ():
            since = range(candidate, index + 1)
            if since and all(self.steps[i].kind == "forward" and self._is_left(i) for i in since):
                return cycle * self.length + candidate
        return None

    def next_backward(self, module: str, now: int) -> int | None:
        """Return the linear position of the module's next backward access in this cycle, now's included, or None."""
        cycle, index = divmod(now, self.length)
        for candidate in self.backwards.get(module, ()):
            if candidate >= index:
                return cycle * self.length + candidate
        return None

    def backward_at(self, module: str, call: int, now: int) -> int | None:
        """Return the linear position of the next backward access of the module's forward at ``call``, now's included,
        or None.
        """
        if call < 0:
            return None
        cycle, index = divmod(call, self.length)
        for candidate in self._backwards_of.get(index, ()):
            position = cycle * self.length + candidate
            if position >= now and self.steps[candidate].module == module:
                return position
        return None

    def skipped_reads(self, now: int, position: int) -> bool:
        """Whether accesses that read weights lie strictly between the two. Experts may be passed over: so they are
        meant.
        """
        if position <= now + 1:
            return False
        if position - now > self.length:
            return True
        return not all(self._is_left(linear % self.length) for linear in range(now + 1, position))

    def is_over(self, now: int) -> bool:
        """Whether no backward is to come in this cycle, unless of experts that nobody called."""
        end = now // self.length * self.length + self.last_backward
        return now >= end or not self.skipped_reads(now, end + 1)

    def lacks(self, segment: int, now: int, done: int) -> bool:
        """Whether a segment is absent in the access ``now``, or in one that may be under way behind it since it is
        over: no trigger tells of the loss and the optimizer. ``done``: accesses below it are over.
        """
        if now < 0:  # a sequence begins anew behind a pass: the optimizer step may be under way
            return self.length - 1 in self.absent[segment]
        end = max(done, now + 1)
        while done > now and self.steps[end % self.length].kind in ("loss", "optimizer") and end % self.length:
            end += 1
        return any(linear % self.length in self.absent[segment] for linear in range(now, end))

    def _is_left(self, index: int) -> bool:
        """Whether an access may be left out without a word: it reads no weights, or an expert's alone."""
        return self.experts.issuperset(self.steps[index].blocks)


def planned(
    plan: Plan, reads: Mapping[int, tuple[int, ...]], absent: Mapping[int, frozenset[int]] = MappingProxyType({})
) -> Sequence:
    """Return the plan's own sequence. ``reads``: the blocks that each access reads on the device. ``absent``: as for
    :class:`Sequence`.
    """
    steps = tuple(Step(a.kind, a.module, a.forward, reads[a.index]) for a in plan.table.accesses)
    device = {arena.id for arena in plan.arenas if arena.tier == "device"}
    found: dict[Channel, list[tuple[int, PlannedLoad]]] = {}
    for stay in plan.residences:
        if stay.begins == "load" and stay.arena in device and stay.channel is not None:
            item = plan.items[stay.item]
            stays = range(stay.first_use, stay.last_use + 1) if item.kind == "weights" else ()
            due = PlannedLoad(
                key=item.block if item.kind == "weights" else offload_key(plan, item.id),
                channel=stay.channel,
                load_after=stay.load_after,
                first_use=stay.first_use,
                last_use=stay.last_use,
                uses=tuple(use for use in stays if item.block in steps[use % len(steps)].blocks),
            )
            found.setdefault(stay.channel, []).append((stay.order, due))
    loads = {channel: tuple(due for _, due in sorted(rows, key=lambda row: row[0])) for channel, rows in found.items()}
    experts = frozenset(block.id for block in plan.table.blocks if block.kind == "expert")
    return Sequence(steps, loads, experts, absent)
