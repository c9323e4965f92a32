"""Hooking a model to what it runs on: triggers, wrapped forwards, guards; and the conductor behind them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from memplan.analyze.graph import Tensor
from memplan.hooks import offload, recompute
from memplan.hooks.chunked_loss import chunk_loss
from memplan.hooks.compiled import hides_hooks, is_compiled, watch_captures
from memplan.hooks.late_hooks import Calls, LateHooks
from memplan.hooks.same_again import SameAgain, Turns
from memplan.hooks.taps import Taps
from memplan.hooks.tiled_heads import serve_tiles
from memplan.hooks.triggers import Triggers, Watcher
from memplan.model.weights import frozen_weights, is_quantized, keep_layout
from memplan.program.page_lock import is_ring_locked
from memplan.program.schema import Plan
from memplan.run.access.direct_access import DirectAccess
from memplan.run.access.entrances import Entrances, refuse_entrance
from memplan.run.handle import Handle
from memplan.run.lanes.accumulate import Accumulation
from memplan.run.memory.home import Home
from memplan.run.modules.embedding_rows import look_up_on_host, read_in_place
from memplan.run.modules.encoder_fast_path import hide_hooks, show_first_layer
from memplan.run.modules.guard import Guard
from memplan.run.modules.match_model import recomputed_modules
from memplan.run.modules.offloaded_activations import Offloaded, offloaded_activations
from memplan.run.runtime import Runtime
from memplan.run.schedule.conductor import Conductor
from memplan.run.schedule.sequence import offload_key
from memplan.run.schedule.streamed import Streamed
from memplan.run.tiers import Tiers
from memplan.run.transfer.device import capture_check, is_apart
from memplan.run.transfer.interrupts import Undo
from memplan.run.transfer.streams import StreamTransfers
from memplan.run.transfer.transfer import CpuTransfers, Transfers
from memplan.run.verify.race_check import ClockedTransfers
from memplan.run.verify.saved_tensor_check import CheckedReads
from memplan.run.verify.spans import Spans, TracedWatcher
from memplan.run.verify.unplanned_copies import Copies
from memplan.state import data_writes, optimizer_steps
from memplan.state.setting import Setting


def install(
    model: nn.Module,
    tiers: Tiers,
    triggers: Mapping[str, nn.Module],
    handle: Handle,
    *,
    checked: bool,
    traced: bool,
) -> Runtime:
    """Have ``model`` run on ``tiers``, and return what serves it. On failure nothing is left.

    ``triggers``: the plan's trigger modules by name. ``checked``, ``traced``: as for ``attach``.
    """
    plan, device = tiers.plan, tiers.device
    with Undo() as undo:
        if plan.workload.loss == "chunked":
            undo.callback(chunk_loss(model))  # while its weights are what they are
        spans = Spans(device, _names(plan)) if traced else None
        transfers: Transfers = (
            StreamTransfers(
                device,
                poisoned=checked,
                spans=spans,
                is_ring_locked=is_ring_locked(plan),
                most_waits=2 * (len(plan.table.accesses) + len(plan.items)),
            )
            if is_apart(device)
            else CpuTransfers(poisoned=checked, spans=spans)
        )
        undo.callback(transfers.close)
        clocked = ClockedTransfers(transfers, _names(plan)) if checked else None
        transfers = clocked or transfers
        offloaded = offloaded_activations(plan, triggers, tiers.arena, tiers.host, tiers.rooms)
        _rivals([*tiers.streamed.values(), *offloaded.values()])
        direct = DirectAccess(device, tiers.homes, tiers.streamed, tiers.own_home, tiers.lent)
        _note_recomputed(plan, tiers)
        _note_holders(model, tiers)
        entrances = Entrances(
            _trained(model), {name: _trained(layer) for name, layer in _kept_reads(plan, triggers, tiers).items()}
        )
        conductor = Conductor(plan, tiers.streamed, transfers, offloaded, tiers.arena, direct, entrances)
        undo.callback(conductor.close)
        direct.begin(model, conductor.loader, _compiled_weights(model), _within(plan, triggers))
        runtime = Runtime(
            tiers=tiers,
            conductor=conductor,
            direct=direct,
            checked=CheckedReads(tiers.arena, tiers.streamed, conductor.loader, clocked) if clocked else None,
            copies=None if checked else Copies(plan, triggers, tiers.arena),
            spans=spans,
            accumulation=None,
            undo=Undo(),
        )
        watched, watcher = _hook(model, runtime, triggers, handle, undo)
        if plan.group > 1 and tiers.streamed:
            noted = watcher if isinstance(watcher, TracedWatcher) else None
            accumulation = Accumulation(model, plan, triggers, watched, conductor, device, noted)
            runtime = replace(runtime, accumulation=accumulation)
        conductor.begin()
        runtime.undo.enter_context(undo.pop_all())
    return runtime


def _hook(
    model: nn.Module, runtime: Runtime, triggers: Mapping[str, nn.Module], handle: Handle, undo: Undo
) -> tuple[Triggers, Watcher]:
    """Hook the model's modules, and note how to unhook them. Return what watches, and whom that tells."""
    tiers, plan, device = runtime.tiers, runtime.tiers.plan, runtime.tiers.device
    conductor, checked = runtime.conductor, runtime.checked
    if checked is not None:
        undo.callback(checked.remove)
        _check_reads(checked, model, triggers, tiers)
    for module in model.modules():
        for keeping in (keep_layout, hide_hooks):
            undone = keeping(module)
            if undone is not None:
                undo.callback(undone)
    turns = Turns(tiers.arena.addresses.holds)
    for name, module in recomputed_modules(model, plan).items():
        undo.callback(data_writes.watch(module))
        undo.callback(optimizer_steps.watch(module))
        same = SameAgain(name, turns)
        undo.callback(recompute.wrap(module, _setting_kept(name, module, runtime, same)))
    offloads = conductor.loader.offloads
    for held in offloads.by_key.values():
        undo.callback(offload.wrap(triggers[held.module], held.module, offloads.beginning(held.key)))
    for trigger, blocks in read_in_place(plan).items():
        if any(tiers.is_beyond_the_device(block) for block in blocks):
            for owner in tiers.owners(triggers[trigger], blocks):
                undo.callback(look_up_on_host(owner, device))
    is_capturing = capture_check(device)
    if is_capturing is not None:
        undo.callback(watch_captures(is_capturing))
    watcher: Watcher = conductor if runtime.spans is None else TracedWatcher(conductor, runtime.spans)
    within = _within_triggers(plan, triggers, tiers)
    taps = _taps(within, _kept_reads(plan, triggers, tiers), conductor.entrances)
    for one in taps.values():
        undo.callback(one.forget)
    look = None if runtime.copies is None else runtime.copies.look
    hooks = Triggers(triggers, watcher, within, _around(model, triggers), taps, look)
    undo.callback(hooks.remove)
    undo.callback(serve_tiles(model))
    for module in model.modules():
        undone = show_first_layer(module)  # outside of what watches that layer
        if undone is not None:
            undo.callback(undone)
    kept = _readers(tiers, runtime.direct)
    for module in model.modules():
        if any(id(weight.tensor) in kept for weight in frozen_weights("", module, deep=True)):
            undo.callback(Guard(module, kept, device, runtime.direct, handle).remove)
    return hooks, watcher


