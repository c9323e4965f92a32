"""The judge's part on page-locked memory: what is said to be pageable, how much is not, and what staging takes.

Written for the judge alone: the solvers and the timeline reckon it elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator

from memplan.device_kinds import is_apart
from memplan.program.schema import RING_BYTES, Plan
from memplan.units import format_bytes


def page_lock_faults(plan: Plan) -> Iterator[str]:
    """Yield where pageable memory cannot be or is no use, more is page-locked than may be, and staging that is
    missing.
    """
    pageable = [arena for arena in plan.arenas if arena.pageable]
    for arena in pageable:
        if arena.tier != "host" or not is_apart(plan.table.device):
            yield f"arena {arena.id} is pageable: only RAM beside a GPU is, and this is on the {arena.tier}"
    tiers = {(address.item, plan.arenas[address.arena].pageable) for address in plan.addresses
             if plan.arenas[address.arena].tier == "host"}  # fmt: skip
    for item in {item for item, is_pageable in tiers if is_pageable and (item, False) in tiers}:
        yield f"item {item} is both in pinned and in pageable RAM"
    if pageable and plan.table.pageable_bytes_per_s is None:
        yield "RAM is pageable, but there is no rate at which it is read"
    if pageable and plan.staging_bytes < _rings_bytes(plan):
        yield (
            f"RAM is pageable and passes through {format_bytes(_rings_bytes(plan))} of staging, but "
            f"{format_bytes(plan.staging_bytes)} are set aside"
        )
    limit = plan.budgets.page_lock_bytes
    if limit is None or not is_apart(plan.table.device):
        return
    locked = sum(
        segment.size_bytes
        for arena in plan.arenas
        for segment in arena.segments
        if arena.tier == "host" and not arena.pageable
    )
    if _rings_bytes(plan) <= limit:
        locked += _rings_bytes(plan)
    state = sum(life.size_bytes for life in plan.table.lifetimes if life.kind == "optimizer")
    if state <= limit - 2 * RING_BYTES:  # it is page-locked only where both rings could be beside it
        locked += state
    if locked > limit:
        yield f"{format_bytes(locked)} of ram are to be pinned, the budget is {format_bytes(limit)}"


def stages(plan: Plan) -> bool:
    """Whether anything passes through staging: from the disk, or between the device and pageable RAM."""
    return any(item.home == "disk" for item in plan.items) or any(arena.pageable for arena in plan.arenas)


def _rings_bytes(plan: Plan) -> int:
    """Return the bytes of the rings to a card: one for the disk, one for pageable RAM. They are page-locked before
    anything else, where both can be.
    """
    to_card = (any(item.home == "disk" for item in plan.items), any(arena.pageable for arena in plan.arenas))
    return sum(to_card) * RING_BYTES if is_apart(plan.table.device) else 0


def slow_items(plan: Plan) -> set[int]:
    """Return the items that pass through pageable memory beside a card: where they wait, or in a ring that is not
    locked.
    """
    if not is_apart(plan.table.device):
        return set()
    slow = {address.item for address in plan.addresses if plan.arenas[address.arena].pageable}
    limit = plan.budgets.page_lock_bytes
    if limit is not None and _rings_bytes(plan) > limit:
        slow |= {item.id for item in plan.items if item.home == "disk"}
    return slow
