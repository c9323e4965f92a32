"""Cases: a model, a batch and a machine, looked at and priced, ready to be placed under any budget."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from memplan.cost.group import grouped, sizes
from memplan.device_kinds import is_apart
from memplan.errors import InputError, ModelError, RunError
from memplan.hardware import machine
from memplan.hardware.budgets import beyond, require_vram
from memplan.hardware.profile import HardwareProfile, load, page_lock_limit_bytes
from memplan.model import models
from memplan.model.checkpoint import has_checkpoint
from memplan.program.arrangements import with_arrangement, without_arrangement
from memplan.program.schema import RING_BYTES, STAGING_BYTES, Budgets, LossKind, Plan, StateHome, Tier, Workload
from memplan.request import TIERS, Request, Sizes, Training
from memplan.units import align_up, format_bytes

if TYPE_CHECKING:
    from torch import nn

    from memplan.analyze.blocks.measure import Times
    from memplan.analyze.graph import Activations, LayerGraph
    from memplan.analyze.graph_cache import Analysis
    from memplan.cost.table import AccessRow, CostTable
    from memplan.place.baselines import Baseline
    from memplan.place.solve import PlanInfo

_KEEP: Activations = "keep"


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What a plan follows from."""

    table: CostTable
    budgets: Budgets
    model: str
    fingerprint: str
    workload: Workload
    hardware: str
    pins: Mapping[int, Tier]
    """By block id."""
    activations: Mapping[str, Activations]
    """Of the modules for which they were asked."""
    staging_bytes: int
    notes: tuple[str, ...]
    elastic: bool | None = None
    """Whether the device arena may give bytes back for part of a pass; None: as :func:`memplan.place.solve.place` has
    it.
    """
    optimizer_state: StateHome | None = None
    """Where the optimizer's state lies between steps; None: as is best, of those that :func:`memplan.place.solve.place`
    tries.
    """
    groups: tuple[int, ...] = (1,)
    """Sizes of groups of micro-batches of which one is chosen, the smallest first."""

    def place(self, *, pieces: bool = True, **budgets: int) -> Plan:
        """Return the plan. ``budgets``: bytes in place of the case's own, such as ``vram_bytes``. Raises
        DoesNotFitError.
        """
        from memplan.place.solve import place

        within = replace(self.budgets, **budgets)
        more = {"pins": self.pins, "pieces": pieces, "elastic": self.elastic, **self._asked()}
        more |= {"optimizer_state": self.optimizer_state, "groups": self.groups}
        return with_arrangement(place(self.table, within, **more, **self._said()))

    def pass_below_s(self, below_s: float) -> float | None:
        """Return the pass in s of the plan, whole blocks alone; None where it does not fit or takes ``below_s`` or
        longer.
        """
        from memplan.place.solve import pass_below_s

        more = {"pins": self.pins, "elastic": self.elastic, **self._asked()}
        return pass_below_s(self.table, self.budgets, below_s, **more)

    def place_as(self, way: Baseline) -> Plan | None:
        """Return what another way of placing comes to (:mod:`memplan.place.baselines`); None where it does not fit."""
        from memplan.place.solve import place_as

        return place_as(way, self._table_of(1), self.budgets, **self._asked(), **self._said())

    def least_vram_bytes(self) -> int | None:
        """Return the least vram for which there is a plan, in bytes; None where RAM and disk are too little for any."""
        from memplan.place.min_vram import least_vram_bytes

        more = {"pins": self.pins, "optimizer_state": self.optimizer_state, **self._asked()}
        return least_vram_bytes(self._table_of(self.groups[0]), self.budgets, **more)

    def _table_of(self, group: int) -> CostTable:
        return grouped(self.table, group, self.workload.accumulation)

    def _asked(self) -> dict[str, Any]:
        return {"activations": self.activations, "staging_bytes": self.staging_bytes}

    def _said(self) -> PlanInfo:
        return {
            "model": self.model,
            "fingerprint": self.fingerprint,
            "workload": self.workload,
            "hardware": self.hardware,
            "notes": self.notes,
        }

    def whole_vram_bytes(self) -> int:
        """Return the vram in bytes that holds all weights and all activations: with more, nothing is faster."""
        kept: dict[str, Activations] = dict.fromkeys(self.table.recomputable, "keep")
        kept |= self.activations
        table = self._table_of(self.groups[0])
        return max(table.device_bytes(kept)) + sum(align_up(block.size_bytes) for block in self.table.blocks)


