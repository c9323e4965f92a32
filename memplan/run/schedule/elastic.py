"""Segments of the device arena that are given back for part of a pass, and which of them are there.

[Note: when a segment is there] It is given back as soon as an access without it is under way and reads nothing in it,
and what the plan loads into it waits until one with it has begun. An access that needs one of its blocks all the same
(off the sequence) brings it back at once and holds it no longer than itself: what is right does not rest on the plan's
memory. In a sequence that was learned an access has the segments that the plan gives its module in all accesses of that
kind; what lies in others then comes on demand.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from memplan.program.schema import Plan
from memplan.run.memory.arena import Arena
from memplan.run.schedule.sequence import Step
from memplan.run.transfer.transfer import Transfers
from memplan.run.verify.race_check import ClockedTransfers


class Elastic:
    """The segments of a plan's device arena that are not always there."""

    def __init__(self, plan: Plan, arena: Arena, transfers: Transfers) -> None:
        self._arena = arena
        self._clocks = transfers if isinstance(transfers, ClockedTransfers) else None
        self._accesses = plan.table.accesses
        self.segment_of: dict[int, int] = {}
        """By block: the segment that it lies in, where that is not always there."""
        self.planned: dict[int, frozenset[int]] = {}
        """By segment: the plan's accesses without it."""
        for held in plan.arenas:
            for number, segment in enumerate(held.segments):
                if not segment.absent or held.tier != "device":
                    continue
                self.planned[number] = frozenset(i for first, last in segment.absent for i in range(first, last + 1))
                end = segment.offset_bytes + segment.size_bytes
                for address in plan.addresses:
                    item = plan.items[address.item]
                    inside = address.arena == held.id and segment.offset_bytes <= address.offset_bytes < end
                    if inside and item.kind == "weights":  # others are refused: program.support
                        self.segment_of[item.block] = number
        self.blocks: dict[int, tuple[int, ...]] = {
            number: tuple(block for block, within in self.segment_of.items() if within == number)
            for number in self.planned
        }

    def there(self) -> Iterator[int]:
        """Yield the segments that are there."""
        yield from [number for number in self.planned if self._arena.is_there(number)]

    def come(self, block: int) -> None:
        """Have the bytes of a block there, before a load into them is started."""
        number = self.segment_of.get(block)
        if number is not None:
            self._arena.bring_back(number)

    def leave(self, number: int) -> None:
        """Give a segment back. Nothing may lie there or be on its way there."""
        if self._clocks is not None:
            self._clocks.write(-1 - number, self._arena.segment(number), f"giving back segment {number}")
        self._arena.give_back(number)

    def absences(self, steps: Sequence[Step]) -> Mapping[int, frozenset[int]]:
        """Return the steps of a learned sequence without each segment. Such a sequence has no steps between a forward
        and a backward, so the last before a turn stands for what the plan has there.
        """
        found = {}
        for number, gone in self.planned.items():
            known: dict[tuple[str, str], bool] = {}
            for access in self._accesses:
                key = (access.kind, access.module)
                known[key] = known.get(key, False) or access.index in gone
            between = {
                kind: any(access.kind == kind and access.index in gone for access in self._accesses)
                for kind in ("loss", "optimizer")
            }
            found[number] = frozenset(
                index
                for index, step in enumerate(steps)
                if known.get((step.kind, step.module), True)
                or (
                    step.kind != steps[(index + 1) % len(steps)].kind
                    and between["loss" if step.kind == "forward" else "optimizer"]
                )
            )
        return found
