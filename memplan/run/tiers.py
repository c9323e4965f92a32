"""Where the bytes of a model under a plan are, and how its blocks come to their homes: at attach, and where the plan
changes.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from memplan.analyze.graph import Block
from memplan.cache import BlockCache
from memplan.errors import CheckpointError, RunError
from memplan.model.weights import Weight, plain_parts, small_tensors
from memplan.program.page_lock import is_state_locked, pageable_items
from memplan.program.schema import STAGING_BYTES, Address, Channel, Plan, Tier
from memplan.ranks.session import Session
from memplan.ranks.shared_reads import shared_reads
from memplan.run.memory.arena import Arena, Placeholders, dtype_of, view
from memplan.run.memory.disk import DiskReader, Extent
from memplan.run.memory.home import Checkpoint, Home, Weights
from memplan.run.memory.prefault import touch_ahead
from memplan.run.memory.shared_arena import shared_arenas
from memplan.run.modules.embedding_rows import as_seen_from, read_in_place
from memplan.run.modules.optimizer_state import OptimizerState, has_room_aside
from memplan.run.schedule.streamed import Streamed
from memplan.run.transfer.device import empty_cache, is_apart, reads
from memplan.run.transfer.interrupts import Undo, defer_sigint
from memplan.run.transfer.transfer import DiskSource, HostSource, Source
from memplan.units import format_bytes

RING_BYTES = STAGING_BYTES // 2
"""What each rank gives of its staging to the ring through which a node's ranks read files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Files:
    """What blocks may be read from, and packed into."""

    stored: Checkpoint
    """The tensors of the model's checkpoint; empty without one."""
    cache: Path
    verify: bool