def again(plan: Plan, vram_bytes: int) -> Plan:
    """Return a plan of the same blocks for another budget of vram, in bytes, in groups that are no larger. Raises
    DoesNotFitError.
    """
    groups = tuple(group for group in sizes(plan.workload.accumulation) if group <= plan.group)
    return dataclasses.replace(case_of_plan(plan), groups=groups).place(pieces=False, vram_bytes=vram_bytes)


def case_of_plan(plan: Plan) -> Case:
    """Return the case that a plan was made of; its blocks are those of the plan."""
    return Case(
        table=plan.table,
        budgets=plan.budgets,
        model=plan.model,
        fingerprint=plan.fingerprint,
        workload=plan.workload,
        hardware=plan.hardware,
        pins=plan.pins,
        activations=plan.asked,
        staging_bytes=_staging_bytes(plan.table.device),
        notes=without_arrangement(plan.notes),
        elastic=plan.elastic,
        optimizer_state=plan.optimizer_state,
        groups=(plan.group,),
    )


def case_of(request: Request) -> Case:
    """Look at the model and the batch of a request, and price them. Raises InputError."""
    from memplan.cost.build import cost_table
    from memplan.cost.build import notes as cost_notes
    from memplan.cost.data_parallel import with_ranks
    from memplan.place.alternatives import state_away

    sizes, training, choices = request.sizes, request.training, request.choices
    profile = profile_of(request.hardware)  # where it has to be measured this takes the longest
    if choices.measure and not machine.is_here(profile):
        raise InputError(
            f"the times are to be measured, but the hardware is {profile.name}, not this machine: leave measure out, "
            "or hardware"
        )
    if sizes.vram_bytes is not None:
        require_vram(profile, sizes.vram_bytes)
    analysis, folder = _analysis(request, profile.device)
    graph = analysis.graph
    lies_in = request.checkpoint or folder
    budgets = _budgets(sizes, profile, lies_in)
    times = _times(request, graph, profile, budgets.vram_bytes) if choices.measure else None
    table = cost_table(graph, profile, times)
    table, rank_notes = with_ranks(table, profile, training.ranks, training.network_bytes_per_s)
    if choices.optimizer_state == "host":
        table = state_away(table, budgets.page_lock_bytes)
    asked = _activations(choices.activations, graph)
    if not choices.offload_where_best:  # a look at one layer is a look at all, but only those named may be offloaded
        table = replace(table, accesses=tuple(_only(asked, row) for row in table.accesses))
    return Case(
        table=table,
        budgets=budgets,
        model=graph.model,
        fingerprint=graph.fingerprint,
        workload=Workload(
            batch=analysis.shapes,
            tokens=graph.tokens,
            accumulation=training.accumulation,
            optimizer=training.optimizer,
            adapter=analysis.adapter,
            steps=training.steps,
            examples=training.examples,
            epochs=training.epochs,
            loss=training.loss_kind,
        ),
        hardware=profile.name,
        pins=_pins(choices.pins, {block.name: block.id for block in graph.blocks}),
        activations=asked,
        staging_bytes=_staging_bytes(table.device),
        notes=(
            *request.notes,
            *graph.notes,
            *cost_notes(graph, profile, times),
            *_loss_notes(training.loss_kind, graph),
            *rank_notes,
            *machine.notes(profile, lies_in),
            *beyond(profile, budgets.vram_bytes, budgets.ram_bytes),
            *_margin(sizes),
        ),
        elastic=choices.elastic,
        optimizer_state=choices.optimizer_state,
        groups=_groups(training, table, asked),
    )


def profile_of(hardware: str | Path | HardwareProfile) -> HardwareProfile:
    """Return the profile that is meant: itself, this machine's for ``"auto"``, or by name or file. Raises
    HardwareError.
    """
    if isinstance(hardware, HardwareProfile):
        return hardware
    if hardware == "auto":
        from memplan.hardware.calibrate.current import current  # opens torch

        return current()
    return load(hardware)


def _margin(sizes: Sizes) -> tuple[str, ...]:
    if not sizes.margin_bytes:
        return ()
    return (
        f"Of the vram {format_bytes(sizes.margin_bytes)} are left free (margin): the budget is what is left. On a GPU "
        "torch may reserve that much beside it, and no more.",
    )


