"""The solver: even spreading over all counts, judged by the timeline.

Every arrangement × number of recomputed modules that fits has a simple lower bound on its pass (its compute, and its
bytes on each channel); the candidates are timed from the lowest on until none that is left can win. Ties go to fewer
bytes moved, then to fewer recomputed modules.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.errors import DoesNotFitError, InputError
from memplan.place.bound import window_bound
from memplan.place.problem import Bytes, Memory, Problem, make_problem, policies_for
from memplan.place.spread import Arrangement, Layout, arrangements, lay_out
from memplan.program.schema import (
    SCHEMA_VERSION,
    STAGING_BYTES,
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


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    recomputed: int
    arrangement: Arrangement
    layout: Layout
    policies: Mapping[str, Activations]
    timeline: Timeline
    moved_bytes: int

    @property
    def rank(self) -> tuple[float, int, int, int]:
        return (self.timeline.pass_s, self.moved_bytes, self.recomputed, self.arrangement.device_bytes)


def place(
    table: CostTable,
    budgets: Budgets,
    *,
    model: str,
    fingerprint: str,
    workload: Workload,
    hardware: str,
    pins: Mapping[int, Tier] | None = None,
    staging_bytes: int = STAGING_BYTES,
    notes: tuple[str, ...] = (),
) -> Plan:
    """Return the plan with the shortest pass that keeps the budgets. Same input, same plan.

    ``pins``: tier by block id. Raises DoesNotFitError with the least vram for which this returns a plan, InputError for
    a pin that cannot be kept.
    """
    problem = make_problem(table, budgets, staging_bytes, pins or {})
    for block, tier in problem.pins.items():
        why = table.blocks[block].pinned_because
        if tier != "device" and block in problem.resident:
            raise InputError(
                f"{table.blocks[block].name} was pinned to {tier}, but must stay on the device: {why or 'it is not read alone'}"
            )
    memory = Memory(table)
    levels = range(len(table.recomputable) + 1)
    nonweight = [memory.at(policies_for(table, level)) for level in levels]
    options = list(arrangements(problem))
    choice = _best(problem, options, nonweight)
    if choice is None:
        raise _does_not_fit(problem, options, nonweight, workload)
    return _plan(problem, choice, nonweight[choice.recomputed], model, fingerprint, workload, hardware, notes)


def _best(problem: Problem, options: list[Arrangement], nonweight: list[Bytes]) -> _Choice | None:
    table, vram = problem.table, problem.budgets.vram_bytes
    compute = [sum(durations(table, policies_for(table, level))) for level in range(len(nonweight))]
    moved = {id(option): _moved(problem, option) for option in options}
    candidates: list[tuple[float, int, int, int]] = []
    for level, bytes_at in enumerate(nonweight):
        room = vram - int(bytes_at.max())
        for index, option in enumerate(options):
            if option.device_bytes <= room:
                host, disk = moved[id(option)]
                least = max(compute[level], host / table.host_to_device_bytes_per_s, disk / table.disk_bytes_per_s)
                candidates.append((least, host + disk, level, index))
    candidates.sort()
    best: _Choice | None = None
    for least, _, level, index in candidates:
        if best is not None and least > best.timeline.pass_s:
            break
        option = options[index]
        policies = policies_for(table, level)
        layout = lay_out(problem, option)
        choice = _Choice(
            recomputed=level,
            arrangement=option,
            layout=layout,
            policies=policies,
            timeline=replay(table, layout.items, layout.residences, policies),
            moved_bytes=sum(moved[id(option)]),
        )
        if best is None or choice.rank < best.rank:
            best = choice
    return best


def _moved(problem: Problem, option: Arrangement) -> tuple[int, int]:
    """Return the bytes that a pass moves from the host and from the disk."""
    host = disk = 0
    for stay in lay_out(problem, option).residences:
        if stay.begins == "load":
            if stay.channel == "h2d":
                host += problem.size(stay.item)
            else:
                disk += problem.size(stay.item)
    return host, disk


# ---- what does not fit ----------------------------------------------------------------------------------------------


def _does_not_fit(
    problem: Problem, options: list[Arrangement], nonweight: list[Bytes], workload: Workload
) -> DoesNotFitError:
    budgets = problem.budgets
    asked = f"{problem_name(workload)} was to be trained in {format_bytes(budgets.vram_bytes)} of vram"
    if not options:
        frozen = sum(block.size_bytes for block in problem.table.blocks)
        limited = f"ram of {format_bytes(budgets.ram_bytes)} and no room on disk for the streamed blocks"
        tips = [f"give {format_bytes(frozen + problem.staging_bytes)} of ram", "give a disk budget"]
        return DoesNotFitError(
            f"{asked}, but {limited}: {tips[0]}, or {tips[1]}",
            least_vram_bytes=None,
            limited_by=limited,
            suggestions=tuple(tips),
        )
    level = min(range(len(nonweight)), key=lambda index: (int(nonweight[index].max()), index))
    peak = int(nonweight[level].max())
    smallest = min(options, key=lambda option: (option.device_bytes, len(option.homes)))
    least = peak + smallest.device_bytes
    access = problem.table.accesses[int(nonweight[level].argmax())]
    where = f"the {access.kind}" + (f" of {access.module}" if access.module else "")
    how = f", {level} of {len(problem.table.recomputable)} modules recomputed" if level else ""
    limited = (
        f"{format_bytes(peak)} of activations, adapters and optimizer state at {where}{how}, beside weights of "
        f"{format_bytes(smallest.device_bytes)} ({format_bytes(smallest.slots_bytes)} of it slots)"
    )
    tips = [f"give at least {format_bytes(least)} of vram ({least} bytes)"]
    activations = peak - sum(row.size_bytes for row in problem.table.fixed)
    if activations > smallest.device_bytes // 4:
        tips.append(
            "use a smaller micro-batch with more accumulation, or shorter sequences: activations shrink with them"
        )
    if smallest.device_bytes > 4 * smallest.slots_bytes and len(smallest.homes) < len(problem.stack):
        tips.append("give more ram or a disk budget, so that more blocks may leave the device")
    if sum(row.size_bytes for row in problem.table.fixed) > least // 4:
        tips.append("use a smaller adapter rank or an optimizer with less state")
    return DoesNotFitError(
        f"{asked}, but the least that works is {format_bytes(least)}: {limited}. To make it fit: {'; '.join(tips)}",
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
    choice: _Choice,
    nonweight: Bytes,
    model: str,
    fingerprint: str,
    workload: Workload,
    hardware: str,
    notes: tuple[str, ...],
) -> Plan:
    table, arrangement, timeline = problem.table, choice.arrangement, choice.timeline
    on_disk = arrangement.disk_bytes
    staging = problem.staging_bytes if on_disk else 0
    at = int(nonweight.argmax())
    parts = _vram_parts(table, choice.policies, at)
    parts["weights"] = arrangement.device_bytes - arrangement.slots_bytes
    parts["slots"] = arrangement.slots_bytes
    bound = window_bound(problem, durations(table, choice.policies), nonweight, on_disk > 0)
    optimizer_s = sum(row.time_s for row in table.accesses if row.kind == "optimizer")
    prediction = Prediction(
        compute_s=timeline.compute_s,
        pass_s=timeline.pass_s,
        step_s=workload.accumulation * timeline.pass_s + optimizer_s,
        bound_s=max(bound, timeline.compute_s),
        stall_s=max(timeline.pass_s - timeline.compute_s, 0.0),
        binds=_binds(choice, table),
        loads_per_pass=len(timeline.loads),
        loaded_bytes_per_pass=choice.moved_bytes,
        peaks=Peaks(
            vram_bytes=arrangement.device_bytes + int(nonweight.max()),
            ram_bytes=arrangement.host_bytes + staging,
            disk_bytes=on_disk,
        ),
        vram_peak_at=at,
        vram_parts=parts,
        ram_parts={"weights": arrangement.host_bytes, "staging": staging},
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        model=model,
        fingerprint=fingerprint,
        workload=workload,
        budgets=problem.budgets,
        hardware=hardware,
        table=table,
        items=choice.layout.items,
        arenas=choice.layout.arenas,
        addresses=choice.layout.addresses,
        residences=choice.layout.residences,
        activations=tuple(ActivationPolicy(module=m, activations=p) for m, p in choice.policies.items()),
        prediction=prediction,
        staging_bytes=staging,
        notes=notes,
    )


def _vram_parts(table: CostTable, policies: Mapping[str, Activations], at: int) -> dict[str, int]:
    """Return the device bytes at an access by kind, frozen weights apart. None is negative."""
    parts = dict.fromkeys(
        (
            "weights",
            "slots",
            "adapters",
            "gradients",
            "optimizer",
            "buffers",
            "batch",
            "context",
            "activations",
            "workspace",
        ),
        0,
    )
    for row in table.fixed:
        parts[row.kind] += row.size_bytes
    for life in table.lifetimes:
        if life.born <= at <= life.last:
            policy = policies.get(table.accesses[life.born].module, "keep")
            if life.policy in ("any", policy):
                parts[life.kind] += life.size_bytes
    access = table.accesses[at]
    recomputed = policies.get(access.module, "keep") == "recompute"
    transient = access.transient_recompute_bytes if recomputed else access.transient_bytes
    if transient >= 0:
        parts["workspace"] = transient
    else:  # the lifetimes that meet in this access are not all alive at its peak
        parts["activations"] += transient
        if parts["activations"] < 0:
            parts["gradients"] += parts["activations"]
            parts["activations"] = 0
    return parts


def _binds(choice: _Choice, table: CostTable) -> str:
    timeline = choice.timeline
    if timeline.total_stall_s <= _BINDS_SHARE * timeline.pass_s:
        return "compute"
    busy = {"h2d": 0.0, "disk": 0.0, "d2h": 0.0}
    for load in timeline.loads:
        busy[load.channel] += load.end_s - load.start_s
    return "disk" if busy["disk"] > busy["h2d"] else "link"
