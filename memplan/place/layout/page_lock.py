"""What of RAM is page-locked, where no more than so many bytes may be.

The staging rings come first, then the optimizer's state, where it waits in RAM, then offloaded activations, then blocks
of which rows are read where they lie (the device reads them as it computes), then blocks by how often a pass loads
them. Those that come equally often are taken in an order of which every beginning is spread evenly over the pass. It
does not depend on how much may be locked, and what comes first is never passed over for what is smaller: so with more
nothing that was locked is pageable, and no load takes longer (a block of which rows are read apart, which is passed
over where it does not fit).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from memplan.place.problem import Problem
from memplan.program.page_lock import are_rings_locked, rings_bytes
from memplan.program.schema import Tier
from memplan.units import align_up


class Pageable(NamedTuple):
    """What is not page-locked."""

    blocks: frozenset[int] = frozenset()
    modules: frozenset[str] = frozenset()
    """Those whose offloaded activations wait there."""
    rings: bool = False
    """Whether the staging rings are not page-locked either."""


NOTHING = Pageable()


def pageable_of(
    problem: Problem, homes: Mapping[int, Tier], offsets: Mapping[int, int], loaded: Sequence[int]
) -> Pageable:
    """Return what is not page-locked. ``homes``, ``offsets``: as an arrangement has them; ``loaded``: the block of each
    load of a pass.
    """
    limit, sizes = problem.page_lock_bytes, problem.sizes_bytes
    if limit is None:
        return NOTHING
    on_host = [block for block, tier in homes.items() if tier == "host"]
    host_bytes = problem.room(on_host)
    reads_disk = "disk" in homes.values()
    is_pageable = problem.is_pageable(host_bytes, reads_disk=reads_disk)
    rings_size = rings_bytes(reads_disk=reads_disk, is_pageable=is_pageable)
    rings = not are_rings_locked(rings_size, limit)
    if not is_pageable:
        return Pageable(rings=rings)
    left = limit - rings_size - problem.locked_state_bytes  # below 0 where not even the rings can be: then nothing is
    modules: set[str] = set()
    for save in problem.saves.items:
        if not save.stays:
            left = _less(left, align_up(save.size_bytes))
            if left < 0:
                modules.add(save.module)
    blocks: set[int] = set()
    for block in problem.in_order(block for block in on_host if block not in offsets):
        if sizes[block] > left:
            blocks.add(block)
        else:
            left -= sizes[block]
    counts = dict.fromkeys(on_host, 0)
    for block in loaded:
        if block in counts:
            counts[block] += 1
    for count in sorted({counts[block] for block in on_host if block in offsets}, reverse=True):
        for block in spread(problem.in_order(b for b in on_host if b in offsets and counts[b] == count)):
            left = _less(left, sizes[block])
            if left < 0:
                blocks.add(block)
    return Pageable(frozenset(blocks), frozenset(modules), rings)


def _less(left_bytes: int, size_bytes: int) -> int:
    """Return what is left once so much is locked; below 0, for good, where that is more than there is."""
    return left_bytes - size_bytes if size_bytes <= left_bytes else -1


def spread(blocks: Sequence[int]) -> list[int]:
    """Return blocks in an order of which every beginning is spread evenly over them: by their places' bits,
    reversed.
    """
    bits = len(blocks).bit_length()
    return [blocks[place] for place in sorted(range(len(blocks)), key=lambda place: f"{place:0{bits}b}"[::-1])]
