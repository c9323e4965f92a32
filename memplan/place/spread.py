"""Arrangements: which blocks are streamed through which slots, and the residences that follow from it.

Streamed blocks take the slots in turn, in the order of their first access. A slot is occupied by its blocks in the
order of their accesses; accesses of one block with no other between them are one stay, so that what a slot holds at a
turn-around is used again there. For N equal blocks with room for M that gives 2(N - M) loads a pass, the least there is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product

from memplan.place.problem import Problem, evenly, to_the_ends
from memplan.program.schema import Address, Arena, Channel, Item, Residence, Segment, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrangement:
    """Streamed blocks by slot; all others lie on the device always."""

    slots: tuple[tuple[int, ...], ...]
    homes: Mapping[int, Tier]
    """Home of each streamed block: host or disk."""
    device_bytes: int
    """Of the device arena: residents and slots."""
    slots_bytes: int
    host_bytes: int
    disk_bytes: int


def arrangements(problem: Problem) -> Iterator[Arrangement]:
    """Yield every arrangement tried: subsets of the special blocks × counts of streamed layers × one or two slots.

    Those whose homes the ``ram`` and ``disk`` budgets cannot hold are left out.
    """
    first = {block: a.index for a in reversed(problem.table.accesses) for block in a.blocks}
    seen: set[tuple[tuple[int, ...], ...]] = set()
    for mask in range(1 << len(problem.specials)):
        special = tuple(block for bit, block in enumerate(problem.specials) if mask >> bit & 1)
        for count in range(len(problem.stack) + 1):
            for spread, slots in product((to_the_ends, evenly), (2, 1)):
                layers = tuple(problem.stack[index] for index in spread(count, len(problem.stack))) if count else ()
                streamed = sorted({*layers, *special, *problem.forced}, key=lambda block: first[block])
                taken = tuple(tuple(streamed[turn::slots]) for turn in range(slots))
                # A block alone in a slot never leaves it: it is resident, unless it is pinned elsewhere.
                kept = tuple(s for s in taken if len(s) > 1 or any(block in problem.pins for block in s))
                if kept in seen:
                    continue
                seen.add(kept)
                found = _arrange(problem, kept)
                if found is not None:
                    yield found


def _arrange(problem: Problem, slots: tuple[tuple[int, ...], ...]) -> Arrangement | None:
    streamed = tuple(block for slot in slots for block in slot)
    homes = _homes(problem, streamed)
    if homes is None:
        return None
    slots_bytes = sum(max(problem.size(block) for block in slot) for slot in slots)
    moving = set(streamed)
    residents = sum(block.size_bytes for block in problem.table.blocks if block.id not in moving)
    return Arrangement(
        slots=slots,
        homes=homes,
        device_bytes=residents + slots_bytes,
        slots_bytes=slots_bytes,
        host_bytes=sum(problem.size(block) for block in streamed if homes[block] == "host"),
        disk_bytes=sum(problem.size(block) for block in streamed if homes[block] == "disk"),
    )


def _homes(problem: Problem, streamed: tuple[int, ...]) -> dict[int, Tier] | None:
    """Return a home for each streamed block: RAM while it lasts, the disk for the rest, spread evenly among them."""
    first = {block: a.index for a in reversed(problem.table.accesses) for block in a.blocks}
    order = sorted(streamed, key=lambda block: first[block])
    free = [block for block in order if block not in problem.pins]
    pinned: dict[int, Tier] = {block: problem.pins[block] for block in order if block in problem.pins}
    pinned_host = sum(problem.size(block) for block, tier in pinned.items() if tier == "host")
    for count in range(len(free) + 1):
        disk = {free[index] for index in evenly(count, len(free))} if count else set()
        on_disk = sum(problem.size(block) for block in disk)
        on_disk += sum(problem.size(block) for block, tier in pinned.items() if tier == "disk")
        on_host = pinned_host + sum(problem.size(block) for block in free if block not in disk)
        if on_host + (problem.staging_bytes if on_disk else 0) <= problem.budgets.ram_bytes:
            if problem.budgets.disk_bytes is not None and on_disk > problem.budgets.disk_bytes:
                return None
            return {**{block: "disk" if block in disk else "host" for block in free}, **pinned}
    return None


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
    blocks = problem.table.blocks
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
            top += block.size_bytes
    for slot in arrangement.slots:
        for moving in slot:
            addresses.append(Address(item=moving, arena=0, offset_bytes=top, size_bytes=problem.size(moving)))
        top += max(problem.size(moving) for moving in slot)
    arenas = [Arena(id=0, tier="device", segments=(Segment(offset_bytes=0, size_bytes=top),))]
    on_host = sorted(held for held, tier in homes.items() if tier == "host")
    if on_host:
        top = 0
        for held in on_host:
            addresses.append(Address(item=held, arena=1, offset_bytes=top, size_bytes=problem.size(held)))
            stays.append(_always(len(stays), held, 1, problem.length))
            top += problem.size(held)
        arenas.append(Arena(id=1, tier="host", segments=(Segment(offset_bytes=0, size_bytes=top),)))
    runs = [pair for slot in arrangement.slots for pair in _runs(problem, slot)]
    runs.sort(key=lambda pair: pair[1][1])  # by first use: the earliest deadline first
    orders: dict[Channel, int] = {}
    for moved, (load_after, first_use, last_use) in runs:
        channel: Channel = "h2d" if homes[moved] == "host" else "disk"
        stays.append(
            Residence(
                id=len(stays),
                item=moved,
                arena=0,
                begins="load",
                source="staging" if channel == "disk" and problem.table.device == "cuda" else "home",
                channel=channel,
                order=orders.get(channel, 0),
                load_after=load_after,
                first_use=first_use,
                last_use=last_use,
                ends="drop",
            )
        )
        orders[channel] = orders.get(channel, 0) + 1
    return Layout(items=items, arenas=tuple(arenas), addresses=tuple(addresses), residences=tuple(stays))


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


def _runs(problem: Problem, slot: tuple[int, ...]) -> Iterator[tuple[int, tuple[int, int, int]]]:
    """Yield the stays of a slot's blocks on the cycle: block, (load_after, first_use, last_use)."""
    length = problem.length
    members = set(slot)
    uses = [(a.index, block) for a in problem.table.accesses for block in a.blocks if block in members]
    if len(members) == 1:  # pinned to the host or the disk, alone: it leaves at the end of each pass
        yield slot[0], (uses[-1][0] - length, uses[0][0], uses[-1][0])
        return
    begin = next(i for i in range(len(uses)) if uses[i][1] != uses[i - 1][1])
    turned = uses[begin:] + [(index + length, block) for index, block in uses[:begin]]
    runs: list[tuple[int, int, int]] = []
    for index, block in turned:
        if runs and runs[-1][0] == block:
            runs[-1] = (block, runs[-1][1], index)
        else:
            runs.append((block, index, index))
    before = runs[-1][2] - length
    for block, first_use, last_use in runs:
        shift = length if first_use >= length else 0
        yield block, (before - shift, first_use - shift, last_use - shift)
        before = last_use
