"""Putting a plan to work on a model, and taking it away again. All or nothing, in both directions."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from weakref import WeakKeyDictionary

import torch
from torch import nn

from memplan import recompute
from memplan.analyze.graph import Block
from memplan.checkpoint import StoredTensor, has_checkpoint, read_checkpoint
from memplan.errors import CheckpointError, ModelError, PlanMismatchError
from memplan.names import canonical
from memplan.program.check import require
from memplan.program.record import RunRecord
from memplan.program.schema import STAGING_BYTES, Channel, Plan
from memplan.run.arena import Arena, Placeholders, dtype_of, view
from memplan.run.checked import CheckedReads
from memplan.run.conductor import Conductor, Streamed
from memplan.run.disk import DiskReader
from memplan.run.guard import Guard
from memplan.run.home import BlockFiles, Weights, is_away, restore
from memplan.run.transfer import CpuTransfers, CudaTransfers, DiskSource, HostSource, Source, Transfers
from memplan.storages import StorageLedger
from memplan.triggers import Triggers
from memplan.units import format_bytes

_HANDLES: WeakKeyDictionary[nn.Module, Handle] = WeakKeyDictionary()


def handle_of(model: nn.Module) -> Handle | None:
    """Return the handle of a model that is attached, whole or in part, or None."""
    for module in model.modules():
        if module in _HANDLES:
            return _HANDLES[module]
    return None


class Handle:
    """A model under a plan. ``detach`` gives it back; so does leaving the ``with`` block."""

    def __init__(self, model: nn.Module, plan: Plan, parts: _Parts, undo: ExitStack) -> None:
        self.model = model
        self.plan = plan
        self._parts = parts
        self._undo = undo
        self._vram_peak_bytes = 0
        self._detached = False

    @property
    def record(self) -> RunRecord:
        """What was measured so far. ``vram_peak_bytes`` on the CPU is that of the steps inside ``watch_memory``."""
        parts = self._parts
        peak = self._vram_peak_bytes
        if parts.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(parts.device)
        return parts.conductor.record(vram_peak_bytes=peak, ram_peak_bytes=parts.host_bytes)

    @property
    def checked_reads(self) -> int:
        """Saved weights that the checked mode looked at again; 0 outside it."""
        return self._parts.checked.checked if self._parts.checked else 0

    @contextlib.contextmanager
    def watch_memory(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Count live device bytes in the steps inside (CPU: slower there by a Python call an operator).

        The state of ``optimizer`` that exists already counts too.
        """
        if self._parts.device.type == "cuda":
            yield
            return
        ledger = StorageLedger()
        ledger.add(self._parts.arena.bytes)
        for tensor in (*self.model.parameters(), *self.model.buffers()):
            ledger.add(tensor)
            if tensor.grad is not None:
                ledger.add(tensor.grad)
        for state in optimizer.state.values() if optimizer is not None else ():
            for value in state.values():
                if isinstance(value, torch.Tensor):
                    ledger.add(value)
        with ledger:
            yield
        self._vram_peak_bytes = max(self._vram_peak_bytes, ledger.peak_bytes)

    @contextlib.contextmanager
    def materialise(self) -> Iterator[nn.Module]:
        """Have every weight readable inside: real tensors in RAM beside the homes. On exit they are away again."""
        parts = self._parts
        if self._detached:
            yield self.model
            return
        parts.conductor.quiesce()
        where = torch.device("cpu")
        try:
            for streamed in parts.streamed.values():
                held = _bytes_of(streamed.source, streamed.part.numel())
                for tensor in self.plan.table.blocks[streamed.block].tensors:
                    value = view(held, tensor)
                    parts.parameters[tensor.name].data = value.to(where)
            yield self.model
        finally:
            for streamed in parts.streamed.values():
                if parts.conductor.is_there(streamed.block):
                    streamed.point()
                else:
                    streamed.unpoint()

    def detach(self) -> nn.Module:
        """Give the model back as it was: the same parameters with their weights, no hooks. Return it."""
        if not self._detached:
            self._detached = True
            self._undo.close()
        return self.model

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


