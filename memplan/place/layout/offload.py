"""Saved activations that are offloaded: two slots on the device in turn, a place of its own for each on the host.

What autograd saves in a module's forward is set aside in the module's slot, goes to the host while the next modules
run, and comes back into the same slot before the backward. What a slot holds at the turn-around stays in it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.errors import InputError
from memplan.program.schema import Address, Channel, Item, Residence
from memplan.program.timeline import Load, load_s
from memplan.units import align_up

SLOTS = 2
"""One is written by the compute or read by it while the other is on its way."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadedSave:
    """One module's saved activations, and when its slot is whose."""

    module: str
    block: int
    size_bytes: int
    slot: int
    made: int
    """Access that makes them."""
    used: int
    """Access that uses them, and frees them."""
    next_in_slot: int
    """First access of the slot's next owner; ``used`` where they stay in the slot until then."""
    before_in_slot: int
    """Last access of the slot's owner before ``used``, where they come back."""

    @property
    def stays(self) -> bool:
        """Whether they stay in their slot until they are used."""
        return self.next_in_slot == self.used


@dataclass(frozen=True, slots=True, kw_only=True)
class Saves:
    """All that is offloaded."""

    items: tuple[OffloadedSave, ...]
    slots_bytes: tuple[int, ...]

    @property
    def device_bytes(self) -> int:
        return sum(self.slots_bytes)

    @property
    def host_bytes(self) -> int:
        return sum(align_up(save.size_bytes) for save in self.items if not save.stays)

    def loads(
        self, table: CostTable, disk_used: bool, pageable: frozenset[str] = frozenset()
    ) -> tuple[list[Load], list[Load]]:
        """Return a pass's stores in their order, and what comes back by first use; the latter's sources are channel 0.

        ``pageable``: modules whose activations wait in RAM that is not page-locked.
        """
        moving = [save for save in self.items if not save.stays]

        def time_s(save: OffloadedSave, channel: Channel) -> float:
            return load_s(table, save.size_bytes, channel, disk_used, save.module in pageable)

        stores = [Load(save.made, save.next_in_slot, time_s(save, "d2h"), None) for save in moving]
        back = sorted((save.used, turn) for turn, save in enumerate(moving))
        return stores, [Load(moving[t].before_in_slot, used, time_s(moving[t], "h2d"), (0, t)) for used, t in back]


def make_saves(table: CostTable, given: Mapping[str, Activations]) -> Saves:
    """Return what is offloaded where ``given`` says so. Raises InputError where that cannot be."""
    forwards = {access.module: access for access in table.accesses if access.kind == "forward"}
    backwards = {access.module: access.index for access in table.accesses if access.kind == "backward"}
    modules = sorted((m for m, policy in given.items() if policy == "offload"), key=lambda m: forwards[m].index)
    for module in modules:
        if not forwards[module].offload_bytes:
            raise InputError(
                f"the activations of {module} were to be offloaded, but nothing of them can be: it runs more than "
                "once a micro-batch, saves nothing of its own, or could not be traced so; keep or recompute them"
            )
    events: list[list[tuple[int, str]]] = [[] for _ in range(SLOTS)]
    for turn, module in enumerate(modules):
        events[turn % SLOTS] += [(forwards[module].index, module), (backwards[module], module)]
    after: dict[tuple[int, str], int] = {}
    before: dict[tuple[int, str], int] = {}
    for listed in events:
        listed.sort()
        for one, other in itertools.pairwise(listed):
            after[one], before[other] = other[0], one[0]
    items = tuple(
        OffloadedSave(
            module=module,
            block=forwards[module].blocks[0] if forwards[module].blocks else 0,
            size_bytes=forwards[module].offload_bytes,
            slot=turn % SLOTS,
            made=forwards[module].index,
            used=backwards[module],
            next_in_slot=after[forwards[module].index, module],
            before_in_slot=before[backwards[module], module],
        )
        for turn, module in enumerate(modules)
    )
    sizes = [max((align_up(s.size_bytes) for s in items if s.slot == slot), default=0) for slot in range(SLOTS)]
    return Saves(items=items, slots_bytes=tuple(size for size in sizes if size))


def items_of(saves: Saves, first: int) -> tuple[Item, ...]:
    """Return the plan's items, numbered from ``first``."""
    return tuple(
        Item(id=first + turn, kind="saved", block=s.block, size_bytes=s.size_bytes, home="host", module=s.module)
        for turn, s in enumerate(saves.items)
    )


def addresses_of(saves: Saves, first: int, device_top: int) -> Iterator[Address]:
    """Yield each item's place in the device arena (0) above ``device_top``."""
    for turn, save in enumerate(saves.items):
        offset = device_top + sum(saves.slots_bytes[: save.slot])
        yield Address(item=first + turn, arena=0, offset_bytes=offset, size_bytes=save.size_bytes)


def residences_of(
    saves: Saves, first: int, first_id: int, arena_of: Mapping[int, int]
) -> tuple[list[Residence], list[Residence]]:
    """Return the stays that need no place in the host's link (made, and stored over its way back), and those that come
    back, by first use; the latter's ``id`` and ``order`` are for the caller to give. ``arena_of``: the host's, by item.
    """
    made: list[Residence] = []
    back: list[Residence] = []
    stored = 0
    for turn, save in enumerate(saves.items):
        item = first + turn
        made.append(
            Residence(
                id=first_id + len(made),
                item=item,
                arena=0,
                begins="made",
                source="",
                channel=None,
                order=-1,
                load_after=save.made - 1,
                first_use=save.made,
                last_use=save.used if save.stays else save.next_in_slot - 1,
                ends="drop" if save.stays else "store",
            )
        )
        if save.stays:
            continue
        made.append(
            Residence(
                id=first_id + len(made),
                item=item,
                arena=arena_of[item],
                begins="load",
                source=f"residence:{made[-1].id}",
                channel="d2h",
                order=stored,
                load_after=save.made,
                first_use=save.next_in_slot,
                last_use=save.used,
                ends="drop",
            )
        )
        stored += 1
        back.append(
            Residence(
                id=-1,
                item=item,
                arena=0,
                begins="load",
                source=f"residence:{made[-1].id}",
                channel="h2d",
                order=-1,
                load_after=save.before_in_slot,
                first_use=save.used,
                last_use=save.used,
                ends="drop",
            )
        )
    return made, sorted(back, key=lambda stay: stay.first_use)