def _loss_notes(kind: LossKind, graph: LayerGraph) -> tuple[str, ...]:
    head = next((block for block in graph.blocks if block.kind == "head"), None)
    if kind == "full" or head is None:
        return ()
    from memplan.hooks.chunked_loss import chunk_tokens

    vocabulary, width = max((tensor.shape for tensor in head.tensors), key=len)
    tokens = chunk_tokens(vocabulary, width, graph.tokens, kind)
    whole, part = (format_bytes(4 * vocabulary * count) for count in (graph.tokens, tokens))
    whose = "memplan's own, whose bits differ from the full loss" if kind == "chunked" else "as Liger's fused loss"
    return (
        f"The loss is computed for {tokens:,} tokens at a time ({whose}): logits in float32 take {part} in place of "
        f"{whole}, and so does each copy of them.",
    )


def vram_of(sizes: Sizes, profile: HardwareProfile) -> int:
    """Return the vram in bytes that was asked for, or that there is, less the margin."""
    vram_bytes = machine.auto_vram_bytes(profile) if sizes.vram_bytes is None else sizes.vram_bytes
    return max(0, vram_bytes - sizes.margin_bytes)


def ram_of(sizes: Sizes, profile: HardwareProfile) -> int:
    """Return the RAM in bytes that was asked for, or that there is."""
    return machine.auto_ram_bytes(profile) if sizes.ram_bytes is None else sizes.ram_bytes


def _budgets(sizes: Sizes, profile: HardwareProfile, lies_in: str | Path | None) -> Budgets:
    """``lies_in``: where the checkpoint is, whose own files cost no disk."""
    disk_bytes, page_lock_bytes = sizes.disk_bytes, sizes.page_lock_bytes
    if disk_bytes is None and not has_checkpoint(lies_in):
        disk_bytes = 0
    if page_lock_bytes is None:
        page_lock_bytes = page_lock_limit_bytes(profile)
    return Budgets(
        vram_bytes=vram_of(sizes, profile),
        ram_bytes=ram_of(sizes, profile),
        disk_bytes=disk_bytes,
        page_lock_bytes=page_lock_bytes,
        margin_bytes=sizes.margin_bytes,
    )


def _analysis(request: Request, device: str) -> tuple[Analysis, Path | None]:
    """Return what is known of a model and a batch on a kind of device, from before where it was kept, and where the
    checkpoint lies.
    """
    from memplan.analyze import graph_cache as kept

    model, batch, loss = request.model, request.batch, request.training.loss
    built, choices = request.build.keywords(), request.choices
    options: dict[str, Any] = {
        **_trained(request),
        "device": device,
        "accumulation": request.training.accumulation,
        "parts": choices.parts,
        "offload": "try" if choices.offload_where_best else "offload" in choices.activations.values(),
    }
    trainer, kind = request.training.trained_by, request.training.loss_kind
    by = {"trainer": trainer, "loss_kind": kind}
    key = None if loss is not None else kept.key_of(model, batch, {**built, **options, **by})
    folder = machine.cache_path() / kept.FOLDER
    if key is not None and (found := kept.recall(folder, key)) is not None:
        return found, models.folder_of(model)

    from memplan.analyze.inputs.prepare import describe, prepare
    from memplan.analyze.inputs.trainer_settings import called_by
    from memplan.analyze.repeat.unroll import NotPeriodicError
    from memplan.analyze.trace.trace import analyze
    from memplan.hooks.chunked_loss import in_chunks
    from memplan.hooks.tiled_heads import tiles_by_kernels

    with _unchanged(request):
        prepared = prepare(model, **built, short_for=batch)
        notes = (*prepared.notes, *_as_quantized(model, prepared.model, request.build.kbit, options["autocast"]))
        options |= {"loss": loss, "name": prepared.name, "short": prepared.short, "notes": notes}

        def look(runs: tuple[Any, ...]) -> LayerGraph:
            called = called_by(trainer, prepared.model, batch)
            with in_chunks(prepared.model, kind), tiles_by_kernels() if is_apart(device) else nullcontext():
                try:
                    return analyze(prepared.model, called, runs=runs, **options)
                except RunError as error:  # of the chunked loss, which says why it cannot be this model's
                    raise ModelError(str(error)) from error

        try:
            graph = look(prepared.runs)
        except (ModelError, NotPeriodicError):
            if not prepared.runs:
                raise
            prepared = prepare(model, **built)
            graph = look(())
        found = kept.Analysis(graph=graph, shapes=prepared.shapes(batch), adapter=describe(prepared.model))
    if key is not None:
        kept.keep(folder, key, found)
    return found, prepared.folder


def _trained(request: Request) -> dict[str, Any]:
    """Return what a trace and a measurement know of the training alike."""
    return {"autocast": request.training.autocast, "optimizer": request.training.optimizer}


def _unchanged(request: Request) -> AbstractContextManager[None]:
    from memplan.state.snapshot import unchanged

    built = {"adapter": request.build.adapter, "quantization": request.build.quantization}
    return unchanged(model=request.model, batch=request.batch, loss=request.training.loss, **built)


