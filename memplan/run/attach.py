"""Putting a plan to work on a model, and taking it away again. All or nothing, in both directions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import nn

from memplan import offload, recompute
from memplan.analyze.graph import Block
from memplan.cache import BlockCache
from memplan.errors import CheckpointError, ModelError, PlanMismatchError
from memplan.program.check import require
from memplan.program.schema import Channel, Plan
from memplan.run.arena import dtype_of, view
from memplan.run.checked import CheckedReads
from memplan.run.clocks import ClockedTransfers
from memplan.run.conductor import Conductor, Streamed
from memplan.run.disk import Extent
from memplan.run.guard import Guard
from memplan.run.handle import Handle, Parts, handle_of
from memplan.run.home import Checkpoint, Home, Weights
from memplan.run.interrupts import Undo, held_back
from memplan.run.matching import match_weights, require_supported, stored_tensors, trigger_modules
from memplan.run.offloads import Offloaded, offloaded_activations
from memplan.run.sequence import offload_key
from memplan.run.transfer import CpuTransfers, CudaTransfers, DiskSource, HostSource, Source, Transfers
from memplan.triggers import Triggers
from memplan.weights import frozen_weights, keep_layout, plain_parts, small_tensors


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    checked: bool = False,
    cache: str | Path | None = None,
    verify: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Handle:
    """Put every frozen block of ``model`` in its home and stream it as ``plan`` says.

    ``checkpoint``: folder of safetensors that blocks homed on disk are read from where it holds the very bytes of the
    model (default: where the model says it came from), or its tensors by name; else they are packed into files under ``cache``, once, which
    needs ``disk`` in the plan's budgets. ``verify``: compare each packed file's checksum when it is first read (a
    checkpoint's own files have none: of those size and date are watched, always). ``progress`` is
    told the bytes of each block that has come home. ``checked``: poison each slot before it is loaded, check every saved weight at its
    use in backward, and the order of every load and read by vector clocks; slower, for tests and new kinds of models.

    Raises PlanCheckError, PlanMismatchError, ModelError, CheckpointError; the model then is as it was.
    """
    require(plan)
    device = torch.device(plan.table.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise PlanMismatchError(
            f"the plan was made for the CUDA device of {plan.hardware!r}, and torch sees none here: "
            "make a plan with hardware='auto'"
        )
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    require_supported(plan)
    if handle_of(model) is not None:
        raise ModelError("the model is under a plan already: detach() that one first")
    weights = match_weights(model, plan)
    triggers = trigger_modules(model, plan)
    stored = stored_tensors(model, checkpoint)
    with Undo() as undo:
        parts = Parts(plan, device, weights)
        undo.callback(parts.reader.close)
        _settle(model, plan, parts, stored, undo, _cache(cache), verify, progress)
        transfers: Transfers = (
            CudaTransfers(device, poisoned=checked) if device.type == "cuda" else CpuTransfers(poisoned=checked)
        )
        undo.callback(transfers.close)
        if checked:
            transfers = ClockedTransfers(transfers, _names(plan))
        offloaded = offloaded_activations(plan, triggers, parts.arena, parts.host)
        _rivals([*parts.streamed.values(), *offloaded.values()])
        parts.conductor = Conductor(plan, parts.streamed, transfers, offloaded, parts.arena.bytes)
        undo.callback(parts.conductor.close)
        with held_back():
            guards = _install(model, plan, parts, triggers, undo, transfers)
            parts.conductor.begin()
            handle = Handle(model, plan, parts)
            for guard in guards:
                guard.handle = handle
        handle.undo = undo.pop_all()
    return handle


def _install(
    model: nn.Module,
    plan: Plan,
    parts: Parts,
    triggers: Mapping[str, nn.Module],
    undo: ExitStack,
    transfers: Transfers,
) -> list[Guard]:
    """Hook the model's modules, and note how to unhook them."""
    if isinstance(transfers, ClockedTransfers):
        parts.checked = CheckedReads(parts.arena, parts.streamed, parts.conductor, transfers)
        undo.callback(parts.checked.remove)
        _check_reads(model, triggers, plan, parts)
    for module in model.modules():
        undone = keep_layout(module)
        if undone is not None:
            undo.callback(undone)
    for policy in plan.activations:
        if policy.activations == "recompute":
            undo.callback(recompute.wrap(triggers[policy.module]))
    offloads = parts.conductor.offloads
    for held in offloads.by_key.values():
        undo.callback(offload.wrap(triggers[held.module], held.module, offloads.beginning(held.key)))
    hooks = Triggers(triggers, parts.conductor)
    undo.callback(hooks.remove)
    kept = parts.kept()
    guards = []
    for module in model.modules():
        if any(id(weight.tensor) in kept for weight in frozen_weights("", module, deep=True)):
            guards.append(Guard(module, kept))
            undo.callback(guards[-1].remove)
    return guards


def _cache(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    from memplan.hardware import cache_folder

    return cache_folder()


def _settle(
    model: nn.Module,
    plan: Plan,
    parts: Parts,
    stored: Checkpoint,
    undo: ExitStack,
    cache: Path,
    verify: bool,
    progress: Callable[[int], None] | None,
) -> None:
    """Bring each block to its home, one at a time, and note how to give it back."""
    weights, device = parts.weights, parts.device
    origin = Weights(weights, stored, parts.reader)
    arenas = {arena.id: arena.tier for arena in plan.arenas}
    places = {
        (plan.items[a.item].block, arenas[a.arena]): a for a in plan.addresses if plan.items[a.item].kind == "weights"
    }
    homes = {item.block: item.home for item in plan.items if item.kind == "weights"}
    own = {b.id: origin.own_files(b) for b in plan.table.blocks if homes[b.id] == "disk"}
    packed = tuple(b for b in plan.table.blocks if b.id in own and own[b.id] is None)
    if packed and plan.budgets.disk_bytes is None:
        raise CheckpointError(
            f"the block {packed[0].name} has its home on disk, but no checkpoint holds its weights as they are: give "
            'the checkpoint\'s folder, or a disk budget (disk="20GiB") so that they may be written to the cache'
        )
    files = BlockCache(cache)
    if packed:
        files.require_room(sum(block.size_bytes for block in packed))
    for block in plan.table.blocks:
        home, address = homes[block.id], places[block.id, "device"]
        slot = parts.arena.part(address.offset_bytes, block.size_bytes)
        source: Source
        if home == "device":
            origin.fill(block, slot)
            source = HostSource(slot)
        elif home == "host":
            kept = parts.host.part(places[block.id, "host"].offset_bytes, block.size_bytes)
            origin.fill(block, kept)
            source = HostSource(kept)
        else:
            extents, expected = own[block.id], None
            if extents is None:
                extents, expected = _packed(files, plan.model, block, origin)
            parts.reader.open(extent for extent, _ in extents)
            source = DiskSource(extents, parts.reader, block.name, expected if verify else None)
        if progress is not None:
            progress(block.size_bytes)
        with held_back():
            _point(parts, block, Home(block, source, weights), slot, undo)
    small = (held for module in model.modules() for held in small_tensors(module))
    with held_back():
        for held in (*model.parameters(), *model.buffers(), *small):
            for part in plain_parts(held):
                if part.device != device:
                    undo.callback(_move_back, part, part.device)
                    part.data = part.data.to(device)


def _point(parts: Parts, block: Block, home: Home, slot: torch.Tensor, undo: ExitStack) -> None:
    """Have the model's weights lie in their slot, or be away, and note how to give them back."""
    parts.homes[block.id] = home
    undo.callback(home.give_back)
    pointers = []
    for tensor in block.tensors:
        there = view(slot, tensor, home.orders[tensor.name])
        away = parts.placeholders.of(tensor.shape, dtype_of(tensor.dtype))
        pointers += [(pointed, there, away) for pointed in parts.weights[tensor.name].everywhere()]
    if isinstance(home.source, HostSource) and home.source.part is slot:
        for pointed, there, _ in pointers:
            pointed.data = there
        return
    channel: Channel = "h2d" if isinstance(home.source, HostSource) else "disk"
    streamed = Streamed(
        block=block.id, name=block.name, channel=channel, source=home.source, part=slot, pointers=tuple(pointers)
    )
    streamed.unpoint()
    parts.streamed[block.id] = streamed


def _packed(files: BlockCache, model: str, block: Block, origin: Weights) -> tuple[tuple[tuple[Extent, int], ...], str]:
    """Return where a block lies in the cache, written there if need be, and its checksum."""
    path, expected = files.put(
        lambda: origin.layout(block),
        block.size_bytes,
        f"the block {block.name} of {model}",
        twice=origin.is_held(block),
    )
    return ((Extent(path=str(path), file_offset_bytes=0, size_bytes=block.size_bytes), 0),), expected


def _rivals(owners: Sequence[Streamed | Offloaded]) -> None:
    """Note of each what cannot be on the device beside it: what lies on the same bytes."""
    ranges = [(one.part.data_ptr(), one.part.data_ptr() + one.part.numel(), one) for one in owners]
    for begin, end, one in ranges:
        one.rivals = tuple(s.key for b, e, s in ranges if s is not one and b < end and begin < e)


def _names(plan: Plan) -> dict[int, str]:
    """Return what is moved by what the transfers call it."""
    names = {block.id: block.name for block in plan.table.blocks}
    for item in plan.items:
        if item.kind == "saved":
            key = offload_key(plan, item.id)
            names |= {key: f"what {item.module} saved", key + 1: f"what {item.module} saved, to the host"}
    return names


def _move_back(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


def _check_reads(model: nn.Module, triggers: Mapping[str, nn.Module], plan: Plan, parts: Parts) -> None:
    """Wrap every module with streamed weights of its own, and every trigger module."""
    assert parts.checked is not None
    block_of = {id(p): s.block for s in parts.streamed.values() for p, _, _ in s.pointers}
    own = {
        module: {block_of[id(p)] for p in module.parameters(recurse=False) if id(p) in block_of}
        for module in model.modules()
    }
    reads = {module: set(blocks) for module, blocks in own.items()}
    for access in plan.table.accesses:
        if access.module:
            reads[triggers[access.module]].update(b for b in access.blocks if b in parts.streamed)
    for module, blocks in reads.items():
        if blocks:
            parts.checked.wrap(module, frozenset(own[module]), frozenset(blocks))
