"""Rings: streamed blocks take the bytes of a region one after another in the order of their first access, and begin
again at its start.

What is needed next then always waits for what was needed longest ago, forwards in forward and backwards in backward:
the link is idle only where nothing may leave yet. What stays on the device for good is spread evenly over the order,
which moves as many bytes (all but what there is room for, each sweep) and asks for less RAM.
"""

from __future__ import annotations

import itertools
from collections.abc import Container, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

from memplan.place.layout.elastic import around_with_tails, tails_of
from memplan.place.layout.layout import Arrangement, arrangement_of
from memplan.place.problem import FEW_BLOCKS, Bytes, Problem, evenly
from memplan.program.schema import Tier

_NEAR = 3
"""Bundles before and after one that may stay in its place, where they are not few: more are more changes to time."""

MOST_STACKED = 6
"""Blocks of which every arrangement is looked at."""

Grain = Literal["block", "bundle"]


class LayoutRecipe(NamedTuple):
    """How to make an arrangement in a given room."""

    times: float
    """Bytes of the shared region at least, in units of the least that streaming takes; what is beyond is for residents.
    """
    grain: Grain
    """Residents are chosen block by block, or in bundles: blocks that are always read together."""
    disk_bundles: int
    """What comes from the disk has a region of its own for so many of its greatest bundles; 0: all share one."""
    disk_share: float = 0.0
    """Of the streamed blocks at least so many lie on the disk, by number, where RAM would hold more."""
    tails: bool = False
    """Whether there are tails, each as large as the middle one of all bundles at least."""