class _Parts:
    """What a handle holds."""

    def __init__(self, plan: Plan, device: torch.device, parameters: Mapping[str, nn.Parameter]) -> None:
        self.device = device
        self.parameters = parameters
        sizes = {tier: sum(a.size_bytes for a in plan.arenas if a.tier == tier) for tier in ("device", "host")}
        self.arena = Arena(sizes["device"], device)
        self.host = Arena(sizes["host"], torch.device("cpu"), pinned=device.type == "cuda")
        on_disk = any(item.home == "disk" for item in plan.items)
        self.host_bytes = sizes["host"] + (STAGING_BYTES if on_disk else 0)
        self.reader = DiskReader()
        self.placeholders = Placeholders(device)
        self.streamed: dict[int, Streamed] = {}
        self.conductor: Conductor
        self.checked: CheckedReads | None = None


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    checkpoint: str | Path | None = None,
    checked: bool = False,
    cache: str | Path | None = None,
) -> Handle:
    """Put every frozen block of ``model`` in its home and stream it as ``plan`` says.

    ``checkpoint``: folder of safetensors that blocks homed on disk are read from where it holds the very bytes of the
    model (default: where the model says it came from); else they are packed into files under ``cache``, which needs
    ``disk`` in the plan's budgets. ``checked``: poison each slot before it is loaded and check every saved weight at
    its use in backward; slower, for tests and for trying a new kind of model.

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
    _supported(plan)
    parameters = _match(model, plan)
    triggers = _trigger_modules(model, plan)
    stored = _stored(model, checkpoint)
    with ExitStack() as undo:
        parts = _Parts(plan, device, parameters)
        undo.callback(parts.reader.close)
        _settle(model, plan, parts, stored, undo, _cache(cache))
        transfers: Transfers = (
            CudaTransfers(device, poisoned=checked) if device.type == "cuda" else CpuTransfers(poisoned=checked)
        )
        parts.conductor = Conductor(plan, parts.streamed, transfers)
        undo.callback(parts.conductor.close)
        if checked:
            parts.checked = CheckedReads(parts.arena, parts.streamed, parts.conductor)
            undo.callback(parts.checked.remove)
            _check_reads(model, triggers, plan, parts)
        for policy in plan.activations:
            if policy.activations == "recompute":
                undo.callback(recompute.wrap(triggers[policy.module]))
        hooks = Triggers(triggers, parts.conductor)
        undo.callback(hooks.remove)
        managed = frozenset(id(p) for b in plan.table.blocks for t in b.tensors for p in (parameters[t.name],))
        for module in model.modules():
            if any(id(parameter) in managed for parameter in module.parameters()):
                undo.callback(Guard(module, managed).remove)
                _HANDLES.pop(module, None)
        handle = Handle(model, plan, parts, undo.pop_all())
    for module in model.modules():
        if "_apply" in module.__dict__:
            _HANDLES[module] = handle
    handle._undo.callback(_forget, model)
    parts.conductor.begin()
    return handle


@contextlib.contextmanager
def materialise(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which all weights of ``model`` are readable: for ``state_dict``, merging, hashing.

    Takes RAM for the streamed blocks while it lasts. A model that is not attached is left alone.
    """
    handle = handle_of(model)
    if handle is None:
        yield model
        return
    with handle.materialise():
        yield model


def _forget(model: nn.Module) -> None:
    for module in model.modules():
        _HANDLES.pop(module, None)


def _supported(plan: Plan) -> None:
    """Refuse what the contract allows and this runtime does not do yet."""
    for stay in plan.residences:
        if stay.begins == "made" or stay.ends == "store" or stay.source.startswith("residence:"):
            raise PlanMismatchError(
                f"residence {stay.id} of the plan (begins {stay.begins}, from {stay.source or 'nowhere'}, ends "
                f"{stay.ends}) is of a kind that this version cannot run: make the plan again with this version"
            )


