"""Cases: a model, a batch and a machine, looked at and priced, ready to be placed under any budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace

from memplan import hardware as hardware_profiles
from memplan import models
from memplan.budgets import beyond, require_vram
from memplan.checkpoint import has_checkpoint
from memplan.errors import InputError, ModelError
from memplan.program.schema import RING_BYTES, STAGING_BYTES, Budgets, Plan, StateHome, Tier, Workload
from memplan.requests import understood
from memplan.units import align_up, parse_size

if TYPE_CHECKING:
    from torch import nn

    from memplan.analyze.graph import Activations, LayerGraph
    from memplan.analyze.kept import Analysis
    from memplan.analyze.measure import Times
    from memplan.cost.table import AccessRow, CostTable
    from memplan.hardware import HardwareProfile
    from memplan.place.baselines import Way
    from memplan.place.solve import Said

_TIERS: tuple[Tier, ...] = ("device", "host", "disk")
_STATE_HOMES: tuple[StateHome, ...] = ("device", "host")
_ACTIVATIONS: tuple[Activations, ...] = ("keep", "recompute", "offload")
QLORA = "qlora"  # as memplan.quantization has it, which needs torch
_KEEP: Activations = "keep"
ANY = "any"
"""Activations that may be offloaded too, where that is fastest."""


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
    """Whether the device arena may give bytes back for part of a pass; None: as :func:`memplan.place.solve.place` has it."""
    optimizer_state: StateHome | None = None
    """Where the optimizer's state lies between steps; None: as is best, of those that :func:`memplan.place.solve.place` tries."""

    def place(self, *, pieces: bool = True, **budgets: int) -> Plan:
        """Return the plan. ``budgets``: bytes in place of the case's own, such as ``vram_bytes``. Raises DoesNotFitError."""
        from memplan.place.solve import place

        within = replace(self.budgets, **budgets)
        more = {"pins": self.pins, "pieces": pieces, "elastic": self.elastic, **self._asked()}
        return place(self.table, within, optimizer_state=self.optimizer_state, **more, **self._said())

    def pass_below_s(self, below_s: float) -> float | None:
        """Return the pass in s of the plan, whole blocks alone; None where it does not fit or takes ``below_s`` or longer."""
        from memplan.place.solve import pass_below_s

        more = {"pins": self.pins, "elastic": self.elastic, **self._asked()}
        return pass_below_s(self.table, self.budgets, below_s, **more)

    def place_as(self, way: Way) -> Plan | None:
        """Return what another way of placing comes to (:mod:`memplan.place.baselines`); None where it does not fit."""
        from memplan.place.solve import place_as

        return place_as(way, self.table, self.budgets, **self._asked(), **self._said())

    def least_vram_bytes(self) -> int | None:
        """Return the least vram for which there is a plan, in bytes; None where RAM and disk are too little for any."""
        from memplan.place.least import least_vram_bytes

        more = {"pins": self.pins, "optimizer_state": self.optimizer_state, **self._asked()}
        return least_vram_bytes(self.table, self.budgets, **more)

    def _asked(self) -> dict[str, Any]:
        return {"activations": self.activations, "staging_bytes": self.staging_bytes}

    def _said(self) -> Said:
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
        peak = max(self.table.device_bytes_at(access.index, kept) for access in self.table.accesses)
        return peak + sum(align_up(block.size_bytes) for block in self.table.blocks)


def again(plan: Plan, vram_bytes: int) -> Plan:
    """Return a plan of the same blocks for another budget of vram, in bytes. Raises DoesNotFitError."""
    return case_of_plan(plan).place(pieces=False, vram_bytes=vram_bytes)


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
        notes=plan.notes,
        elastic=plan.elastic,
        optimizer_state=plan.optimizer_state,
    )