class Rings:
    """What all rings of a problem have in common."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._in_place = read_in_place(problem)
        self._movable = [block for block in problem.movable if block not in self._in_place]
        self._forced = [block for block in problem.forced if block not in self._in_place]
        self._resident_bytes = problem.room(problem.resident)
        self._total_bytes = problem.room(self._movable)
        self._all_bytes = problem.room(problem.movable)
        self._least = _least_region(problem, [*self._movable, *self._forced])
        self._least_forced = _least_region(problem, self._forced)
        by_size = sorted(map(problem.room, problem.bundles))
        self._middle_bytes = by_size[len(by_size) // 2] if by_size else 0

    def arrange(self, ring: LayoutRecipe, room_bytes: int, spare_bytes: Bytes | None = None) -> Arrangement | None:
        """Return the arrangement that takes at most ``room_bytes``; None where there is none, or ``ram`` and ``disk``
        are too little. ``spare_bytes``: room beside that, by access, for a ring with tails.
        """
        problem = self._problem
        free_bytes = room_bytes - self._resident_bytes
        in_place = self._in_place
        if free_bytes >= self._all_bytes + self._least_forced:
            residents, in_place = set(problem.movable), in_place & set(problem.forced)
        elif free_bytes >= self._total_bytes + self._least_forced:
            residents = set(self._movable)
        elif free_bytes < self._least:
            return None
        else:
            for_residents = free_bytes - min(int(ring.times * self._least), free_bytes)
            residents = _residents(problem, self._movable, for_residents, ring.grain)
        return self._with(residents, free_bytes, in_place, ring, spare_bytes)

    def _with(
        self,
        residents: Container[int],
        free_bytes: int,
        in_place: set[int],
        ring: LayoutRecipe,
        spare_bytes: Bytes | None,
    ) -> Arrangement | None:
        problem, sizes = self._problem, self._problem.sizes_bytes
        staying = [block for block in problem.movable if block in residents]
        region = free_bytes - problem.room(staying)
        if region < 0:
            return None
        streamed = problem.in_order([*(block for block in self._movable if block not in residents), *self._forced])
        homes = homes_of(problem, streamed, in_place, ring.disk_share)
        if homes is None:
            return None
        if ring.tails and spare_bytes is not None:
            tails = tails_of(spare_bytes, self._middle_bytes, problem.room(streamed))
            around = around_with_tails(problem, streamed, homes, region, tails)
            return None if around is None else arrangement_of(problem, around[0], homes, around[1], tails=around[2])
        offsets = _offsets(problem, streamed, homes, region, ring.disk_bundles)
        if offsets is None:
            return None
        used = max([offset + sizes[block] for block, offset in offsets.items()], default=0)
        return arrangement_of(problem, offsets, homes, used)

    def beside(
        self, arrangement: Arrangement, ring: LayoutRecipe, room_bytes: int, spare_bytes: Bytes | None = None
    ) -> Iterator[Arrangement]:
        """Yield the arrangements in which one bundle stays that did not, or does not that did, or one near it in its
        place.
        """
        bundles = [kept for b in self._problem.bundles if (kept := tuple(x for x in b if x not in self._in_place))]
        bundles = [bundle for bundle in bundles if bundle[0] not in self._problem.pins]
        staying = {block for block in self._movable if block not in arrangement.homes}
        free_bytes = room_bytes - self._resident_bytes
        few = len(bundles) <= FEW_BLOCKS
        changes: list[tuple[int, ...]] = []
        for turn, bundle in enumerate(bundles):
            changes.append(bundle)
            if bundle[0] in staying:
                near = bundles if few else bundles[max(0, turn - _NEAR) : turn + _NEAR + 1]
                changes += [(*bundle, *other) for other in near if other[0] not in staying]
        if few:
            stay = [bundle for bundle in bundles if bundle[0] in staying]
            come = [bundle for bundle in bundles if bundle[0] not in staying]
            for one, two in itertools.combinations(stay, 2):
                changes += [(*one, *two, *other) for other in come]
        for change in changes:
            found = self._with(staying ^ set(change), free_bytes, self._in_place, ring, spare_bytes)
            if found is not None:
                yield found

    def stacked(self, room_bytes: int) -> Iterator[Arrangement]:
        """Yield every arrangement in which each block lies at the start of the region or at the end of another, where
        there are so few blocks that all can be looked at.
        """
        problem, sizes = self._problem, self._problem.sizes_bytes
        blocks = [*self._movable, *self._forced]
        free_bytes = room_bytes - self._resident_bytes
        if not 1 < len(blocks) <= MOST_STACKED or free_bytes < self._least:
            return
        homes = homes_of(problem, problem.in_order(blocks), self._in_place)
        if homes is None:
            return
        for offsets in _stacks(blocks, sizes, free_bytes):
            used = max(offset + sizes[block] for block, offset in offsets.items())
            yield arrangement_of(problem, offsets, homes, used)


def _stacks(blocks: Sequence[int], sizes: Sequence[int], region_bytes: int) -> Iterator[dict[int, int]]:
    """Yield every way to have each block lie at the start of a region or at the end of another."""
    waiting: list[dict[int, int]] = [{}]
    seen: set[frozenset[tuple[int, int]]] = set()
    while waiting:
        placed = waiting.pop()
        if len(placed) == len(blocks):
            yield placed
            continue
        tops = {0, *(offset + sizes[block] for block, offset in placed.items())}
        for block in blocks:
            for top in tops if block not in placed else ():
                grown = {**placed, block: top}
                if top + sizes[block] <= region_bytes and (key := frozenset(grown.items())) not in seen:
                    seen.add(key)
                    waiting.append(grown)


def _least_region(problem: Problem, streamed: Sequence[int]) -> int:
    """Return the fewest bytes through which blocks can pass."""
    return max(map(problem.room, problem.bundles_of(streamed)), default=0)


def _residents(problem: Problem, movable: Sequence[int], target_bytes: int, grain: Grain) -> set[int]:
    """Return blocks that take at most ``target_bytes``, spread evenly over the order by their bytes."""
    sizes = problem.sizes_bytes
    groups = problem.bundles_of(movable) if grain == "bundle" else [(block,) for block in movable]
    total = problem.room(movable)
    found: set[int] = set()
    left = min(target_bytes, total)
    share, owed = left / total if total else 0.0, 0.0
    for group in groups:
        size = problem.room(group)
        owed += share * size
        if owed >= size / 2 and size <= left:
            found.update(group)
            owed -= size
            left -= size
    # What is left over takes what it can, the largest first.
    for block in sorted(set(movable) - found, key=lambda block: (-sizes[block], problem.ranks[block])):
        if sizes[block] <= left:
            found.add(block)
            left -= sizes[block]
    return found


def _offsets(
    problem: Problem, streamed: Sequence[int], homes: Mapping[int, Tier], region_bytes: int, disk_bundles: int
) -> dict[int, int] | None:
    on_disk = [block for block in streamed if homes[block] == "disk"]
    if not disk_bundles or not on_disk or len(on_disk) == len(streamed):
        return None if disk_bundles else _around(problem, streamed, region_bytes)
    apart = set(on_disk)
    own = sum(sorted(map(problem.room, problem.bundles_of(on_disk)), reverse=True)[:disk_bundles])
    first = _around(problem, on_disk, own)
    second = _around(problem, [block for block in streamed if block not in apart], region_bytes - own)
    if first is None or second is None:
        return None
    return first | {block: own + offset for block, offset in second.items()}


def _around(problem: Problem, streamed: Sequence[int], region_bytes: int) -> dict[int, int] | None:
    """Return addresses one after another; at the end of the region they begin again at its start."""
    sizes = problem.sizes_bytes
    found: dict[int, int] = {}
    top = 0
    for waiting in problem.bundles_of(streamed):
        size = problem.room(waiting)
        if size > region_bytes:
            return None
        if top + size <= region_bytes:
            for block in waiting:
                found[block] = top
                top += sizes[block]
            continue
        # It comes around: what fits before the end, the largest first; the rest from the start, if it ends before
        # these.
        begin, before = top, []
        for block in sorted(waiting, key=lambda block: (-sizes[block], block)):
            if top + sizes[block] <= region_bytes:
                before.append((block, top))
                top += sizes[block]
        placed = {block for block, _ in before}
        rest = [block for block in waiting if block not in placed]
        if problem.room(rest) > begin:
            before, rest = [], list(waiting)
        found.update(before)
        top = 0
        for block in rest:
            found[block] = top
            top += sizes[block]
    return found


def read_in_place(problem: Problem) -> set[int]:
    """Return the blocks that stay on the host, whence rows of them are read: where RAM has room for them."""
    sizes, pins = problem.sizes_bytes, problem.pins
    away = problem.in_order({*problem.movable, *problem.forced})
    rows_only = [block for block in away if not problem.whole_uses[block]]
    if not rows_only:
        return set()
    pinned = [block for block in away if pins.get(block) == "host"]
    on_disk = any(pins.get(block) == "disk" for block in away)
    on_disk = on_disk or (problem.budgets.disk_bytes != 0 and problem.room(away) > problem.ram_bytes)
    most = min(problem.room(away), problem.ram_bytes)
    left = problem.ram_bytes - problem.room(pinned) - problem.staged_bytes(most, reads_disk=on_disk)
    found = {block for block in rows_only if block in pinned}
    for block in rows_only:
        if block not in pins and sizes[block] <= left:
            left -= sizes[block]
            found.add(block)
    return found


def homes_of(
    problem: Problem, streamed: Sequence[int], in_place: set[int], disk_share: float = 0.0
) -> dict[int, Tier] | None:
    """Return a home for each block: RAM while it lasts, the disk for the rest, spread evenly among what is streamed.

    ``disk_share``: of those that are free to lie in either at least so many lie on the disk.
    """
    disk_room = problem.budgets.disk_bytes
    read_there = problem.room(in_place)
    pins = dict(problem.pins)
    # Of the others only rows are read; they come whole since RAM has no room for them.
    pins |= {block: "disk" for block in streamed if not problem.whole_uses[block]}
    free = [block for block in streamed if block not in pins]
    pinned: dict[int, Tier] = {block: pins[block] for block in streamed if block in pins}
    disk_pinned = sum(problem.size(block) for block, tier in pinned.items() if tier == "disk")
    host_pinned = problem.room(block for block, tier in pinned.items() if tier == "host")
    all_free = problem.room(free)

    def to_disk(count: int) -> set[int]:
        return {free[index] for index in evenly(count, len(free))} if count else set()

    def short(count: int) -> bool:
        """Whether ``ram`` is too little with that many of the free blocks on disk."""
        host = read_there + host_pinned + all_free - problem.room(to_disk(count))
        return host + problem.staged_bytes(host, reads_disk=bool(count or disk_pinned)) > problem.ram_bytes

    low = round(disk_share * len(free))
    if short(low):
        low, high = low + 1, len(free)  # the least count that RAM allows; as sizes differ, near it
        if low > high or short(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if short(middle) else (low, middle)
    disk = to_disk(low)
    if disk_room is not None and disk_pinned + sum(problem.size(block) for block in disk) > disk_room:
        return None
    homes: dict[int, Tier] = {block: "disk" if block in disk else "host" for block in free}
    return homes | pinned | dict.fromkeys(in_place, "host")
