"""Arrangements: which blocks leave the device, whence they come back and to which bytes, and the residences that
follow.

A block has one address. It stays there until another that overlaps it is read; so what lies there at a turn-around is
used again, and what overlaps nothing never leaves.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from msgspec.structs import replace

from memplan.device_kinds import is_apart
from memplan.place.layout.elastic import ElasticSegment
from memplan.place.layout.offload import addresses_of, items_of, residences_of
from memplan.place.layout.page_lock import Pageable, pageable_of
from memplan.place.problem import Problem
from memplan.program.schema import Address, Arena, Channel, Item, Residence, Segment, Tier
from memplan.units import align_up

Key = tuple[tuple[tuple[int, int], ...], frozenset[int], frozenset[int], tuple[ElasticSegment, ...]]
"""Addresses, the blocks whose home is the host, and the disk, and the tails."""


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """Where blocks lie that share bytes of the device arena with others. All others lie on the device always."""

    offsets: Mapping[int, int]
    """Of each block that has bytes of the shared region or of a tail behind it, from the region's beginning."""
    homes: Mapping[int, Tier]
    """Home of each block that is not always on the device: host or disk. Of those without an offset only rows are read.
    """
    device_bytes: int
    """Of the device arena: residents and the shared region, which are there all the time."""
    slots_bytes: int
    """Of the shared region."""
    host_bytes: int
    """Of the host arena."""
    disk_bytes: int
    """Of the blocks whose home is the disk."""
    rows_bytes: int
    """Read in a pass from blocks on the host where they lie."""
    tails: tuple[ElasticSegment, ...] = ()
    on_demand: bool = False
    """Each access brings what it reads, once the one before has ended, and nothing stays: as others do it."""

    @cached_property
    def key(self) -> Key:
        """What tells it from others of its problem."""
        tiers: dict[Tier, set[int]] = {"host": set(), "disk": set()}
        for block, tier in self.homes.items():
            tiers[tier].add(block)
        return (tuple(sorted(self.offsets.items())), frozenset(tiers["host"]), frozenset(tiers["disk"]), self.tails)

    def tail_bytes_at(self, access: int) -> int:
        """Bytes of the tails that are there in an access."""
        return sum(tail.size_bytes for tail in self.tails if not tail.is_absent(access))

    @property
    def reads_disk(self) -> bool:
        return bool(self.key[2])


class Stay(NamedTuple):
    """One loaded stay of a block on the device; accesses as in :class:`memplan.program.schema.Residence`."""

    first_use: int
    block: int
    load_after: int
    last_use: int


def arrangement_of(
    problem: Problem,
    offsets: Mapping[int, int],
    homes: Mapping[int, Tier],
    region_bytes: int,
    *,
    tails: tuple[ElasticSegment, ...] = (),
    on_demand: bool = False,
) -> Arrangement:
    """Return the arrangement of blocks in a shared region of the device arena, and in tails behind it. What overlaps
    nothing in the region stays there, unless it is pinned elsewhere.
    """
    alone = _alone(problem, {block: offset for block, offset in offsets.items() if offset < region_bytes})
    homes = {block: tier for block, tier in homes.items() if block not in alone or block in problem.pins}
    on_host = [block for block, tier in homes.items() if tier == "host"]
    reads_rows = set(on_host)
    away = {*offsets, *homes}
    return Arrangement(
        offsets=offsets,
        homes=homes,
        device_bytes=sum(problem.sizes_bytes) - problem.room(away) + region_bytes,
        slots_bytes=region_bytes,
        host_bytes=problem.room(on_host),
        disk_bytes=sum([problem.size(block) for block, tier in homes.items() if tier == "disk"]),
        rows_bytes=sum([size for block, size in problem.rows if block in reads_rows]),
        tails=tails,
        on_demand=on_demand,
    )


def _alone(problem: Problem, offsets: Mapping[int, int]) -> set[int]:
    """Return the blocks that overlap no other."""
    placed = sorted((offset, block) for block, offset in offsets.items())
    found: set[int] = set()
    reached, last = 0, -1
    for offset, block in placed:
        if offset >= reached:
            found.add(block)
        else:
            found.discard(last)
        if offset + problem.sizes_bytes[block] > reached:
            reached, last = offset + problem.sizes_bytes[block], block
    return found


def channel_of(tier: Tier) -> Channel:
    """Return the channel over which a block comes from its home."""
    return "h2d" if tier == "host" else "disk"


