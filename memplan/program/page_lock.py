"""What of RAM is page-locked under a plan. The rest a GPU gets through a staging ring, at another rate."""

from __future__ import annotations

from memplan.device_kinds import is_apart
from memplan.program.schema import RING_BYTES, Plan


def rings_bytes(*, reads_disk: bool, is_pageable: bool) -> int:
    """Return the bytes of the rings to a GPU: one for what lies on the disk, one for what is pageable."""
    return RING_BYTES * (reads_disk + is_pageable)


def are_rings_locked(rings: int, page_lock_bytes: int | None) -> bool:
    """Whether rings of so many bytes are page-locked: all, or where so much may not be none."""
    return page_lock_bytes is None or rings <= page_lock_bytes


def ring_bytes(plan: Plan) -> int:
    """Return the bytes of a plan's rings."""
    if not is_apart(plan.table.device):
        return 0
    reads_disk, is_pageable = (any(item.home == "disk" for item in plan.items), any(a.pageable for a in plan.arenas))
    return rings_bytes(reads_disk=reads_disk, is_pageable=is_pageable)


def is_ring_locked(plan: Plan) -> bool:
    """Whether a plan's rings are page-locked."""
    return are_rings_locked(ring_bytes(plan), plan.budgets.page_lock_bytes)


def is_state_locked(state_bytes: int, page_lock_bytes: int | None) -> bool:
    """Whether the optimizer's state is page-locked where it waits in RAM: it is if there is room for it beside both
    rings, be they used or not, since its copies are priced before anything is placed.
    """
    return are_rings_locked(state_bytes + rings_bytes(reads_disk=True, is_pageable=True), page_lock_bytes)


def pageable_items(plan: Plan) -> frozenset[int]:
    """Return the items whose bytes pass through RAM that is not page-locked on their way to a GPU or from it."""
    if not is_apart(plan.table.device):
        return frozenset()
    arenas = {arena.id for arena in plan.arenas if arena.pageable}
    found = {address.item for address in plan.addresses if address.arena in arenas}
    if not is_ring_locked(plan):
        found.update(item.id for item in plan.items if item.home == "disk")
    return frozenset(found)


def page_locked_bytes(plan: Plan) -> int:
    """Return the bytes of RAM that a plan has page-locked; none where the compute device is the CPU."""
    if not is_apart(plan.table.device):
        return 0
    homes = sum(arena.size_bytes for arena in plan.arenas if arena.tier == "host" and not arena.pageable)
    state = plan.table.state_on_host_bytes
    homes += state if is_state_locked(state, plan.budgets.page_lock_bytes) else 0
    return homes + (ring_bytes(plan) if is_ring_locked(plan) else 0)
