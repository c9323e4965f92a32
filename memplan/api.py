"""The whole way on one screen: model + batch -> LayerGraph -> CostTable -> Plan -> run -> report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from memplan import hardware as hardware_profiles
from memplan import models
from memplan.checkpoint import has_checkpoint
from memplan.errors import InputError, ModelError
from memplan.program.record import RunRecord
from memplan.program.schema import RING_BYTES, STAGING_BYTES, Budgets, Plan, Tier, Workload
from memplan.units import parse_size

if TYPE_CHECKING:
    from torch import nn

    from memplan.analyze.graph import Activations, LayerGraph
    from memplan.analyze.kept import Analysis
    from memplan.analyze.measure import Times
    from memplan.hardware import HardwareProfile
    from memplan.program.memory import Moment
    from memplan.run.handle import Handle

_TIERS: tuple[Tier, ...] = ("device", "host", "disk")
_ACTIVATIONS: tuple[Activations, ...] = ("keep", "recompute", "offload")


def plan(
    model: Any,
    batch: Any,
    *,
    vram: int | str = "auto",
    ram: int | str | None = None,
    disk: int | str | None = None,
    adapter: Any = None,
    dtype: Any = None,
    attention: str | None = None,
    quantization: Any = None,
    autocast: str | None = None,
    accumulation: int = 1,
    steps: int | None = None,
    examples: int | None = None,
    epochs: int | None = None,
    optimizer: str = "adamw",
    hardware: str | Path | HardwareProfile = "auto",
    pins: Mapping[str, str] | None = None,
    activations: str | Mapping[str, str] | None = None,
    loss: Callable[[Any], Any] | None = None,
    checkpoint: str | Path | None = None,
    measure: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Plan:
    """Say where each frozen block lives and when it moves, before any weight is loaded.

    ``model``: an ``nn.Module`` on any device (``meta`` included), a transformers configuration, a directory with
    ``config.json`` (of transformers or diffusers), or a name: of ``memplan/models.json``, or on the hub.
    ``batch``: a mapping of tensors (one micro-batch), or a shape: (batch, sequence), or (batch,) for images.
    ``vram``, ``ram``, ``disk``: bytes, or text such as ``"6GiB"``. ``vram="auto"``: what is free less a reserve;
    ``ram=None``: what is available less a reserve; ``disk=None``: no disk beyond the checkpoint's own files.
    ``adapter``: a PEFT configuration or ``{"rank": 16, "targets": "all-linear"}``, where the model has none yet.
    ``dtype``, ``attention``, ``quantization``: for a model built here from its configuration. ``quantization``: ``"nf4"``,
    ``"nf4-nested"``, ``"fp4"``, ``"int8"`` and others (:data:`memplan.quantization.NAMES`), or transformers' configuration
    of it; None: as the model's configuration says. ``autocast``: ``"bf16"`` or ``"fp16"``, where
    the forward will run under ``torch.autocast``, which saves casts of a float32 base for backward; None: as the autocast
    that this is called in, if any. ``accumulation``: passes of a step.
    ``steps``: of the whole run, for its time; or ``examples`` of an epoch and ``epochs`` (default: one), where the batch is a
    shape: each epoch then ends with a step, however few are left for it. ``optimizer``: as transformers' ``optim``, or
    ``"adamw"``, ``"sgd"``, ``"momentum"`` and others.
    ``hardware``: ``"auto"`` (measured once, then cached), a shipped profile's name, or a profile's file.
    ``pins``: tier by block name. ``activations``: ``"keep"``, ``"recompute"`` or ``"offload"`` (to RAM, until backward)
    for every layer, or by layer name; None: kept or recomputed, as is fastest. ``loss``: from the model's output to a scalar, where the output holds none.
    ``checkpoint``: folder of safetensors that blocks may be read from (default: where the model says it came from).
    ``measure``: time each access on this machine, with one block's memory, in place of estimating it from rates;
    ``progress`` is called with a short text before each part.

    Raises DoesNotFitError (with the least vram that would), InputError and its children. The model is unchanged.
    """
    from memplan.cost.build import cost_table
    from memplan.cost.build import notes as cost_notes
    from memplan.place.solve import place

    if accumulation < 1:
        raise InputError(f"accumulation was given as {accumulation!r}: give a whole number of passes, at least 1")
    steps, epochs = _run_of(batch, accumulation, steps=steps, examples=examples, epochs=epochs)
    profile = _profile(hardware)
    budgets_given = {
        "vram": None if vram == "auto" else parse_size(vram, "vram"),
        "ram": None if ram is None or ram == "auto" else parse_size(ram, "ram"),
        "disk": None if disk is None else parse_size(disk, "disk"),
    }
    wanted = _wanted(activations)
    analysis, folder = _analysis(
        model,
        batch,
        loss,
        adapter=adapter,
        dtype=dtype,
        attention=attention,
        quantization=quantization,
        autocast=autocast,
        accumulation=accumulation,
        optimizer=optimizer,
        offload="offload" in wanted.values(),
    )
    graph = analysis.graph
    vram_bytes, ram_bytes, disk_bytes = budgets_given["vram"], budgets_given["ram"], budgets_given["disk"]
    lies_in: str | Path | None = checkpoint or folder
    if disk_bytes is None and not has_checkpoint(lies_in):
        disk_bytes = 0
    budgets = Budgets(
        vram_bytes=hardware_profiles.auto_vram_bytes(profile) if vram_bytes is None else vram_bytes,
        ram_bytes=hardware_profiles.auto_ram_bytes(profile) if ram_bytes is None else ram_bytes,
        disk_bytes=disk_bytes,
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
            adapter=adapter,
            dtype=dtype,
            attention=attention,
            quantization=quantization,
            autocast=autocast,
            optimizer=optimizer,
            progress=progress,
        )
    table = cost_table(graph, profile, times)
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
    return place(
        table,
        budgets,
        model=graph.model,
        fingerprint=graph.fingerprint,
        workload=workload,
        hardware=profile.name,
        pins=_pins(pins, {block.name: block.id for block in graph.blocks}),
        activations=_activations(wanted, graph.recomputable),
        staging_bytes=_staging_bytes(table.device),
        notes=(*graph.notes, *cost_notes(graph, profile, times), *hardware_profiles.notes(profile, lies_in)),
    )


def memory_timeline(plan: Plan) -> tuple[Moment, ...]:
    """Return the bytes of each tier by kind, at the peak of each access: :mod:`memplan.program.memory` says what kinds."""
    from memplan.program.memory import timeline

    return timeline(plan)


def attach(model: nn.Module, plan: Plan, **options: Any) -> Handle:
    """Put every block of ``model`` in its home and stream it as ``plan`` says: :func:`memplan.run.attach.attach`."""
    from memplan.run.attach import attach

    options.setdefault("replan", smaller)
    return attach(model, plan, **options)


def smaller(plan: Plan, vram_bytes: int) -> Plan:
    """Return a plan of the same model for another budget of vram, in bytes. Raises DoesNotFitError."""
    from msgspec.structs import replace

    from memplan.place.solve import place

    return place(
        plan.table,
        replace(plan.budgets, vram_bytes=vram_bytes),
        model=plan.model,
        fingerprint=plan.fingerprint,
        workload=plan.workload,
        hardware=plan.hardware,
        pins=plan.pins,
        activations=plan.asked,
        staging_bytes=_staging_bytes(plan.table.device),
        notes=plan.notes,
        pieces=False,  # the blocks stay those of the plan that is left
    )


def materialise(model: nn.Module) -> AbstractContextManager[nn.Module]:
    """A context in which all weights are readable; see :func:`memplan.run.handle.materialise`."""
    from memplan.run.handle import materialise

    return materialise(model)


def report(plan: Plan, record: RunRecord | None = None, file: TextIO | None = None) -> None:
    """Print the plan, and what was measured beside it where a record is given, to ``file`` (default: standard output).

    Raises PlanMismatchError where the record is of another model.
    """
    from memplan.show.terminal import write

    write(plan, record, file)


def _analysis(
    model: Any,
    batch: Any,
    loss: Callable[[Any], Any] | None,
    *,
    adapter: Any,
    dtype: Any,
    attention: Any,
    quantization: Any,
    **options: Any,
) -> tuple[Analysis, Path | None]:
    """Return what is known of a model and a batch, from before where it was kept, and where the checkpoint lies."""
    from memplan.analyze import kept

    described = {"adapter": adapter, "dtype": dtype, "attention": attention, "quantization": quantization}
    asked = {**described, **options}
    key = None if loss is not None else kept.key_of(model, batch, asked)
    folder = hardware_profiles.cache_path() / kept.FOLDER
    if key is not None and (found := kept.recall(folder, key)) is not None:
        return found, models.folder_of(model)

    from memplan.analyze.adapters import describe, prepare
    from memplan.analyze.extend import NotPeriodicError
    from memplan.analyze.trace import analyze

    prepared = prepare(model, **described, short=True)
    options |= {"loss": loss, "name": prepared.name, "short": prepared.short, "notes": prepared.notes}
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


def _times(
    model: Any,
    batch: Any,
    loss: Callable[[Any], Any] | None,
    graph: LayerGraph,
    profile: HardwareProfile,
    room_bytes: int,
    *,
    adapter: Any,
    dtype: Any,
    attention: Any,
    quantization: Any,
    **options: Any,
) -> Times:
    """Return the times of the graph's accesses on this machine. Raises InputError where ``profile`` is of another."""
    if not hardware_profiles.is_here(profile):
        raise InputError(
            f"the times are to be measured, but the hardware is {profile.name}, not this machine: leave measure out, or "
            "hardware"
        )
    from memplan.analyze.adapters import prepare
    from memplan.analyze.measure import measure

    prepared = prepare(
        model, adapter=adapter, dtype=dtype, attention=attention, quantization=quantization, buffers=True
    )
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


