"""Arrangements: which blocks are streamed through which slots, and the residences that follow from it.

Streamed blocks take the slots in turn, in the order of their first access. A slot is occupied by its blocks in the
order of their accesses; accesses of one block with no other between them are one stay, so that what a slot holds at a
turn-around is used again there. For N equal blocks with room for M that gives 2(N - M) loads a pass, the least there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from msgspec.structs import replace

from memplan.place.problem import Problem, evenly, to_the_ends
from memplan.place.saves import addresses_of, items_of, residences_of
from memplan.program.schema import Address, Arena, Channel, Item, Residence, Segment, Tier


class Shape(NamedTuple):
    """A way to choose streamed blocks and to share slots; with a count of streamed layers it is an arrangement."""

    specials: tuple[int, ...]
    """Special blocks that are streamed too."""
    spread: Callable[[int, int], tuple[int, ...]]
    """Chooses the layers."""
    slots: int
    """Slots that rotate among the streamed blocks."""
    apart: str
    """``specials`` or ``disk``: these have slots of their own; empty: all rotate together."""
    apart_slots: int


Key = tuple[tuple[tuple[int, ...], ...], frozenset[int]]
"""Slots, and the blocks that are not always on the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Streamed blocks by slot; of those in no slot only rows are read, on the host. All others lie on the device always."""

    slots: tuple[tuple[int, ...], ...]
    homes: Mapping[int, Tier]
    """Home of each block that is not always on the device: host or disk."""
    device_bytes: int
    """Of the device arena: residents and slots."""
    slots_bytes: int
    host_bytes: int
    """Of the host arena."""
    disk_bytes: int
    """Of the blocks whose home is the disk."""
    rows_bytes: int
    """Read in a pass from blocks on the host where they lie."""

    @property
    def key(self) -> Key:
        """What tells it from others of its problem."""
        return (self.slots, frozenset(self.homes))


class Stay(NamedTuple):
    """One loaded stay of a block on the device; accesses as in :class:`memplan.program.schema.Residence`."""

    first_use: int
    block: int
    load_after: int
    last_use: int


def shapes(problem: Problem) -> Iterator[Shape]:
    """Yield every shape tried.

    Besides two slots in turn: one (the least room), three (blocks of unequal times or homes), big special blocks in a
    slot of their own (else every layer's slot is as large), blocks from the disk in slots of their own (their long
    loads then run ahead beside the host's).
    """
    may_be_disk = problem.budgets.disk_bytes is None or problem.budgets.disk_bytes > 0
    total = sum(problem.sizes_bytes[block] for block in (*problem.stack, *problem.specials, *problem.forced))
    mixed = may_be_disk and problem.ram_bytes < total + problem.staging_bytes
    mixed = mixed or "disk" in problem.pins.values()
    for mask in range(1 << len(problem.specials)):
        special = tuple(block for bit, block in enumerate(problem.specials) if mask >> bit & 1)
        together = [(2, "", 0), (1, "", 0), (3, "", 0)]
        if len(special) > 1:
            together += [(2, "specials", 1), (1, "specials", 1), (3, "specials", 1)]
        if mixed:
            together += [(2, "disk", 1), (1, "disk", 1), (2, "disk", 2), (1, "disk", 2)]
        for spread, (slots, apart, apart_slots) in product((to_the_ends, evenly), together):
            yield Shape(special, spread, slots, apart, apart_slots)


def arrange(problem: Problem, shape: Shape, count: int) -> Arrangement | None:
    """Return a shape's arrangement with ``count`` streamed layers; None where ``ram`` and ``disk`` cannot hold it."""
    layers = [problem.stack[index] for index in shape.spread(count, len(problem.stack))] if count else []
    away = problem.in_order({*layers, *shape.specials, *problem.forced})
    in_place = _in_place(problem, away)
    streamed = [block for block in away if block not in in_place]
    groups = [(streamed, shape.slots)]
    if shape.apart == "specials":
        own = set(shape.specials) - in_place
        groups = [([b for b in streamed if b not in own], shape.slots), ([b for b in streamed if b in own], 1)]
    elif shape.apart == "disk":
        first_homes = _homes(problem, streamed, in_place)
        if first_homes is None:
            return None
        own = {block for block in streamed if first_homes[block] == "disk"}
        if not 0 < len(own) < len(streamed):
            return None  # nothing to set apart: another shape has it
        groups = [
            ([b for b in streamed if b not in own], shape.slots),
            ([b for b in streamed if b in own], shape.apart_slots),
        ]
    taken = [tuple(group[turn::slots]) for group, slots in groups for turn in range(slots)]
    # A block alone in a slot never leaves it: it is resident, unless it is pinned elsewhere.
    kept = tuple(slot for slot in taken if len(slot) > 1 or any(block in problem.pins for block in slot))
    return _arranged(problem, kept, in_place)


def _in_place(problem: Problem, away: Sequence[int]) -> set[int]:
    """Return the blocks that stay on the host, whence rows of them are read: where RAM has room for them."""
    sizes, pins = problem.sizes_bytes, problem.pins
    rows_only = [block for block in away if not problem.whole_uses[block]]
    if not rows_only:
        return set()
    pinned = [block for block in away if pins.get(block) == "host"]
    on_disk = any(pins.get(block) == "disk" for block in away)
    on_disk = on_disk or (problem.budgets.disk_bytes != 0 and sum(sizes[block] for block in away) > problem.ram_bytes)
    left = problem.ram_bytes - sum(sizes[block] for block in pinned) - (problem.staging_bytes if on_disk else 0)
    found = {block for block in rows_only if block in pinned}
    for block in rows_only:
        if block not in pins and sizes[block] <= left:
            left -= sizes[block]
            found.add(block)
    return found


def _arranged(problem: Problem, slots: tuple[tuple[int, ...], ...], in_place: set[int]) -> Arrangement | None:
    sizes = problem.sizes_bytes
    moving = problem.in_order(block for slot in slots for block in slot)
    homes = _homes(problem, moving, in_place)
    if homes is None:
        return None
    moving = [*moving, *in_place]
    on_host = {block for block, tier in homes.items() if tier == "host"}
    slots_bytes = sum(max([sizes[block] for block in slot]) for slot in slots)
    return Arrangement(
        slots=slots,
        homes=homes,
        device_bytes=sum(sizes) - sum([sizes[block] for block in moving]) + slots_bytes,
        slots_bytes=slots_bytes,
        host_bytes=sum([sizes[block] for block in moving if homes[block] == "host"]),
        disk_bytes=sum([problem.size(block) for block in moving if homes[block] == "disk"]),
        rows_bytes=sum([size for block, size in problem.rows if block in on_host]),
    )


def _homes(problem: Problem, streamed: Sequence[int], in_place: set[int]) -> dict[int, Tier] | None:
    """Return a home for each block: RAM while it lasts, the disk for the rest, spread evenly among what is streamed."""
    sizes, disk_room = problem.sizes_bytes, problem.budgets.disk_bytes
    ram = problem.ram_bytes - sum(sizes[block] for block in in_place)
    pins = dict(problem.pins)
    # Of the others only rows are read; they come whole since RAM has no room for them.
    pins |= {block: "disk" for block in streamed if not problem.whole_uses[block]}
    free = [block for block in streamed if block not in pins]
    pinned: dict[int, Tier] = {block: pins[block] for block in streamed if block in pins}
    disk_pinned = sum(problem.size(block) for block, tier in pinned.items() if tier == "disk")
    host_pinned = sum(sizes[block] for block, tier in pinned.items() if tier == "host")
    all_free = sum([sizes[block] for block in free])

    def to_disk(count: int) -> set[int]:
        return {free[index] for index in evenly(count, len(free))} if count else set()

    def short(count: int) -> bool:
        """Whether ``ram`` is too little with that many of the free blocks on disk."""
        host = host_pinned + all_free - sum([sizes[block] for block in to_disk(count)])
        return host + (problem.staging_bytes if count or disk_pinned else 0) > ram

    low = 0
    if short(0):
        low, high = 1, len(free)  # the least count that RAM allows; as sizes differ, near it
        if not free or short(high):
            return None
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if short(middle) else (low, middle)
    disk = to_disk(low)
    if disk_room is not None and disk_pinned + sum(problem.size(block) for block in disk) > disk_room:
        return None
    homes: dict[int, Tier] = {block: "disk" if block in disk else "host" for block in free}
    return homes | pinned | dict.fromkeys(in_place, "host")


def stays_of(problem: Problem, arrangement: Arrangement) -> list[Stay]:
    """Return the loaded stays of an arrangement by first use: the earliest deadline first, which cannot deadlock."""
    stays = [stay for slot in arrangement.slots for stay in _stays(problem, slot, arrangement.homes)]
    stays.sort()
    return stays


def channel_of(tier: Tier) -> Channel:
    """Return the channel over which a block comes from its home."""
    return "h2d" if tier == "host" else "disk"


def _stays(problem: Problem, slot: tuple[int, ...], homes: Mapping[int, Tier]) -> Iterator[Stay]:
    """Yield the stays of a slot's blocks on the cycle."""
    length = problem.length
    uses = sorted([(index, block) for block in slot for index in problem.needs(block, homes[block])])
    if len(slot) == 1:  # pinned to the host or the disk, alone: it leaves at the end of each pass
        yield Stay(uses[0][0], slot[0], uses[-1][0] - length, uses[-1][0])
        return
    begin = next(i for i in range(len(uses)) if uses[i][1] != uses[i - 1][1])
    turned = uses[begin:] + [(index + length, block) for index, block in uses[:begin]]
    before = turned[-1][0] - length
    block, first_use, last_use = turned[0][1], turned[0][0], turned[0][0]
    for index, reader in [*turned[1:], (-1, -1)]:
        if reader == block:
            last_use = index
            continue
        shift = length if first_use >= length else 0
        yield Stay(first_use - shift, block, before - shift, last_use - shift)
        before = last_use
        block, first_use, last_use = reader, index, index


# ---- what it says ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An arrangement written out as the plan has it."""

    items: tuple[Item, ...]
    arenas: tuple[Arena, ...]
    addresses: tuple[Address, ...]
    residences: tuple[Residence, ...]


def lay_out(problem: Problem, arrangement: Arrangement) -> Layout:
    """Return items, arenas, addresses and residences of an arrangement. Item ids are block ids."""
    blocks, sizes = problem.table.blocks, problem.sizes_bytes
    homes = arrangement.homes
    items = tuple(
        Item(id=b.id, kind="weights", block=b.id, size_bytes=b.size_bytes, home=homes.get(b.id, "device"))
        for b in blocks
    )
    addresses: list[Address] = []
    stays: list[Residence] = []
    top = 0
    for block in blocks:
        if block.id not in homes:
            addresses.append(Address(item=block.id, arena=0, offset_bytes=top, size_bytes=block.size_bytes))
            stays.append(_always(len(stays), block.id, 0, problem.length))
            top += sizes[block.id]
    for slot in arrangement.slots:
        for moving in slot:
            addresses.append(Address(item=moving, arena=0, offset_bytes=top, size_bytes=problem.size(moving)))
        top += max(sizes[moving] for moving in slot)
    saves = problem.saves
    device_bytes = top + saves.device_bytes
    arenas = [Arena(id=0, tier="device", segments=(Segment(offset_bytes=0, size_bytes=device_bytes),))]
    on_host = sorted(held for held, tier in homes.items() if tier == "host")
    host_top = 0
    for held in on_host:
        addresses.append(Address(item=held, arena=1, offset_bytes=host_top, size_bytes=problem.size(held)))
        stays.append(_always(len(stays), held, 1, problem.length))
        host_top += sizes[held]
    addresses += addresses_of(saves, len(items), top, host_top)
    if host_top + saves.host_bytes:
        segment = Segment(offset_bytes=0, size_bytes=host_top + saves.host_bytes)
        arenas.append(Arena(id=1, tier="host", segments=(segment,)))
    made, back = residences_of(saves, len(items), len(stays))
    stays += made
    loads = [*(_loaded(problem, stay, channel_of(homes[stay.block])) for stay in stays_of(problem, arrangement)), *back]
    orders: dict[Channel, int] = {}
    for load in sorted(loads, key=lambda load: load.first_use):  # stable: weights come before what shares their access
        assert load.channel is not None
        stays.append(replace(load, id=len(stays), order=orders.get(load.channel, 0)))
        orders[load.channel] = orders.get(load.channel, 0) + 1
    return Layout(
        items=(*items, *items_of(saves, len(items))),
        arenas=tuple(arenas),
        addresses=tuple(addresses),
        residences=tuple(stays),
    )


def _loaded(problem: Problem, stay: Stay, channel: Channel) -> Residence:
    """Return a stay as the plan has it; its ``id`` and ``order`` are not known yet."""
    return Residence(
        id=-1,
        item=stay.block,
        arena=0,
        begins="load",
        source="staging" if channel == "disk" and problem.table.device == "cuda" else "home",
        channel=channel,
        order=-1,
        load_after=stay.load_after,
        first_use=stay.first_use,
        last_use=stay.last_use,
        ends="drop",
    )


def _always(index: int, item: int, arena: int, length: int) -> Residence:
    return Residence(
        id=index,
        item=item,
        arena=arena,
        begins="always",
        source="",
        channel=None,
        order=-1,
        load_after=-1,
        first_use=0,
        last_use=length - 1,
        ends="drop",
    )