def _as_quantized(given: Any, model: nn.Module, kbit: bool, autocast: Any) -> tuple[str, ...]:
    """Return what a plan says of a quantized model that was built here; a module of the caller's is as it is."""
    if callable(getattr(given, "named_parameters", None)):
        return ()
    from memplan.analyze.inputs.autocast import dtype_of_autocast
    from memplan.analyze.inputs.trainer_settings import kbit_notes

    return kbit_notes(model, kbit=kbit, autocast=dtype_of_autocast(autocast))


def _times(request: Request, graph: LayerGraph, profile: HardwareProfile, room_bytes: int) -> Times:
    """Return the times of the graph's accesses on this machine."""
    from memplan.analyze.blocks.measure import measure
    from memplan.analyze.inputs.prepare import prepare
    from memplan.analyze.inputs.trainer_settings import called_by
    from memplan.hooks.chunked_loss import in_chunks

    with _unchanged(request):
        prepared = prepare(request.model, **request.build.keywords(), buffers=True)
        called = called_by(request.training.trained_by, prepared.model, request.batch)
        with in_chunks(prepared.model, request.training.loss_kind):
            return measure(
                prepared.model,
                called,
                graph,
                device=profile.device,
                room_bytes=room_bytes,
                loss=request.training.loss,
                short=prepared.short,
                progress=request.progress,
                **_trained(request),
            )


def _staging_bytes(device: str) -> int:
    """Return the host bytes that the disk is read through."""
    return STAGING_BYTES + (RING_BYTES if is_apart(device) else 0)


def _groups(training: Training, table: CostTable, asked: Mapping[str, Activations]) -> tuple[int, ...]:
    """Return the sizes of groups that can pass. Raises InputError where one was asked for that cannot."""
    groups = training.groups
    if training.loss_kind == "chunked":
        why = "a chunked loss is computed by one micro-batch after the other"
    elif table.turn_around is None:
        why = "the last module of its forward is not the first of its backward"
    elif "offload" in asked.values():
        why = "activations were to be offloaded, and each micro-batch of a group would have its own"
    else:
        return groups
    if groups[0] > 1:
        raise InputError(f"groups of {groups[0]} micro-batches were asked for, but {why}: leave group out")
    return (1,)


def _only(asked: Mapping[str, Activations], row: AccessRow) -> AccessRow:
    return row if not row.offload_bytes or asked.get(row.module) == "offload" else replace(row, offload_bytes=0)


def _activations(wanted: Mapping[str, Activations], graph: LayerGraph) -> dict[str, Activations]:
    """Return what was asked by layer. A layer may be named by its last parts, as a block may.

    Layers that change their own state are kept where nothing else is asked.
    """
    layers, found = graph.recomputable, {layer.module: _KEEP for layer in graph.stateful}
    for name, policy in wanted.items():
        matches = [full for full in layers if not name or full == name or full.endswith("." + name)]
        if len(matches) != 1 and name:
            raise InputError(
                f"activations were given for {name!r}, which names {len(matches)} layers that memplan has a say in: "
                + (f"name one such as {layers[0]}" if layers else "leave it out")
            )
        for layer in graph.stateful:
            if policy == "recompute" and layer.module in matches:
                raise InputError(
                    f"the activations of {layer.module} cannot be recomputed: {layer.reason}, and a recompute would do "
                    f"so "
                    'twice. Leave its activations out, or give "keep" or "offload"'
                )
        found |= dict.fromkeys(matches, policy)
    if "" in wanted and not layers and wanted[""] != "keep":
        told = [note for note in graph.notes if note.startswith("No activations can be")]
        why = told or ["memplan cannot set those of this model: it checkpoints its layers itself, or has no stack."]
        raise InputError(f"all activations were to be {wanted['']}. {' '.join(why)} Leave activations out")
    return found


def _pins(pins: Mapping[str, Tier], blocks: Mapping[str, int]) -> dict[int, Tier]:
    """Return tiers by block id. A block may be named by its last parts: ``layers.3`` for ``model.layers.3``."""
    found: dict[int, Tier] = {}
    for name, tier in pins.items():
        matches = [block for full, block in blocks.items() if full == name or full.endswith("." + name)]
        if len(matches) != 1:
            raise InputError(
                f"the pin {name}={tier} names {len(matches)} blocks: give one block (such as {next(iter(blocks))}) "
                f"and one of {', '.join(TIERS)}"
            )
        found[matches[0]] = tier
    return found