def _match(model: nn.Module, plan: Plan) -> dict[str, nn.Parameter]:
    """Return the model's parameters by canonical name, having checked that the plan is for this model."""
    if handle_of(model) is not None:
        raise ModelError("the model is under a plan already: detach() that one first")
    for name, module in model.named_modules():
        if hasattr(module, "_hf_hook"):
            raise ModelError(
                f"the module {canonical(name)} is hooked by accelerate (device_map or cpu_offload), which would move "
                "the same weights: load the model without device_map"
            )
    parameters: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        parameters.setdefault(canonical(name), parameter)
    planned = set()
    for block in plan.table.blocks:
        for tensor in block.tensors:
            found = parameters.get(tensor.name)
            if found is None:
                raise PlanMismatchError(
                    f"the plan is for another model ({plan.model}): it places {tensor.name}, which this model lacks; "
                    "make a plan for this model"
                )
            if tuple(found.shape) != tensor.shape or found.dtype != dtype_of(tensor.dtype):
                raise PlanMismatchError(
                    f"the plan is for another model ({plan.model}): it has {tensor.name} as {tensor.dtype} "
                    f"{tensor.shape}, this model as {str(found.dtype).removeprefix('torch.')} {tuple(found.shape)}"
                )
            if found.requires_grad:
                raise PlanMismatchError(f"the plan streams {tensor.name}, which this model trains: make a new plan")
            planned.add(id(found))
    for name, parameter in parameters.items():
        if not parameter.requires_grad and id(parameter) not in planned:
            raise PlanMismatchError(
                f"the model's frozen parameter {name} is not in the plan, which is for {plan.model}: make a new plan"
            )
    trained = {id(p): p.numel() * p.element_size() for p in parameters.values() if p.requires_grad}
    counted = sum(row.size_bytes for row in plan.table.fixed if row.kind == "adapters")
    if sum(trained.values()) > counted:
        raise PlanMismatchError(
            f"the model trains {format_bytes(sum(trained.values()))}, the plan counts {format_bytes(counted)} of "
            "adapters: make a plan with this adapter"
        )
    return parameters


def _trigger_modules(model: nn.Module, plan: Plan) -> dict[str, nn.Module]:
    modules = {canonical(name): module for name, module in model.named_modules()}
    wanted = dict.fromkeys(access.module for access in plan.table.accesses if access.module)
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise PlanMismatchError(f"the plan watches the module {missing[0]}, which this model lacks: make a new plan")
    return {name: modules[name] for name in wanted}


def _stored(model: nn.Module, checkpoint: str | Path | None) -> dict[str, StoredTensor]:
    """Return the tensors of the checkpoint's files by canonical name; empty where there are none."""
    if checkpoint is not None:
        found = read_checkpoint(checkpoint)
    else:
        folder = getattr(getattr(model, "config", None), "_name_or_path", None)
        if folder is None or not has_checkpoint(folder):
            return {}
        found = read_checkpoint(folder)
    stored = {canonical(name): tensor for name, tensor in found.items()}
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(canonical(name))
    for names in aliases.values():  # a tied tensor is stored once, under any of its names
        held = next((stored[name] for name in names if name in stored), None)
        if held is not None:
            stored.update(dict.fromkeys(names, held))
    return stored