class Tiers:
    """A model's blocks on the device, in RAM and on disk: the arenas, each block's home, each streamed block's slot."""

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        device: torch.device,
        weights: Mapping[str, Weight],
        files: Files,
        undo: ExitStack,
        *,
        poisoned: bool = False,
        progress: Callable[[int], None] | None = None,
        ranks: Session | None = None,
    ) -> None:
        """Bring every block of ``model`` to its home. ``undo`` gives them back, and what else was begun, where that
        fails as well. ``poisoned``: the device arena is NaN until blocks come. ``progress``: as for ``attach``.
        ``ranks``: with whom one copy a node is shared of what is on the host; each then calls this.

        Raises RunError where an arena cannot be had, CheckpointError where files are not what they must be.
        """
        self.device = device
        self.weights = weights
        self._files = files
        self._poisoned = poisoned
        self._ranks = ranks
        self._shared = {} if ranks is None else shared_arenas(plan, device, ranks)
        """By arena, of what several ranks read in one memory. Activations and what is written to are each rank's."""
        self.host = host_arenas(plan, device, self._shared)
        """By arena. Empty once another plan was taken over: what is on the host then lies where it can."""
        self.lent: dict[int, list[Any]] = {}
        """What direct access has handed out under the plan before, by block."""
        self.rooms: dict[str, torch.Tensor] = {}
        """Where offloaded activations wait on the host, by module."""
        self.plan, self.arena = plan, self._device_arena(plan)
        self.reader = DiskReader()
        undo.callback(self.reader.close)
        if ranks is not None and any(item.home == "disk" for item in plan.items):
            ring = shared_reads(ranks, RING_BYTES)
            if ring is not None:
                self.reader.share(ring, RING_BYTES)
        self.placeholders = Placeholders(device)
        self.homes: dict[int, Home] = {}
        self.own_homes: set[int] = set()
        """Blocks whose home is RAM though the plan has it on disk: they were written to."""
        self.streamed: dict[int, Streamed] = {}
        self.optimizer_state: OptimizerState | None = None
        """Where it waits in RAM between steps."""
        with Undo() as ahead:
            touch_ahead(self._to_be_filled(), ahead)
            self._settle(undo, progress)
        self._take_the_rest(model, undo)
        empty_cache(device)  # of weights that lay there
        if plan.optimizer_state == "host":
            is_locked = is_state_locked(plan.table.state_on_host_bytes, plan.budgets.page_lock_bytes)
            with defer_sigint():
                self.optimizer_state = OptimizerState(
                    model, device, is_pageable=not is_locked, is_sent_aside=has_room_aside(plan)
                )
                undo.callback(self.optimizer_state.close)

    @property
    def host_bytes(self) -> int:
        """What lies in RAM for the plan: every allocation that anything of it is in, and staging."""
        storages = {held.untyped_storage()._cdata: held.untyped_storage().nbytes() for held in self.on_host()}
        on_disk = any(item.home == "disk" for item in self.plan.items)
        return sum(storages.values()) + (STAGING_BYTES if on_disk else 0)

    def on_host(self) -> Iterator[torch.Tensor]:
        """Yield what lies in RAM for the plan."""
        yield from self.rooms.values()
        if self.optimizer_state is not None:
            yield from self.optimizer_state.rooms()
        for block, home in self.homes.items():
            if isinstance(home.source, HostSource) and (self.plan.home_of(block) == "host" or block in self.own_homes):
                yield home.source.part

    def _device_arena(self, plan: Plan) -> Arena:
        """Return the device arena of ``plan``. Raises RunError where it cannot be had."""
        segments = [segment for arena in plan.arenas if arena.tier == "device" for segment in arena.segments]
        size_bytes = sum(segment.size_bytes for segment in segments)
        return Arena(size_bytes, self.device, segments=segments, poisoned=self._poisoned)

    def _places(self, tier: Tier) -> dict[int, Address]:
        """Return where each block lies in the arena of a tier, where it does."""
        arenas = {arena.id for arena in self.plan.arenas if arena.tier == tier}
        held = ((self.plan.items[a.item], a) for a in self.plan.addresses if a.arena in arenas)
        return {item.block: address for item, address in held if item.kind == "weights"}

    def _slots(self) -> dict[int, torch.Tensor]:
        """Return each block's byte range of the device arena, but of those that are only ever read on the host."""
        sizes = {block.id: block.size_bytes for block in self.plan.table.blocks}
        places = self._places("device")
        return {block: self.arena.part(address.offset_bytes, sizes[block]) for block, address in places.items()}

    def is_beyond_the_device(self, block: int) -> bool:
        """Whether a block that is read on the host lies in memory that the device cannot read."""
        source = self.homes[block].source
        return isinstance(source, HostSource) and not reads(self.device, source.part)

    def owners(self, module: nn.Module, blocks: Collection[int]) -> list[nn.Module]:
        """Return what within a module holds parameters of blocks."""
        held = {id(self.weights[t.name].tensor) for block in blocks for t in self.homes[block].block.tensors}
        return [inner for inner in module.modules() if any(id(p) in held for p in inner._parameters.values())]

    def _to_be_filled(self) -> list[torch.Tensor]:
        """Return the byte ranges of the arenas in which blocks have their homes, as ``_settle`` fills them in turn."""
        tiers = {arena.id: arena.tier for arena in self.plan.arenas}
        found: dict[int, torch.Tensor] = {}
        for address in self.plan.addresses:
            item, tier = self.plan.items[address.item], tiers[address.arena]
            arena = self.arena if tier == "device" else self.host.get(address.arena)
            if item.kind == "weights" and item.home == tier:
                if tier == "host" and address.arena in self._shared:
                    if self._fills(item.block):
                        found[item.block] = self._shared[address.arena].filling(address)
                elif arena is not None:
                    found[item.block] = arena.part(address.offset_bytes, address.size_bytes)
        return [found[block.id] for block in self.plan.table.blocks if block.id in found]

    def own_home(self, block: int, *, bounded: bool = True) -> None:
        """Give a block a home of its own in RAM, which may be written to: its home is files, or is someone else's by
        now.

        Raises RunError where no budget has room.
        """
        home, plan = self.homes[block], self.plan
        size_bytes = home.block.size_bytes
        left = plan.budgets.ram_bytes - self.host_bytes
        if bounded and size_bytes > left:
            raise RunError(
                f"a frozen weight of {home.block.name} was written to, whose home is {home.files or 'in use'}, which "
                f"memplan does not write to; a home of its own in RAM takes {format_bytes(size_bytes)}, and "
                f"{format_bytes(max(0, left))} of the ram budget ({format_bytes(plan.budgets.ram_bytes)}) are left: "
                "give more ram, or pin the block to the device"
            )
        home.source = HostSource(_on_host(home, is_apart(self.device)))
        self.own_homes.add(block)
        streamed = self.streamed.get(block)
        if streamed is not None:
            streamed.source = home.source
            if streamed.at_home:
                streamed.at_home = tuple(self._views(home, as_seen_from(self.device, home.source.part)))

    def _settle(self, undo: ExitStack, progress: Callable[[int], None] | None) -> None:
        """Bring each block to its home, in turn, and note how to give it back."""
        plan, weights, files = self.plan, self.weights, self._files
        in_place = _blocks_read_in_place(plan)
        origin = Weights(weights, files.stored, self.reader)
        slots, places = self._slots(), self._places("host")
        homes = {item.block: item.home for item in plan.items if item.kind == "weights"}
        own = {b.id: origin.own_files(b) for b in plan.table.blocks if homes[b.id] == "disk"}
        packed = tuple(b for b in plan.table.blocks if b.id in own and own[b.id] is None)
        if packed and plan.budgets.disk_bytes is None:
            raise CheckpointError(
                f"the block {packed[0].name} has its home on disk, but no checkpoint holds its weights as they are: "
                'give the checkpoint\'s folder, or a disk budget (disk="20GiB") so that they may be written to the '
                "cache"
            )
        cache = BlockCache(files.cache)
        there = self._packed_by_first(packed, cache, origin)
        self._fill_shared(origin, places)
        for block in plan.table.blocks:
            home, slot = homes[block.id], slots.get(block.id)
            source: Source
            if home == "device":
                assert slot is not None
                origin.fill(block, slot)
                source = HostSource(slot)
            elif home == "host":
                at = places[block.id]
                if at.arena in self._shared:
                    source = self._shared[at.arena].source(at)
                else:
                    kept = self.host[at.arena].part(at.offset_bytes, block.size_bytes)
                    origin.fill(block, kept)
                    source = HostSource(kept)
            else:
                extents = own[block.id]
                if extents is None:
                    path, expected = there[block.id]
                    source = self._packed(path, block, expected if files.verify else None)
                else:
                    self.reader.open(extent for extent, _ in extents)
                    source = DiskSource(extents, self.reader, block.name)
            if progress is not None:
                progress(block.size_bytes)
            with defer_sigint():
                kept_home = self.homes[block.id] = Home(block, source, weights)
                undo.callback(kept_home.give_back)
                self._point(kept_home, slot, in_place=block.id in in_place)
        origin.finish()

    def _fill_shared(self, origin: Weights, places: Mapping[int, Address]) -> None:
        """Fill what the ranks of this node share, each its part, while every rank still has its model as it was."""
        if not self._shared:
            return
        assert self._ranks is not None
        with self._ranks.stage("filling shared memory"):
            for block in self.plan.table.blocks:
                at = places.get(block.id)
                if at is not None and at.arena in self._shared and self._fills(block.id):
                    origin.fill(block, self._shared[at.arena].filling(at))
            origin.finish()
        for shared in self._shared.values():
            shared.filled()

    def _fills(self, block: int) -> bool:
        """Whether this rank fills a block of what its node shares."""
        assert self._ranks is not None
        return block % len(self._ranks.node) == self._ranks.place

    def _packed_by_first(
        self, blocks: tuple[Block, ...], cache: BlockCache, origin: Weights
    ) -> dict[int, tuple[Path, str]]:
        """Pack blocks into the cache, where they are not there, on one rank of a node; return their files and
        checksums.
        """
        ranks = self._ranks
        found: dict[int, tuple[Path, str]] = {}

        def pack(blocks: Sequence[Block]) -> None:
            if blocks:
                cache.require_room(sum(block.size_bytes for block in blocks))
            for block in blocks:
                pieces, twice = partial(origin.layout, block), origin.is_held(block)
                found[block.id] = cache.put(pieces, block.size_bytes, _about(self.plan, block), twice=twice)

        with nullcontext() if ranks is None else ranks.telling("packing blocks"):
            if ranks is None or ranks.place == 0:
                pack(blocks)
        if ranks is None:
            return found
        told = {block: (str(path), expected) for block, (path, expected) in found.items()}
        records = ranks.gather("packing blocks", msgspec.json.encode(told))
        of_first = msgspec.json.decode(records[ranks.node[0].rank], type=dict[int, tuple[str, str]])
        found = {block: (Path(path), expected) for block, (path, expected) in of_first.items()}
        pack([block for block in blocks if block.id not in found])  # the first reads them from files that are not here
        return found

    def _take_the_rest(self, model: nn.Module, undo: ExitStack) -> None:
        """Move to the device what no block holds: adapters, buffers, small tensors."""
        managed = {id(self.weights[t.name].tensor) for home in self.homes.values() for t in home.block.tensors}
        small = (held for module in model.modules() for held in small_tensors(module))
        with defer_sigint():
            for held in (*model.parameters(), *model.buffers(), *small):
                for part in plain_parts(held):
                    if part.device != self.device and id(part) not in managed:
                        undo.callback(_move_back, part, part.device)
                        part.data = part.data.to(self.device)

    def change_plan(self, plan: Plan) -> None:
        """Bring each block to its home in another plan. Nothing may be installed.

        What lay on the device waits in RAM while the device arena is made anew; nothing is read or packed that has not
        got another home. Raises RunError where an arena cannot be had, CheckpointError where blocks cannot go to the
        disk; each block then has a home still, and may be given back.
        """
        locked = locked_blocks(plan, self.device)
        for index, home in self.homes.items():
            if index not in self.streamed and self.plan.home_of(index) != "host":
                home.source = HostSource(_on_host(home, index in locked))
                home.lies = None
                for tensor in home.block.tensors:
                    self.weights[tensor.name].bind(self.placeholders.of(tensor.shape, dtype_of(tensor.dtype)))
        self.streamed.clear()
        self.arena = Arena(0, self.device)  # the old one goes before the new one comes
        self.host = {}
        empty_cache(self.device)
        self.plan, self.arena = plan, self._device_arena(plan)
        files, slots = self._files, self._slots()
        in_place = _blocks_read_in_place(plan)
        cache = BlockCache(files.cache)
        for block in plan.table.blocks:
            home, tier = self.homes[block.id], plan.home_of(block.id)
            slot = slots.get(block.id)
            if tier == "device":
                assert slot is not None
                home.copy_to(slot)
                home.source = HostSource(slot)
            elif tier == "host" and isinstance(home.source, DiskSource):
                home.source = HostSource(_on_host(home, block.id in locked))
            elif tier == "disk" and isinstance(home.source, HostSource) and block.id not in self.own_homes:
                if plan.budgets.disk_bytes is None:
                    raise CheckpointError(
                        f"the block {block.name} would have to go to the disk now: give a disk budget, so that it may "
                        "be written to the cache"
                    )
                pieces = partial(iter, [home.source.part.numpy()])
                path, expected = cache.put(pieces, block.size_bytes, _about(plan, block), twice=True)
                home.source = self._packed(path, block, expected if files.verify else None)
            self._point(home, slot, in_place=block.id in in_place)

    def _point(self, home: Home, slot: torch.Tensor | None, *, in_place: bool) -> None:
        """Have the model's weights lie in their slot, or be away; without a slot they lie where their home is.
        ``in_place``: whether rows of them are read there.
        """
        block = home.block
        at_home: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        if in_place:
            assert isinstance(home.source, HostSource)
            at_home = tuple(self._views(home, as_seen_from(self.device, home.source.part)))
        if slot is None or (isinstance(home.source, HostSource) and home.source.part is slot):
            home.lies = home.source.part if isinstance(home.source, HostSource) else slot
            for pointed, there in at_home if slot is None else self._views(home, slot):
                pointed.data = there
            return
        home.lies = None
        pointers = tuple(
            (pointed, there, self.placeholders.of(tuple(pointed.shape), pointed.dtype))
            for pointed, there in self._views(home, slot)
        )
        rows = tuple(tensor for tensor in block.tensors for _ in self.weights[tensor.name].everywhere())
        channel: Channel = "h2d" if isinstance(home.source, HostSource) else "disk"
        streamed = Streamed(
            block=block.id,
            name=block.name,
            channel=channel,
            source=home.source,
            part=slot,
            pointers=pointers,
            rows=rows,
            at_home=at_home,
        )
        streamed.unbind()
        self.streamed[block.id] = streamed

    def _views(self, home: Home, part: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield each tensor of a block's weights, and the view that it is where the block lies in ``part``."""
        for tensor in home.block.tensors:
            there = view(part, tensor, home.strides[tensor.name])
            for pointed in self.weights[tensor.name].everywhere():
                yield pointed, there

    def _packed(self, path: Path, block: Block, expected: str | None) -> DiskSource:
        """Return a block's source in the cache."""
        extent = Extent(path=str(path), file_offset_bytes=0, size_bytes=block.size_bytes)
        self.reader.open([extent])
        return DiskSource(((extent, 0),), self.reader, block.name, expected)


def host_arenas(plan: Plan, device: torch.device, apart: Collection[int] = ()) -> dict[int, Arena]:
    """Return the host arenas of a plan by number: page-locked unless the plan has them pageable, or for the CPU.

    ``apart``: those that there are already.
    """
    return {
        arena.id: Arena(arena.size_bytes, torch.device("cpu"), pinned=is_apart(device) and not arena.pageable)
        for arena in plan.arenas
        if arena.tier == "host" and arena.id not in apart
    }


def locked_blocks(plan: Plan, device: torch.device) -> set[int]:
    """Return the blocks whose home a plan has in page-locked RAM. What lies there under another plan stays as it is."""
    slow = pageable_items(plan)
    on_host = [item for item in plan.items if item.kind == "weights" and item.home == "host"]
    return {item.block for item in on_host if is_apart(device) and item.id not in slow}


def _on_host(home: Home, pinned: bool) -> torch.Tensor:
    """Return a block's bytes in RAM of their own, page-locked where a device may read them."""
    part = Arena(home.block.size_bytes, torch.device("cpu"), pinned=pinned).bytes
    home.copy_to(part)
    return part


def _about(plan: Plan, block: Block) -> str:
    return f"the block {block.name} of {plan.model}"


def _move_back(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


def _blocks_read_in_place(plan: Plan) -> set[int]:
    return {block for blocks in read_in_place(plan).values() for block in blocks}
