"""Tails: bytes of the device arena beyond what every access has room for, there where activations leave room for them.

The ring goes through the shared region and the tails that are there whenever a bundle is read. A block takes the bytes
that were free the longest; of bytes that were never used those that soon nothing may use any more come first, else
those that last the longest. So a tail holds what is read last before it goes, and what is read first lies where others
follow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from memplan.place.problem import Bytes, Problem
from memplan.program.schema import Tier
from memplan.units import ALIGNMENT_BYTES, align_up

MOST_TAILS = 16
"""Each is an allocation of its own."""


class ElasticSegment(NamedTuple):
    """One segment of the device arena that is given back for part of the pass."""

    offset_bytes: int
    """From the beginning of the shared region, whose end the first tail begins at."""
    size_bytes: int
    absent: tuple[tuple[int, int], ...]
    """First and last access of each stretch without it."""

    def is_absent(self, access: int) -> bool:
        """Whether the access has no room for it."""
        return any(first <= access <= last for first, last in self.absent)


def tails_of(spare_bytes: Bytes, step_bytes: int, most_bytes: int) -> tuple[ElasticSegment, ...]:
    """Return the tails that accesses have room for beyond the worst one, in steps of ``step_bytes`` or more.

    ``spare_bytes``: room at each access beyond the worst one's. ``most_bytes``: more are of no use.

    An access has no more than the one before it: what that leaves behind may still be there as it begins, which the
    rows of accesses other than the worst are not exact about.
    """
    spare_bytes = np.minimum(spare_bytes, np.roll(spare_bytes, 1))
    top = min(int(spare_bytes.max()), most_bytes)
    step = align_up(max(step_bytes, ALIGNMENT_BYTES))
    step *= max(1, -(-(top // step) // MOST_TAILS))
    found: list[ElasticSegment] = []
    for reached in range(step, top + 1, step):
        edges = np.flatnonzero(np.diff(np.concatenate(([False], spare_bytes < reached, [False]))))
        absent = tuple((int(first), int(after) - 1) for first, after in edges.reshape(-1, 2))
        if found and found[-1].absent == absent:
            found[-1] = found[-1]._replace(size_bytes=found[-1].size_bytes + step)
        else:
            found.append(ElasticSegment(reached - step, step, absent))
    return tuple(found)


@dataclass(slots=True)
class _Space:
    """The shared region, or a tail, as it is filled."""

    size_bytes: int
    allowed: list[bool]
    """By bundle, whether it is there at each of its uses."""
    supply_bytes: int
    """Of the bundles to come that are allowed."""
    fresh_bytes: int
    top: int = 0
    used: int = 0
    placed: list[tuple[int, int, int]] = field(default_factory=list)
    """What lies there: begin, end, and the number of its bundle."""
    known: dict[int, int] = field(default_factory=dict)
    """By the size of a block: the last bundle in whose bytes it would lie next."""

    def next_last(self, size_bytes: int) -> int:
        """Return the last bundle that lies where a block of that size would lie next; -1 where none ever did."""
        if size_bytes not in self.known:
            begin = self.begin_of(size_bytes)
            self.known[size_bytes] = max(
                [n for b, e, n in self.placed if b < begin + size_bytes and begin < e], default=-1
            )
        return self.known[size_bytes]

    def begin_of(self, size_bytes: int) -> int:
        """Return where the next block of that size would lie: after the last one, or at the start."""
        return self.top if self.top + size_bytes <= self.size_bytes else 0

    def put(self, begin: int, size_bytes: int, bundle: int) -> None:
        end = begin + size_bytes
        self.placed = [one for one in self.placed if not (one[0] < end and begin < one[1])]
        self.placed.append((begin, end, bundle))
        self.fresh_bytes -= max(0, end - self.used)
        self.top, self.used = end, max(self.used, end)
        self.known.clear()


def around_with_tails(
    problem: Problem,
    streamed: Sequence[int],
    homes: Mapping[int, Tier],
    region_bytes: int,
    tails: Sequence[ElasticSegment],
) -> tuple[dict[int, int], int, tuple[ElasticSegment, ...]] | None:
    """Return addresses, the bytes of the shared region that are used, and the tails that are; None where they do not
    fit.
    """
    sizes, bundles = problem.sizes_bytes, problem.bundles_of(streamed)
    bytes_of = [problem.room(bundle) for bundle in bundles]
    needs = [problem.needs(bundle[0], homes[bundle[0]]) for bundle in bundles]
    spaces = []
    for size_bytes, tail in ((region_bytes, None), *((tail.size_bytes, tail) for tail in tails)):
        gone = set() if tail is None else {at for first, last in tail.absent for at in range(first, last + 1)}
        allowed = [gone.isdisjoint(its) for its in needs]
        supply = sum([size for size, may in zip(bytes_of, allowed, strict=True) if may])
        spaces.append(_Space(size_bytes, allowed, supply, size_bytes))
    at: dict[int, tuple[_Space, int]] = {}
    for number, bundle in enumerate(bundles):
        for space in spaces:
            space.supply_bytes -= bytes_of[number] if space.allowed[number] else 0
        open_to_it = [space for space in spaces if space.allowed[number]]
        waiting = sorted(bundle, key=lambda block: (-sizes[block], block))
        while waiting:
            best = _best(open_to_it, spaces, sizes[waiting[0]], number)
            if best is None:
                return None
            fits = [block for block in waiting if best.top + sizes[block] <= best.size_bytes]
            block = fits[0] if fits else waiting[0]
            if best.next_last(sizes[block]) == number:
                return None
            begin = best.begin_of(sizes[block])
            best.put(begin, sizes[block], number)
            at[block] = (best, begin)
            waiting.remove(block)
    begins, kept_tails, end = {id(spaces[0]): 0}, [], spaces[0].used
    for space, tail in zip(spaces[1:], tails, strict=True):
        if space.used:
            begins[id(space)] = end
            kept_tails.append(ElasticSegment(end, space.used, tail.absent))
            end += space.used
    offsets = {block: begins[id(space)] + begin for block, (space, begin) in at.items()}
    return offsets, spaces[0].used, tuple(kept_tails)


def _best(open_to_it: Sequence[_Space], spaces: Sequence[_Space], size_bytes: int, number: int) -> _Space | None:
    """Return the space whose bytes were free the longest; None where a block has no room beside its own bundle."""
    found, best = None, (number, 0, 0)
    for space in open_to_it:
        if space.size_bytes < size_bytes:
            continue
        last = space.next_last(size_bytes)
        if last >= number:
            continue
        rank = (last, 0, 0)
        if space is spaces[0]:
            rank = (last, 1, 0)
        elif last < 0:
            waiting = sum([s.fresh_bytes for s in spaces if s.supply_bytes <= space.supply_bytes])
            presses = space.supply_bytes < waiting
            rank = (last, 0, space.supply_bytes) if presses else (last, 2, -space.supply_bytes)
        if rank < best:
            found, best = space, rank
    return found