def _cache(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    from memplan.hardware import cache_folder

    return cache_folder()


def _settle(
    model: nn.Module,
    plan: Plan,
    parts: _Parts,
    stored: Mapping[str, StoredTensor],
    undo: ExitStack,
    cache: Path,
) -> None:
    """Bring each block to its home, one at a time, and note how to give it back."""
    parameters, device = parts.parameters, parts.device
    weights = Weights(parameters, stored, parts.reader)
    arenas = {arena.id: arena.tier for arena in plan.arenas}
    places = {
        (plan.items[a.item].block, arenas[a.arena]): a for a in plan.addresses if plan.items[a.item].kind == "weights"
    }
    homes = {item.block: item.home for item in plan.items if item.kind == "weights"}
    own = {b.id: weights.own_files(b) for b in plan.table.blocks if homes[b.id] == "disk"}
    packed = tuple(b for b in plan.table.blocks if b.id in own and own[b.id] is None)
    if packed and plan.budgets.disk_bytes is None:
        raise CheckpointError(
            f"the block {packed[0].name} has its home on disk, but no checkpoint holds its weights as they are: give "
            'the checkpoint\'s folder, or a disk budget (disk="20GiB") so that they may be written to the cache'
        )
    files = BlockFiles(cache, packed) if packed else None
    if files is not None:
        undo.callback(files.remove)
    for block in plan.table.blocks:
        home, address = homes[block.id], places[block.id, "device"]
        part = parts.arena.part(address.offset_bytes, block.size_bytes)
        source: Source
        if home == "device":
            weights.fill(block, part)
            source = HostSource(part)
        elif home == "host":
            kept = parts.host.part(places[block.id, "host"].offset_bytes, block.size_bytes)
            weights.fill(block, kept)
            source = HostSource(kept)
        else:
            extents = own[block.id]
            if extents is None:
                assert files is not None
                extents = files.write(block, weights)
            parts.reader.open(extent for extent, _ in extents)
            source = DiskSource(extents, parts.reader, block.name)
        undo.callback(_give_back, block, source, parameters, _originals(block, parameters))
        pointers = tuple(
            (parameters[t.name], view(part, t), parts.placeholders.of(t.shape, dtype_of(t.dtype)))
            for t in block.tensors
        )
        if home == "device":
            for parameter, there_view, _ in pointers:
                parameter.data = there_view
            continue
        channel: Channel = "h2d" if home == "host" else "disk"
        streamed = Streamed(
            block=block.id, name=block.name, channel=channel, source=source, part=part, pointers=pointers
        )
        streamed.unpoint()
        parts.streamed[block.id] = streamed
    _rivals(parts.streamed)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.device != device and tensor.device.type != "meta":
            undo.callback(_move_back, tensor, tensor.device)
            tensor.data = tensor.data.to(device)


def _rivals(streamed: Mapping[int, Streamed]) -> None:
    """Note which streamed blocks cannot be there at once."""
    ranges = [(s.part.data_ptr(), s.part.data_ptr() + s.part.numel(), s) for s in streamed.values()]
    for begin, end, one in ranges:
        one.rivals = tuple(s.block for b, e, s in ranges if s is not one and b < end and begin < e)


def _originals(block: Block, parameters: Mapping[str, nn.Parameter]) -> dict[str, torch.Tensor | torch.device]:
    """Return what each parameter was: its placeholder where it held no weights, else the device that it was on."""
    found: dict[str, torch.Tensor | torch.device] = {}
    for tensor in block.tensors:
        parameter = parameters[tensor.name]
        found[tensor.name] = parameter.data if is_away(parameter) else parameter.device
    return found


def _give_back(
    block: Block,
    source: Source,
    parameters: Mapping[str, nn.Parameter],
    originals: Mapping[str, torch.Tensor | torch.device],
) -> None:
    """Give a block's parameters back what they were."""
    devices = {name: was for name, was in originals.items() if isinstance(was, torch.device)}
    if devices:
        restore(block, _bytes_of(source, block.size_bytes), parameters, devices)
    for name, was in originals.items():
        if isinstance(was, torch.Tensor):
            parameters[name].data = was


def _move_back(tensor: torch.Tensor, device: torch.device) -> None:
    tensor.data = tensor.data.to(device)


def _bytes_of(source: Source, size_bytes: int) -> torch.Tensor:
    """Return a block's layout: where it lies in an arena, or read from disk into RAM."""
    if isinstance(source, HostSource):
        return source.part
    held = torch.empty(size_bytes, dtype=torch.uint8)
    source.read(held.numpy())
    return held


def _check_reads(model: nn.Module, triggers: Mapping[str, nn.Module], plan: Plan, parts: _Parts) -> None:
    """Wrap every module with streamed weights of its own, and every trigger module."""
    assert parts.checked is not None
    block_of = {id(p): s.block for s in parts.streamed.values() for p, _, _ in s.pointers}
    reads: dict[nn.Module, set[int]] = {}
    for module in model.modules():
        own = {block_of[id(p)] for p in module.parameters(recurse=False) if id(p) in block_of}
        if own:
            reads.setdefault(module, set()).update(own)
    for access in plan.table.accesses:
        if access.module:
            blocks = {b for b in access.blocks if b in parts.streamed}
            if blocks:
                reads.setdefault(triggers[access.module], set()).update(blocks)
    for module, found in reads.items():
        parts.checked.wrap(module, frozenset(found))