def case_of(
    model: Any,
    batch: Any,
    *,
    vram: int | str = "auto",
    ram: int | str | None = None,
    disk: int | str | None = None,
    page_lock: int | str | None = None,
    adapter: Any = None,
    dtype: Any = None,
    attention: str | None = None,
    quantization: Any = None,
    qlora: bool = False,
    kbit: bool | None = None,
    gradient_checkpointing: bool | None = None,
    autocast: str | None = None,
    accumulation: int = 1,
    steps: int | None = None,
    examples: int | None = None,
    epochs: int | None = None,
    optimizer: str | None = None,
    hardware: str | Path | HardwareProfile = "auto",
    pins: Mapping[str, str] | None = None,
    activations: str | Mapping[str, str] | None = None,
    loss: Callable[[Any], Any] | None = None,
    checkpoint: str | Path | None = None,
    measure: bool = False,
    elastic: bool | None = None,
    optimizer_state: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Case:
    """Look at a model and a batch, and price them; the arguments are those of :func:`memplan.plan`. Raises InputError."""
    from memplan.analyze.optimizers import optimizer_name
    from memplan.cost.build import cost_table
    from memplan.cost.build import notes as cost_notes
    from memplan.place.variants import state_away

    if accumulation < 1:
        raise InputError(f"accumulation was given as {accumulation!r}: give a whole number of passes, at least 1")
    if qlora:
        _require_description(model)
        kbit, autocast = kbit is not False, autocast or "bf16"
        optimizer = optimizer or "paged_adamw_8bit"
    optimizer = optimizer or "adamw"
    steps, epochs = _run_of(batch, accumulation, steps=steps, examples=examples, epochs=epochs)
    budgets_given = {
        "vram": None if vram == "auto" else parse_size(vram, "vram"),
        "ram": None if ram is None or ram == "auto" else parse_size(ram, "ram"),
        "disk": None if disk is None else parse_size(disk, "disk"),
        "page_lock": None if page_lock is None else parse_size(page_lock, "page_lock"),
    }
    wanted = _wanted(activations)
    tiers = _tiers(pins)
    optimizer = optimizer_name(optimizer)
    state_home = next((home for home in _STATE_HOMES if home == optimizer_state), None)
    if state_home is None and optimizer_state is not None:
        raise InputError(
            f"the optimizer's state was to lie in {optimizer_state!r} between steps: give one of {', '.join(_STATE_HOMES)}"
        )
    if optimizer.startswith("paged_"):
        if state_home == "host":
            raise InputError(
                f"the state of {optimizer} was to lie on the host between steps, but its pages go there by themselves: leave "
                "optimizer_state out, or use an optimizer that is not paged"
            )
        state_home = "device"
    asked_for = understood(model, dtype=dtype, quantization=quantization, attention=attention, adapter=adapter)
    model, dtype, quantization = asked_for.model, asked_for.dtype, asked_for.quantization
    if qlora:
        dtype, quantization = dtype or "bf16", quantization or QLORA
    described = {
        "adapter": adapter,
        "dtype": dtype,
        "attention": attention,
        "quantization": quantization,
        "kbit": bool(kbit),
        "gradient_checkpointing": gradient_checkpointing,
    }
    profile = _profile(hardware)  # where it has to be measured this takes the longest
    if measure and not hardware_profiles.is_here(profile):
        raise InputError(
            f"the times are to be measured, but the hardware is {profile.name}, not this machine: leave measure out, or "
            "hardware"
        )
    if budgets_given["vram"] is not None:
        require_vram(profile, budgets_given["vram"])
    analysis, folder = _analysis(
        model,
        batch,
        loss,
        described,
        autocast=autocast,
        accumulation=accumulation,
        optimizer=optimizer,
        offload="try" if activations == ANY else "offload" in wanted.values(),
    )
    graph = analysis.graph
    vram_bytes, ram_bytes, disk_bytes = budgets_given["vram"], budgets_given["ram"], budgets_given["disk"]
    page_lock_bytes = budgets_given["page_lock"]
    lies_in: str | Path | None = checkpoint or folder
    if disk_bytes is None and not has_checkpoint(lies_in):
        disk_bytes = 0
    budgets = Budgets(
        vram_bytes=hardware_profiles.auto_vram_bytes(profile) if vram_bytes is None else vram_bytes,
        ram_bytes=hardware_profiles.auto_ram_bytes(profile) if ram_bytes is None else ram_bytes,
        disk_bytes=disk_bytes,
        page_lock_bytes=hardware_profiles.page_lock_limit_bytes(profile)
        if page_lock_bytes is None
        else page_lock_bytes,
    )
    times = None
    if measure:
        times = _times(
            model,
            batch,
            loss,
            graph,
            profile,
            budgets.vram_bytes,
            described,
            autocast=autocast,
            optimizer=optimizer,
            progress=progress,
        )
    table = cost_table(graph, profile, times)
    if state_home == "host":
        table = state_away(table, budgets.page_lock_bytes)
    workload = Workload(
        batch=analysis.shapes,
        tokens=graph.tokens,
        accumulation=accumulation,
        optimizer=optimizer,
        adapter=analysis.adapter,
        steps=steps,
        examples=examples,
        epochs=epochs,
    )
    asked = _activations(wanted, graph)
    if activations != ANY:  # a look at one layer is a look at all, but only those named may be offloaded
        table = replace(table, accesses=tuple(_only(asked, row) for row in table.accesses))
    return Case(
        table=table,
        budgets=budgets,
        model=graph.model,
        fingerprint=graph.fingerprint,
        workload=workload,
        hardware=profile.name,
        pins=_pins(tiers, {block.name: block.id for block in graph.blocks}),
        activations=asked,
        staging_bytes=_staging_bytes(table.device),
        notes=(
            *asked_for.notes,
            *graph.notes,
            *cost_notes(graph, profile, times),
            *hardware_profiles.notes(profile, lies_in),
            *beyond(profile, budgets.vram_bytes, budgets.ram_bytes),
        ),
        elastic=elastic,
        optimizer_state=state_home,
    )


def _analysis(
    model: Any,
    batch: Any,
    loss: Callable[[Any], Any] | None,
    described: Mapping[str, Any],
    **options: Any,
) -> tuple[Analysis, Path | None]:
    """Return what is known of a model and a batch, from before where it was kept, and where the checkpoint lies.

    ``described``: what :func:`memplan.analyze.adapters.prepare` builds the model with.
    """
    from memplan.analyze import kept

    asked = {**described, **options}
    key = None if loss is not None else kept.key_of(model, batch, asked)
    folder = hardware_profiles.cache_path() / kept.FOLDER
    if key is not None and (found := kept.recall(folder, key)) is not None:
        return found, models.folder_of(model)

    from memplan.analyze.adapters import describe, prepare
    from memplan.analyze.extend import NotPeriodicError
    from memplan.analyze.trace import analyze
    from memplan.snapshot import unchanged

    adapter, quantization = described["adapter"], described["quantization"]
    with unchanged(model=model, batch=batch, loss=loss, adapter=adapter, quantization=quantization):
        prepared = prepare(model, **described, short=True)
        notes = (*prepared.notes, *_as_quantized(model, prepared.model, described["kbit"], options["autocast"]))
        options |= {"loss": loss, "name": prepared.name, "short": prepared.short, "notes": notes}
        try:
            graph = analyze(prepared.model, batch, runs=prepared.runs, **options)
        except (ModelError, NotPeriodicError):
            if not prepared.runs:
                raise
            prepared = prepare(model, **described)
            graph = analyze(prepared.model, batch, **options)
        found = kept.Analysis(graph=graph, shapes=prepared.shapes(batch), adapter=describe(prepared.model))
    if key is not None:
        kept.keep(folder, key, found)
    return found, prepared.folder


def _as_quantized(given: Any, model: nn.Module, kbit: bool, autocast: Any) -> tuple[str, ...]:
    """Return what a plan says of a quantized model that was built here; a module of the caller's is as it is."""
    if callable(getattr(given, "named_parameters", None)):
        return ()
    from memplan.analyze.autocast import autocast_dtype
    from memplan.analyze.trainer_settings import kbit_notes

    return kbit_notes(model, kbit=kbit, autocast=autocast_dtype(autocast))


def _require_description(model: Any) -> None:
    """Raise InputError for ``qlora`` with a module: what it stands for is done as a model is built."""
    if callable(getattr(model, "named_parameters", None)):
        raise InputError(
            f"qlora was given with a {type(model).__name__} that is built already: give its configuration or name, or build it "
            "as it is trained (prepare_model_for_kbit_training, then the adapter) and give autocast and optimizer"
        )


def _times(
    model: Any,
    batch: Any,
    loss: Callable[[Any], Any] | None,
    graph: LayerGraph,
    profile: HardwareProfile,
    room_bytes: int,
    described: Mapping[str, Any],
    **options: Any,
) -> Times:
    """Return the times of the graph's accesses on this machine."""
    from memplan.analyze.adapters import prepare
    from memplan.analyze.measure import measure
    from memplan.snapshot import unchanged

    adapter, quantization = described["adapter"], described["quantization"]
    with unchanged(model=model, batch=batch, loss=loss, adapter=adapter, quantization=quantization):
        prepared = prepare(model, **described, buffers=True)
        return measure(
            prepared.model,
            batch,
            graph,
            device=profile.device,
            room_bytes=room_bytes,
            loss=loss,
            short=prepared.short,
            **options,
        )


def _profile(hardware: str | Path | HardwareProfile) -> HardwareProfile:
    if isinstance(hardware, hardware_profiles.HardwareProfile):
        return hardware
    return hardware_profiles.auto() if hardware == "auto" else hardware_profiles.load(hardware)


def _run_of(
    batch: Any, accumulation: int, *, steps: int | None, examples: int | None, epochs: int | None
) -> tuple[int | None, int | None]:
    """Return the steps and the epochs of a run, as far as they are known."""
    given: dict[str, Any] = {"steps": steps, "examples": examples, "epochs": epochs}
    for what, count in given.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
            raise InputError(f"{what} were given as {count!r}: give a whole number, at least 1")
    if examples is None:
        if epochs is not None:
            raise InputError("epochs were given without the examples of one: give examples too, or steps alone")
        return steps, None
    if steps is not None:
        raise InputError("steps were given, and examples to count them from: give one of the two")
    if not isinstance(batch, (tuple, list)) or len(batch) not in (1, 2) or not all(type(size) is int for size in batch):
        raise InputError(
            "examples were given to count steps from, but the batch is no shape, so how many of them it holds is not "
            "known: give steps, or batch as (batch, sequence)"
        )
    epochs = 1 if epochs is None else epochs
    passes = -(-examples // max(1, batch[0]))
    return epochs * -(-passes // accumulation), epochs


def _staging_bytes(device: str) -> int:
    """Return the host bytes that the disk is read through."""
    return STAGING_BYTES + (RING_BYTES if device == "cuda" else 0)


def _only(asked: Mapping[str, Activations], row: AccessRow) -> AccessRow:
    return row if not row.offload_bytes or asked.get(row.module) == "offload" else replace(row, offload_bytes=0)


def _wanted(activations: str | Mapping[str, str] | None) -> dict[str, Activations]:
    """Return what was asked by the name that it was asked for; an empty name stands for all layers."""
    if activations is None or activations == ANY:
        return {}
    found: dict[str, Activations] = {}
    for name, policy in ({"": activations} if isinstance(activations, str) else activations).items():
        known = next((one for one in _ACTIVATIONS if one == policy), None)
        if known is None:
            raise InputError(
                f"the activations{f' of {name}' if name else ''} were given as {policy!r}: give one of "
                f"{', '.join(_ACTIVATIONS)}" + ("" if name else f" or {ANY}")
            )
        found[name] = known
    return found


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
                    f"the activations of {layer.module} cannot be recomputed: {layer.reason}, and a recompute would do so "
                    'twice. Leave its activations out, or give "keep" or "offload"'
                )
        found |= dict.fromkeys(matches, policy)
    if "" in wanted and not layers and wanted[""] != "keep":
        raise InputError(
            f"all activations were to be {wanted['']}: memplan has no say in any of this model's layers (it checkpoints "
            "them itself, or has no repeated stack); leave activations out"
        )
    return found


def _tiers(pins: Mapping[str, str] | None) -> dict[str, Tier]:
    found: dict[str, Tier] = {}
    for name, given in (pins or {}).items():
        tier = next((one for one in _TIERS if one == given), None)
        if tier is None:
            raise InputError(f"the pin {name}={given} names the tier {given!r}: give one of {', '.join(_TIERS)}")
        found[name] = tier
    return found


def _pins(pins: Mapping[str, Tier], blocks: Mapping[str, int]) -> dict[int, Tier]:
    """Return tiers by block id. A block may be named by its last parts: ``layers.3`` for ``model.layers.3``."""
    found: dict[int, Tier] = {}
    for name, tier in pins.items():
        matches = [block for full, block in blocks.items() if full == name or full.endswith("." + name)]
        if len(matches) != 1:
            raise InputError(
                f"the pin {name}={tier} names {len(matches)} blocks: give one block (such as {next(iter(blocks))}) and one of "
                f"{', '.join(_TIERS)}"
            )
        found[matches[0]] = tier
    return found