def _readers(tiers: Tiers, direct: DirectAccess) -> dict[int, Callable[[], torch.Tensor]]:
    """Return what reads each managed tensor from its home, by the tensor's id: for who may hold it and write to it."""

    def reading(home: Home, row: Tensor) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            value = direct.put_in(tiers.weights[row.name].tensor)
            if value is None:
                value = home.tensor(row)
                direct.written.hand_out(home.block.id, row, value)
            return value

        return read

    return {
        id(tiers.weights[row.name].tensor): reading(home, row)
        for home in tiers.homes.values()
        for row in home.block.tensors
    }


def _around(model: nn.Module, triggers: Mapping[str, nn.Module]) -> list[nn.Module]:
    """Return the modules that call triggers."""
    ids = {id(trigger) for trigger in triggers.values()}
    others = [m for m in model.modules() if id(m) not in ids and not hides_hooks(m)]
    return [m for m in others if any(id(part) in ids for part in m.modules())]


def _kept_reads(plan: Plan, triggers: Mapping[str, nn.Module], tiers: Tiers) -> dict[str, nn.Module]:
    """Return the triggers that read streamed blocks, and are not run again in backward."""
    again = plan.recomputed_triggers()
    reads = {a.module for a in plan.table.accesses if any(block in tiers.streamed for block in a.blocks)} - again
    return {name: trigger for name, trigger in triggers.items() if name in reads}


