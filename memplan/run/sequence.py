"""Where in the plan's cycle a run is, and which loads are due. Numbers only: no tensors, no threads.

Positions are *linear*: access ``k`` of the ``c``-th cycle is ``c * A + k``, so that nothing wraps.
"""

from __future__ import annotations

from dataclasses import dataclass

from memplan.cost.table import AccessRow
from memplan.program.schema import Channel, Plan


@dataclass(frozen=True, slots=True, kw_only=True)
class Due:
    """One load of the cycle, as the plan has it."""

    key: int
    """Of what is loaded: a block's id, or what offloaded activations are called."""
    channel: Channel
    load_after: int
    first_use: int
    last_use: int
    uses: tuple[int, ...]
    """Accesses that read it meanwhile, from ``first_use`` to ``last_use``; none for offloaded activations."""


def offload_key(plan: Plan, item: int) -> int:
    """Return what an offloaded item is called where blocks are called by their ids; the next number is its way back's."""
    return len(plan.table.blocks) + 2 * item


class Sequence:
    """The plan's accesses by module, and its loads by channel."""

    def __init__(self, plan: Plan) -> None:
        self.accesses: tuple[AccessRow, ...] = plan.table.accesses
        self.length = len(self.accesses)
        self.forwards: dict[str, tuple[int, ...]] = {}
        self.backwards: dict[str, tuple[int, ...]] = {}
        self._backwards_of: dict[int, tuple[int, ...]] = {}
        """Backward accesses of each forward: two where it runs again among others before its backward."""
        for access in self.accesses:
            if access.kind == "forward":
                self.forwards[access.module] = (*self.forwards.get(access.module, ()), access.index)
            elif access.kind == "backward":
                self.backwards[access.module] = (*self.backwards.get(access.module, ()), access.index)
                self._backwards_of[access.forward] = (*self._backwards_of.get(access.forward, ()), access.index)
        self.first_access = min((i for indices in self.forwards.values() for i in indices), default=0)
        self.last_backward = max((i for indices in self.backwards.values() for i in indices), default=-1)
        self.experts = frozenset(block.id for block in plan.table.blocks if block.kind == "expert")
        self.loads = self._loads(plan)

    def _loads(self, plan: Plan) -> dict[Channel, tuple[Due, ...]]:
        device = {arena.id for arena in plan.arenas if arena.tier == "device"}
        found: dict[Channel, list[tuple[int, Due]]] = {}
        for stay in plan.residences:
            if stay.begins == "load" and stay.arena in device and stay.channel is not None:
                item = plan.items[stay.item]
                stays = range(stay.first_use, stay.last_use + 1) if item.kind == "weights" else ()
                due = Due(
                    key=item.block if item.kind == "weights" else offload_key(plan, item.id),
                    channel=stay.channel,
                    load_after=stay.load_after,
                    first_use=stay.first_use,
                    last_use=stay.last_use,
                    uses=tuple(use for use in stays if item.block in self.accesses[use % self.length].blocks),
                )
                found.setdefault(stay.channel, []).append((stay.order, due))
        return {
            channel: tuple(due for _, due in sorted(rows, key=lambda row: row[0])) for channel, rows in found.items()
        }

    def next_forward(self, module: str, now: int) -> int:
        """Return the linear position of the module's next forward access after ``now``."""
        cycle, index = divmod(now, self.length)
        for candidate in self.forwards[module]:
            if candidate > index:
                return cycle * self.length + candidate
        return (cycle + 1) * self.length + self.forwards[module][0]

    def passed_expert(self, module: str, now: int) -> int | None:
        """Return the linear position of the module's forward that the experts just called stand in place of, or None.

        A router may call its experts in any order, and one more than once: as long as nothing but experts has come since
        where the plan has this one, it is a call of this pass.
        """
        cycle, index = divmod(now, self.length)
        for candidate in self.forwards.get(module, ()):
            since = range(candidate, index + 1)
            if since and all(self.accesses[i].kind == "forward" and self._is_left(i) for i in since):
                return cycle * self.length + candidate
        return None

    def backward_of(self, call: int, now: int) -> int | None:
        """Return the linear position of the next backward access that belongs to a forward, now's included, or None."""
        cycle, index = divmod(call, self.length)
        positions = (cycle * self.length + candidate for candidate in self._backwards_of.get(index, ()))
        return next((position for position in positions if position >= now), None)

    def next_backward(self, module: str, now: int) -> int | None:
        """Return the linear position of the module's next backward access in this cycle, now's included, or None."""
        cycle, index = divmod(now, self.length)
        for candidate in self.backwards.get(module, ()):
            if candidate >= index:
                return cycle * self.length + candidate
        return None

    def skipped_reads(self, now: int, position: int) -> bool:
        """Whether accesses that read weights lie strictly between the two. Experts may be passed over: so they are
        meant.
        """
        if position - now > self.length:
            return True
        return not all(self._is_left(linear % self.length) for linear in range(now + 1, position))

    def is_over(self, now: int) -> bool:
        """Whether no backward is to come in this cycle, unless of experts that nobody called."""
        end = now // self.length * self.length + self.last_backward
        return now >= end or not self.skipped_reads(now, end + 1)

    def _is_left(self, index: int) -> bool:
        """Whether an access may be left out without a word: it reads no weights, or an expert's alone."""
        return self.experts.issuperset(self.accesses[index].blocks)
