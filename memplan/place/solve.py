"""The solver: even spreading over all counts, judged by the timeline, and what it says where nothing fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.errors import DoesNotFitError
from memplan.place.bound import window_bound
from memplan.place.problem import Bytes, Memory, Problem, make_problem, policies_for
from memplan.place.search import Choice, arrangements, best
from memplan.place.spread import Arrangement, lay_out
from memplan.program.check import require
from memplan.program.schema import (
    SCHEMA_VERSION,
    STAGING_BYTES,
    VRAM_KINDS,
    ActivationPolicy,
    Budgets,
    Peaks,
    Plan,
    Prediction,
    Tier,
    Workload,
)
from memplan.program.timeline import Timeline, durations, replay
from memplan.units import format_bytes

_BINDS_SHARE = 0.01
"""A stall below this share of the pass is rounding of the real machine: compute binds."""


def place(
    table: CostTable,
    budgets: Budgets,
    *,
    model: str,
    fingerprint: str,
    workload: Workload,
    hardware: str,
    pins: Mapping[int, Tier] | None = None,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan with the shortest pass that keeps the budgets. Same input, same plan.

    ``pins``: tier by block id. ``activations``: what becomes of a module's, where that is not to be chosen here
    (offloading never is). Raises DoesNotFitError with the least vram for which this returns a plan, InputError for a
    pin or activations that cannot be kept.
    """
    problem = make_problem(table, budgets, staging_bytes, pins or {}, activations or {})
    memory = Memory(table)
    slots_bytes = problem.saves.device_bytes
    nonweight = [memory.at(policies_for(problem, level)) + slots_bytes for level in range(problem.levels)]
    options = arrangements(problem)
    choice = best(problem, options, nonweight)
    if choice is None:
        every = [arrangement for listed in options.values() for arrangement in listed]
        raise _does_not_fit(problem, every, nonweight, workload)
    plan = _plan(problem, choice, nonweight[choice.recomputed], model, fingerprint, workload, hardware, notes)
    require(plan)  # the judge shares no code with what made it
    return plan


# ---- what does not fit ----------------------------------------------------------------------------------------------


def _does_not_fit(
    problem: Problem, options: Sequence[Arrangement], nonweight: Sequence[Bytes], workload: Workload
) -> DoesNotFitError:
    budgets = problem.budgets
    asked = f"{problem_name(workload)} was to be trained in {format_bytes(budgets.vram_bytes)} of vram"
    if not options:
        frozen = sum(block.size_bytes for block in problem.table.blocks)
        limited = f"ram of {format_bytes(budgets.ram_bytes)} and no room on disk for the streamed blocks"
        enough = frozen + problem.staging_bytes + problem.saves.host_bytes
        tips = [f"give {format_bytes(enough)} of ram", "give a disk budget"]
        if problem.saves.host_bytes:
            limited += f", beside {format_bytes(problem.saves.host_bytes)} of ram for offloaded activations"
        return DoesNotFitError(
            f"{asked}, but there is no room for the blocks that would leave it",
            least_vram_bytes=None,
            limited_by=limited,
            suggestions=tuple(tips),
        )
    level = min(range(len(nonweight)), key=lambda index: (int(nonweight[index].max()), index))
    peak = int(nonweight[level].max())
    smallest = min(options, key=lambda option: (option.device_bytes, len(option.homes)))
    least = peak + smallest.device_bytes
    shown = format_bytes(least)
    if shown == format_bytes(budgets.vram_bytes):
        shown = f"{least - budgets.vram_bytes} bytes more"
    access = problem.table.accesses[int(nonweight[level].argmax())]
    where = f"the {access.kind}" + (f" of {access.module}" if access.module else "")
    how = f", {problem.recomputed_at(level)} of {len(problem.table.recomputable)} modules recomputed" if level else ""
    limited = (
        f"{format_bytes(peak)} of activations, adapters and optimizer state at {where}{how}, beside weights of "
        f"{format_bytes(smallest.device_bytes)} ({format_bytes(smallest.slots_bytes)} of it slots)"
    )
    fixed = sum(row.size_bytes for row in problem.table.fixed)
    tips = [f"give at least {format_bytes(least)} of vram ({least} bytes)"]
    no_staging = budgets.disk_bytes != 0 and budgets.ram_bytes < problem.staging_bytes
    if no_staging:
        staging = format_bytes(problem.staging_bytes)
        limited += f"; the disk is read through {staging} of ram, and there are {format_bytes(budgets.ram_bytes)}"
        tips.append(f"give at least {staging} of ram, so that blocks may be read from the disk")
    elif smallest.device_bytes > 4 * smallest.slots_bytes and len(smallest.homes) < len(problem.stack):
        tips.append("give more ram or a disk budget, so that more blocks may leave the device")
    if fixed > least // 4:
        tips.append("use a smaller adapter rank or an optimizer with less state")
    if len(tips) < 2 or peak - fixed > smallest.device_bytes // 4:
        tips.append(
            "use a smaller micro-batch with more accumulation, or shorter sequences: activations shrink with them"
        )
    return DoesNotFitError(
        f"{asked}, but the least that works is {shown}",
        least_vram_bytes=least,
        limited_by=limited,
        suggestions=tuple(tips),
    )