def _trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def _within_triggers(plan: Plan, triggers: Mapping[str, nn.Module], tiers: Tiers) -> dict[str, list[nn.Module]]:
    """Return the modules of streamed weights within each trigger that must announce a backward, as nothing else may.

    Those are all where the layer is not run again; else those whose functions keep weights of quantizers in ways of
    their own. Of a module that an adapter wraps it is the wrapper: some read the weights and call no module, and warn
    of hooks there.
    """
    streamed = {id(tensor) for one in tiers.streamed.values() for tensor, _, _ in one.pointers}
    kept = _kept_reads(plan, triggers, tiers)
    found: dict[str, list[nn.Module]] = {}
    for name, trigger in triggers.items():
        wrappers = _wrappers(trigger)
        # Of what is compiled nothing comes out but by what it returns, and a hook there would break its graph in two.
        compiled = {part for module in trigger.modules() if is_compiled(module) for part in module.modules()}
        for module in trigger.modules():
            is_read = any(id(parameter) in streamed for parameter in module._parameters.values())
            if not is_read or module in compiled or not (name in kept or _are_quantized([module])):
                continue
            while module in wrappers and not _are_quantized([module]):
                module = wrappers[module]
            if module is not trigger:
                found.setdefault(name, []).append(module)
    return found