def _wanted(activations: str | Mapping[str, str] | None) -> dict[str, Activations]:
    """Return what was asked by the name that it was asked for; an empty name stands for all layers."""
    if activations is None:
        return {}
    found: dict[str, Activations] = {}
    for name, policy in ({"": activations} if isinstance(activations, str) else activations).items():
        known = next((one for one in _ACTIVATIONS if one == policy), None)
        if known is None:
            raise InputError(
                f"the activations{f' of {name}' if name else ''} were given as {policy!r}: give one of "
                f"{', '.join(_ACTIVATIONS)}"
            )
        found[name] = known
    return found


def _activations(wanted: Mapping[str, Activations], layers: tuple[str, ...]) -> dict[str, Activations]:
    """Return what was asked by layer. A layer may be named by its last parts, as a block may."""
    found: dict[str, Activations] = {}
    for name, policy in wanted.items():
        matches = [full for full in layers if not name or full == name or full.endswith("." + name)]
        if len(matches) != 1 and name:
            raise InputError(
                f"activations were given for {name!r}, which names {len(matches)} layers that memplan has a say in: "
                + (f"name one such as {layers[0]}" if layers else "leave it out")
            )
        found |= dict.fromkeys(matches, policy)
    if "" in wanted and not layers and wanted[""] != "keep":
        raise InputError(
            f"all activations were to be {wanted['']}: memplan has no say in any of this model's layers (it checkpoints "
            "them itself, or has no repeated stack); leave activations out"
        )
    return found


def _pins(pins: Mapping[str, str] | None, blocks: Mapping[str, int]) -> dict[int, Tier] | None:
    """Return tiers by block id. A block may be named by its last parts: ``layers.3`` for ``model.layers.3``."""
    if not pins:
        return None
    found: dict[int, Tier] = {}
    for name, tier in pins.items():
        matches = [block for full, block in blocks.items() if full == name or full.endswith("." + name)]
        if len(matches) != 1 or tier not in _TIERS:
            what = f"names {len(matches)} blocks" if len(matches) != 1 else f"names the tier {tier!r}"
            raise InputError(
                f"the pin {name}={tier} {what}: give one block (such as {next(iter(blocks))}) and one of "
                f"{', '.join(_TIERS)}"
            )
        found[matches[0]] = tier
    return found