def problem_name(workload: Workload) -> str:
    """Return a short name of the workload for messages."""
    return f"a micro-batch of {workload.tokens} tokens"


# ---- the plan -------------------------------------------------------------------------------------------------------


def _plan(
    problem: Problem,
    choice: Choice,
    nonweight: Bytes,
    model: str,
    fingerprint: str,
    workload: Workload,
    hardware: str,
    notes: tuple[str, ...],
) -> Plan:
    table, arrangement = problem.table, choice.arrangement
    policies = policies_for(problem, choice.recomputed)
    saves = problem.saves
    layout = lay_out(problem, arrangement)
    timeline = replay(table, layout.items, layout.residences, policies)
    on_disk = arrangement.disk_bytes
    staging = problem.staging_bytes if on_disk else 0
    at = int(nonweight.argmax())
    parts = _vram_parts(table, policies, at)
    parts["weights"] = arrangement.device_bytes - arrangement.slots_bytes
    parts["slots"] = arrangement.slots_bytes + saves.device_bytes
    times_s = durations(table, policies)  # that rows are read on the host is this plan's choice
    bound = max(window_bound(problem, times_s, nonweight, on_disk > 0), sum(times_s))
    optimizer_s = sum(row.time_s for row in table.accesses if row.kind == "optimizer")
    prediction = Prediction(
        compute_s=timeline.compute_s,
        pass_s=timeline.pass_s,
        step_s=workload.accumulation * timeline.pass_s + optimizer_s,
        bound_s=bound,
        stall_s=max(timeline.pass_s - timeline.compute_s, 0.0),
        binds=_binds(timeline),
        loads_per_pass=sum(s.begins == "load" and layout.items[s.item].kind == "weights" for s in layout.residences),
        loaded_bytes_per_pass=choice.moved_bytes - arrangement.rows_bytes,
        offloaded_bytes_per_pass=sum(save.size_bytes for save in saves.items if not save.stays),
        rows_bytes_per_pass=arrangement.rows_bytes,
        peaks=Peaks(
            vram_bytes=arrangement.device_bytes + int(nonweight.max()),
            ram_bytes=arrangement.host_bytes + saves.host_bytes + staging,
            disk_bytes=on_disk,
        ),
        vram_peak_at=at,
        vram_parts=parts,
        ram_parts={"weights": arrangement.host_bytes, "activations": saves.host_bytes, "staging": staging},
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=model,
        fingerprint=fingerprint,
        workload=workload,
        budgets=problem.budgets,
        hardware=hardware,
        table=table,
        items=layout.items,
        arenas=layout.arenas,
        addresses=layout.addresses,
        residences=layout.residences,
        activations=tuple(ActivationPolicy(module=m, activations=p) for m, p in policies.items()),
        prediction=prediction,
        staging_bytes=staging,
        notes=notes,
        pins=dict(problem.pins),
        asked=dict(problem.activations),
    )


def _vram_parts(table: CostTable, policies: Mapping[str, Activations], at: int) -> dict[str, int]:
    """Return the device bytes at an access by kind, frozen weights apart. None is negative."""
    parts = dict.fromkeys(VRAM_KINDS, 0)
    for row in table.fixed:
        parts[row.kind] += row.size_bytes
    for life in table.lifetimes:
        if life.born <= at <= life.last:
            policy = policies.get(table.accesses[life.born].module, "keep")
            if life.policy in ("any", policy):
                parts[life.kind] += life.size_bytes
    access = table.accesses[at]
    transient = access.transient(policies.get(access.module, "keep"))
    if transient >= 0:
        parts["workspace"] = transient
    else:  # the lifetimes that meet in this access are not all alive at its peak
        owed = -transient
        for kind in ("activations", "gradients", *parts):
            taken = min(owed, parts[kind])
            parts[kind] -= taken
            owed -= taken
    return parts


def _binds(timeline: Timeline) -> str:
    if timeline.total_stall_s <= _BINDS_SHARE * timeline.pass_s:
        return "compute"
    busy = {"h2d": 0.0, "disk": 0.0, "d2h": 0.0}
    for load in timeline.loads:
        busy[load.channel] += load.end_s - load.start_s
    return "disk" if busy["disk"] > busy["h2d"] else "link"