def _wrappers(trigger: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return the adapter's module around each module within a trigger that has one."""
    return {base: module for module in trigger.modules() if (base := module._modules.get("base_layer")) is not None}


def _taps(
    within: Mapping[str, list[nn.Module]], kept: Mapping[str, nn.Module], entrances: Entrances
) -> dict[str, Taps]:
    """Return what has those modules watched no more than they must be. Quantizers' functions keep views that nothing
    tells of.
    """
    return {
        name: Taps(kept[name], _wrappers(kept[name]), entrances.layers.get(name, ()), partial(refuse_entrance, name))
        for name, modules in within.items()
        if name in kept and not _are_quantized(part for module in modules for part in module.modules())
    }


def _are_quantized(modules: Iterable[nn.Module]) -> bool:
    return any(p is not None and is_quantized(p) for module in modules for p in module._parameters.values())


def _setting_kept(name: str, module: nn.Module, runtime: Runtime, same: SameAgain) -> recompute.Kept:
    """Return what keeps the setting of a forward that the plan runs once more, and the hooks that came after the
    plan, and looks whether it is the ``same``.
    """
    tiers = runtime.tiers
    parts = f"{name}."
    reads = {
        block
        for access in tiers.plan.table.accesses
        if access.module == name or access.module.startswith(parts)
        for block in access.blocks
    }
    streamed = [tiers.streamed[block] for block in reads if block in tiers.streamed]
    apart = frozenset(id(tensor) for one in tiers.streamed.values() for tensor, _, _ in one.pointers)
    written, loader = runtime.direct.written, runtime.conductor.loader
    setting = Setting(name, module, lambda: sum(written.writes_to(one) for one in streamed), apart)
    hooks = LateHooks(name, module, apart)

    def kept(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[AbstractContextManager[None], recompute.Again]:
        now = setting.now(args, kwargs)
        calls = Calls(now.modules)
        look = same.begin()

        @contextmanager
        def first() -> Iterator[None]:
            with hooks.first(calls), look() if look and not calls.are_late else nullcontext():
                yield
            now.refuse_written()

        @contextmanager
        def again() -> Iterator[None]:
            with now.again(), hooks.again(calls), loader.recomputing(name):
                yield

        return first(), again

    return kept


def _note_recomputed(plan: Plan, tiers: Tiers) -> None:
    """Note which blocks' forwards the plan runs a second time in backward."""
    again = plan.recomputed_triggers()
    for access in plan.table.accesses:
        if access.module in again:
            for block in access.blocks:
                if block in tiers.streamed:
                    tiers.streamed[block].is_recomputed = True


def _within(plan: Plan, triggers: Mapping[str, nn.Module]) -> dict[int, frozenset[int]]:
    """Return the ids of the modules within those whose accesses read each block."""
    found: dict[int, set[int]] = {}
    for access in plan.table.accesses:
        for block in access.blocks if access.module else ():
            found.setdefault(block, set()).update(id(module) for module in triggers[access.module].modules())
    return {block: frozenset(ids) for block, ids in found.items()}


def _compiled_weights(model: nn.Module) -> frozenset[int]:
    """Return the ids of the parameters that torch.compile sees, whose class its guards look at."""
    compiled = (module for module in model.modules() if is_compiled(module))
    return frozenset(id(parameter) for module in compiled for parameter in module.parameters())


def _note_holders(model: nn.Module, tiers: Tiers) -> None:
    """Note where modules hold the weights of streamed blocks that quantizers made: see ``Streamed.holders``."""
    places = {id(tensor): one for one in tiers.streamed.values() for tensor, _, _ in one.pointers}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            one = places.get(id(parameter))
            if one is not None and parameter is not None and is_quantized(parameter):
                one.holders += ((module._parameters, name, parameter),)


def _rivals(owners: Sequence[Streamed | Offloaded]) -> None:
    """Note of each what cannot be on the device beside it: what lies on the same bytes."""
    # Not by address: bytes that are given back have none.
    ranges = [(one.part.untyped_storage()._cdata, one.part.storage_offset(), one) for one in owners]
    for storage, begin, one in ranges:
        end = begin + one.part.numel()
        one.overlapping = tuple(
            other.key
            for s, b, other in ranges
            if other is not one and s == storage and b < end and begin < b + other.part.numel()
        )


def _names(plan: Plan) -> dict[int, str]:
    """Return what is moved by what the transfers call it."""
    names = {block.id: block.name for block in plan.table.blocks}
    for item in plan.items:
        if item.kind == "saved":
            key = offload_key(plan, item.id)
            names |= {key: f"what {item.module} saved", key + 1: f"what {item.module} saved, to the host"}
    return names


def _check_reads(checked: CheckedReads, model: nn.Module, triggers: Mapping[str, nn.Module], tiers: Tiers) -> None:
    """Wrap every module with streamed weights of its own, and every trigger module; a compiled one as a whole."""
    block_of = {id(p): s.block for s in tiers.streamed.values() for p, _, _ in s.pointers}
    compiled = [module for module in model.modules() if is_compiled(module)]
    within = {inner for module in compiled for inner in module.modules() if inner is not module}
    own = {
        module: {block_of[id(p)] for p in module.parameters(recurse=module in compiled) if id(p) in block_of}
        for module in model.modules()
        if module not in within
    }
    in_place = read_in_place(tiers.plan)
    for trigger, rows in in_place.items():
        for module in triggers[trigger].modules():
            if module in own:
                own[module].difference_update(rows)
    reads = {module: set(blocks) for module, blocks in own.items()}
    for access in tiers.plan.table.accesses:
        if access.module:
            here = set(access.blocks) - set(in_place.get(access.module, ()))
            reads[triggers[access.module]].update(b for b in here if b in tiers.streamed)
    for module, blocks in reads.items():
        if blocks:
            checked.wrap(module, frozenset(own[module]), frozenset(blocks))