def stays_of(problem: Problem, arrangement: Arrangement) -> list[Stay] | None:
    """Return the loaded stays by first use: the earliest deadline first, which cannot deadlock. None where blocks that
    one access reads overlap.

    A tail's absence is as a rival that reads all its bytes: what lies there has left before, and comes back after its
    end. Three passes are replayed on the bytes: in the first each block takes its own, the second is what comes again
    and again, the third shows how long its last stays last.
    """
    offsets, homes, length = arrangement.offsets, arrangement.homes, problem.length
    moving = [block for block in homes if block in offsets]
    spans = {b: (offsets[b], offsets[b] + problem.sizes_bytes[b]) for b in moving}
    overlapping = {-2 - turn: tail for turn, tail in enumerate(arrangement.tails)}
    spans |= {key: (tail.offset_bytes, tail.offset_bytes + tail.size_bytes) for key, tail in overlapping.items()}
    number = {edge: index for index, edge in enumerate(sorted({edge for span in spans.values() for edge in span}))}
    parts = {key: range(number[begin], number[end]) for key, (begin, end) in spans.items()}
    uses = sorted([(index, block) for block in moving for index in problem.needs(block, homes[block])])
    if arrangement.on_demand:
        return [Stay(index, block, index - 1, index) for index, block in uses]
    # The last access of a stretch is enough: nothing in a tail is read within one.
    uses = sorted([*uses, *((last, key) for key, tail in overlapping.items() for _, last in tail.absent)])
    owners = [-1] * len(number)
    lasts = [-1] * len(number)
    stays: list[Stay] = []
    open_stays: dict[int, int] = {}
    for turn in range(3):
        for index, block in uses:
            now = turn * length + index
            load_after = -1
            held = True
            for part in parts[block]:
                if owners[part] != block:
                    held = False
                    load_after = max(load_after, lasts[part])
                    owners[part] = block
                lasts[part] = now
            if load_after == now:
                return None
            if block < 0:
                continue
            if held:
                if block in open_stays:
                    stay = stays[open_stays[block]]
                    stays[open_stays[block]] = stay._replace(last_use=now - length)
            elif turn == 1:
                open_stays[block] = len(stays)
                stays.append(Stay(index, block, load_after - length, index))
            else:
                open_stays.pop(block, None)
    seen = {stay.block for stay in stays}
    for block in moving:
        if block not in seen:  # pinned to the host or the disk, alone: it leaves at the end of each pass
            its = problem.needs(block, homes[block])
            stays.append(Stay(its[0], block, its[-1] - length, its[-1]))
    stays.sort()
    return stays


# ---- what it says ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """An arrangement written out as the plan has it."""

    items: tuple[Item, ...]
    arenas: tuple[Arena, ...]
    addresses: tuple[Address, ...]
    residences: tuple[Residence, ...]
    pageable: frozenset[int]
    """Items whose bytes pass through RAM that is not page-locked."""


def lay_out(problem: Problem, arrangement: Arrangement) -> Layout:
    """Return items, arenas, addresses and residences of an arrangement. Item ids are block ids."""
    blocks, sizes = problem.table.blocks, problem.sizes_bytes
    homes, offsets = arrangement.homes, arrangement.offsets
    items = tuple(
        Item(id=b.id, kind="weights", block=b.id, size_bytes=b.size_bytes, home=homes.get(b.id, "device"))
        for b in blocks
    )
    addresses: list[Address] = []
    stays: list[Residence] = []
    top = 0
    for block in blocks:
        if block.id not in homes:
            stays.append(_always(len(stays), block.id, 0, problem.length))
            if block.id not in offsets:
                addresses.append(Address(item=block.id, arena=0, offset_bytes=top, size_bytes=block.size_bytes))
                top += sizes[block.id]
    saves = problem.saves
    region = arrangement.slots_bytes
    for moving, offset in offsets.items():
        begin = top + offset + (saves.device_bytes if offset >= region else 0)  # the tails are behind all else
        addresses.append(Address(item=moving, arena=0, offset_bytes=begin, size_bytes=problem.size(moving)))
    behind = top + saves.device_bytes
    segments = [Segment(offset_bytes=0, size_bytes=behind + region)]
    segments += [
        Segment(offset_bytes=behind + tail.offset_bytes, size_bytes=tail.size_bytes, absent=tail.absent)
        for tail in arrangement.tails
    ]
    top += region
    arenas = [Arena(id=0, tier="device", segments=tuple(segments))]
    moved = stays_of(problem, arrangement)
    assert moved is not None
    slow = pageable_of(problem, homes, offsets, [stay.block for stay in moved])
    on_host, pageable = _on_host(problem, homes, slow)
    arena_of: dict[int, int] = {}
    for is_pageable in (False, True):
        host_top = 0
        for held, size_bytes in on_host.items():
            if (held in pageable) == is_pageable:
                arena_of[held] = len(arenas)
                addresses.append(Address(item=held, arena=len(arenas), offset_bytes=host_top, size_bytes=size_bytes))
                host_top += align_up(size_bytes)
        if host_top:
            segment = Segment(offset_bytes=0, size_bytes=host_top)
            arenas.append(Arena(id=len(arenas), tier="host", segments=(segment,), pageable=is_pageable))
    for held in on_host:
        if held < len(items):
            stays.append(_always(len(stays), held, arena_of[held], problem.length))
    addresses += addresses_of(saves, len(items), top)
    made, back = residences_of(saves, len(items), len(stays), arena_of)
    stays += made
    loads = [*(_loaded(problem, stay, channel_of(homes[stay.block])) for stay in moved), *back]
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
        pageable=frozenset(pageable),
    )


def _on_host(problem: Problem, homes: Mapping[int, Tier], slow: Pageable) -> tuple[dict[int, int], set[int]]:
    """Return the bytes of each item that waits on the host, and which items pass through pageable RAM."""
    first = len(problem.table.blocks)
    found = {block: problem.size(block) for block in sorted(homes) if homes[block] == "host"}
    pageable = {*slow.blocks, *(block for block, tier in homes.items() if tier == "disk" and slow.rings)}
    for turn, save in enumerate(problem.saves.items):
        if not save.stays:
            found[first + turn] = save.size_bytes
            if save.module in slow.modules:
                pageable.add(first + turn)
    return found, pageable


def _loaded(problem: Problem, stay: Stay, channel: Channel) -> Residence:
    """Return a stay as the plan has it; its ``id`` and ``order`` are not known yet."""
    return Residence(
        id=-1,
        item=stay.block,
        arena=0,
        begins="load",
        source="staging" if channel == "disk" and is_apart(problem.table.device) else "home",
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
