"""The solver: rings over all numbers of recomputed modules, judged by the timeline, and what it says where nothing
fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NotRequired, TypedDict, Unpack

import numpy as np
from msgspec.structs import replace

from memplan.analyze.graph import Activations
from memplan.cost.group import copies_at, grouped
from memplan.cost.table import CostTable
from memplan.place.alternatives import Task, Variants, state_away
from memplan.place.baselines import Baseline, generator_of
from memplan.place.bound import window_bound
from memplan.place.evaluator import Choice, Evaluator
from memplan.place.generators import GENERATORS, climb, search
from memplan.place.layout.layout import lay_out
from memplan.place.layout.split import split
from memplan.place.problem import Memory, Problem, make_problem, policies_for
from memplan.place.refusal import does_not_fit
from memplan.place.validate import require_input
from memplan.program.check.judge import require
from memplan.program.schema import (
    SCHEMA_VERSION,
    STAGING_BYTES,
    VRAM_KINDS,
    ActivationPolicy,
    Budgets,
    Peaks,
    Plan,
    Prediction,
    StateHome,
    Tier,
    Workload,
)
from memplan.program.support import ELASTIC_DEVICES, require_supported
from memplan.program.timeline import Timeline, durations, replay

_BINDS_SHARE = 0.01
"""A stall below this share of the pass is rounding of the real machine: compute binds."""

_HALVINGS = 3
"""Numbers of offloading modules are tried ever nearer to the best, so often by half the distance."""

_MUCH = 3e-3
"""Blocks are split where a pass is longer than it need be by more than this share of it,"""

_WORTH = 1e-3
"""and where that makes it shorter by more than this."""


class PlanInfo(TypedDict):
    """What a plan says of its case besides."""

    model: str
    fingerprint: str
    workload: Workload
    hardware: str
    notes: NotRequired[tuple[str, ...]]


def place(
    table: CostTable,
    budgets: Budgets,
    *,
    pins: Mapping[int, Tier] | None = None,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
    pieces: bool = True,
    elastic: bool | None = None,
    optimizer_state: StateHome | None = None,
    groups: Sequence[int] | None = None,
    **said: Unpack[PlanInfo],
) -> Plan:
    """Return the plan with the shortest step that keeps the budgets. Same input, same plan.

    ``pins``: tier by block id. ``activations``: what becomes of a module's, where that is not to be chosen here.
    ``pieces``: whether blocks may be split into their natural parts where that buys time; the plan's table then has
    these for blocks. ``elastic``: whether the device arena may have bytes beyond what the access with the least room
    allows, which are given back around it; None: on the CPU alone, since no GPU has proven it. ``optimizer_state``:
    where that lies between steps; None: where a step is shorter, but on the CPU alone on the device. ``groups``:
    numbers of micro-batches of which one is chosen for a group, from the least up; None: the table's own. Raises
    DoesNotFitError with the least vram for which this returns a plan, InputError for a pin or activations that cannot
    be kept, and for budgets or a table that cannot be (see :mod:`memplan.place.validate`).
    """
    require_input(table, budgets, staging_bytes)
    elastic = table.device in ELASTIC_DEVICES if elastic is None else elastic
    task = Task(table, budgets, staging_bytes, pins or {}, activations or {}, optimizer_state, elastic)
    first, *larger = sorted(groups or (table.group,))
    accumulation = said["workload"].accumulation
    least = task._replace(table=grouped(table, first, accumulation))
    found = _placed(least, pieces, said)
    if found is None:
        raise does_not_fit(least, said["workload"])
    for group in larger:
        if not found.prediction.loads_per_pass or found.prediction.step_s <= _least_step_s(found) * (1 + _WORTH):
            break  # there is nothing to share, or nothing to gain
        other = _placed(task._replace(table=grouped(table, group, accumulation)), pieces, said)
        if other is None:
            break  # nor does anything larger fit
        if other.prediction.step_s < found.prediction.step_s * (1 - _WORTH):
            found = other
    return found


def _least_step_s(plan: Plan) -> float:
    """Return the step in s that no group beats: its compute, nothing recomputed but what was asked."""
    kept_s = sum(durations(plan.table, plan.asked)) / plan.group
    return plan.workload.accumulation * kept_s + _optimizer_s(plan.table)


def _placed(task: Task, pieces: bool, said: PlanInfo) -> Plan | None:
    """Return the plan with the shortest pass of a group; None where nothing keeps the budgets."""
    first, *others = task.tables()
    solution = _best(task._replace(table=first), pieces)
    for away in others:
        if solution.choice is None:
            solution = _best(task._replace(table=away), pieces)
        else:
            solution = _with_state_away(solution, task, said["workload"].accumulation / task.table.group)
    return None if solution.choice is None else _plan(solution, task.activations, said, elastic=task.elastic)


def pass_below_s(
    table: CostTable,
    budgets: Budgets,
    below_s: float,
    *,
    pins: Mapping[int, Tier] | None = None,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
    elastic: bool | None = None,
) -> float | None:
    """Return a pass in s that :func:`place` reaches at least, without splitting blocks or offloading more; None where
    that does not fit, or takes ``below_s`` or longer.
    """
    elastic = table.device in ELASTIC_DEVICES if elastic is None else elastic
    task = Task(table, budgets, staging_bytes, pins or {}, activations or {}, elastic=elastic)
    evaluator = Evaluator(task.problem(), below_s=below_s, elastic=elastic)
    choice = search(evaluator, [generator for generator in GENERATORS if generator is not climb])
    return None if choice is None else choice.pass_s


def place_as(
    way: Baseline,
    table: CostTable,
    budgets: Budgets,
    *,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
    **said: Unpack[PlanInfo],
) -> Plan | None:
    """Return the plan that another way of placing comes to, on the same timeline; None where it does not fit.

    As for :func:`place`; these ways know no pins.
    """
    require_input(table, budgets, staging_bytes)
    problem = make_problem(table, budgets, staging_bytes, {}, activations or {})
    choice = search(Evaluator(problem), [generator_of(way)])
    solution = _Solution(problem=problem, choice=choice, least_s=0.0)
    if solution.choice is None:
        return None
    return _plan(solution, activations or {}, said, elastic=False)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solution:
    problem: Problem
    choice: Choice | None
    least_s: float
    """No arrangement of any pieces of these blocks has a shorter pass, with these numbers of recomputed modules."""

    @property
    def leaves_much(self) -> bool:
        """Whether another choice might be shorter by so much that blocks are worth splitting."""
        return self.choice is None or self.choice.pass_s > self.least_s * (1 + _MUCH)

    @property
    def may_gain_by_offloading(self) -> bool:
        """Whether the pass is much longer than the compute would be if nothing were recomputed."""
        kept_s = sum(durations(self.problem.table, policies_for(self.problem, 0)))
        return self.choice is None or self.choice.pass_s > kept_s * (1 + _MUCH)


def _solve(task: Task, than: Choice | None = None, near: int | None = None) -> _Solution:
    """Return the best there is of these rows and activations. ``than``: what is not better is no choice. ``near``:
    about the best number of recomputed modules, where it is known.
    """
    below_s = None if than is None else than.pass_s * (1 - _WORTH)
    evaluator = Evaluator(task.problem(), below_s=below_s, elastic=task.elastic, near=near)
    choice = search(evaluator)
    return _Solution(problem=evaluator.problem, choice=choice, least_s=evaluator.least_of_all_s)


def _best(task: Task, pieces: bool) -> _Solution:
    """Return the best there is of these rows, blocks split where ``pieces`` lets them be."""
    solution = plain = _solve(task)
    if plain.may_gain_by_offloading:
        solution = _with_offloads(plain, task)
    # What is offloaded may be better as long as blocks are whole, and worse than what is not where they are split.
    for whole in dict.fromkeys((plain, solution)) if pieces else ():
        if whole.choice is None or not whole.leaves_much:
            continue
        finer, finer_pins = split(task.table, task.pins)
        if finer is not task.table:
            in_pieces = task._replace(table=finer, pins=finer_pins, activations=whole.problem.activations)
            other = _solve(in_pieces, solution.choice, whole.choice.level)
            solution = other if other.choice is not None else solution
    return solution


def _with_state_away(solution: _Solution, task: Task, passes: float) -> _Solution:
    """Return what is better of the same blocks where the optimizer's state waits in RAM, its copies in a step included.

    Its room spares a pass two loads of as many bytes at most, which is what those copies are, or what recomputing as
    many bytes takes. It is looked at no further where that cannot win.
    """
    problem, choice = solution.problem, solution.choice
    assert choice is not None
    away, limit = state_away(problem.table, problem.page_lock_bytes), problem.page_lock_bytes
    copies_s = sum(row.time_s for row in away.accesses) - sum(row.time_s for row in problem.table.accesses)
    link = away.host_to_device_bytes_per_s
    slowest = link if limit is None else min(link, away.pageable_bytes_per_s or link)
    spared_s = min(
        away.state_on_host_bytes * max(2 / slowest, _recompute_s_a_byte(problem, choice.level)),
        choice.pass_s - sum(durations(problem.table, policies_for(problem, 0))),
    )
    if passes * spared_s - copies_s <= _WORTH * passes * choice.pass_s:
        return solution
    there = task._replace(table=away, pins=problem.pins, activations=problem.activations)
    other = _solve(there, choice)  # its room may be that of many layers
    won = other.choice is not None and passes * (choice.pass_s - other.choice.pass_s) > copies_s
    return other if won else solution


def _recompute_s_a_byte(problem: Problem, level: int) -> float:
    """Return the most that recomputing a module takes for each byte that it spares, in s; 0 where none is
    recomputed.
    """
    table, again = problem.table, problem.recomputed_at(level)
    spared, taken = dict.fromkeys(again, 0), dict.fromkeys(again, 0.0)
    for life in table.lifetimes:
        module = table.accesses[life.born].module
        if module in spared and life.policy in ("keep", "recompute"):
            spared[module] += life.size_bytes if life.policy == "keep" else -life.size_bytes
    for row in table.accesses:
        if row.module in taken:
            taken[row.module] += row.recompute_s
    return max((taken[module] / max(spared[module], 1) for module in again), default=0.0)


def _with_offloads(solution: _Solution, task: Task) -> _Solution:
    """Return what is better where activations are offloaded too: of ever more modules, then of about as many as the
    best.
    """
    variants = Variants(task.table, task.activations)
    for chosen in variants.every:
        other = _solve(task._replace(activations=chosen), solution.choice)
        solution = other if other.choice is not None else solution
    found, tried = {0: solution}, {0}
    best = 0

    def look(counts: Iterable[int]) -> None:
        nonlocal best
        for count in sorted({count for count in counts if 0 < count <= variants.most} - tried):
            tried.add(count)
            other = _solve(task._replace(activations=variants.of(count)), found[best].choice)
            if other.choice is not None:
                found[count], best = other, count

    look(variants.counts)
    step = variants.counts[0] if variants.counts else 0
    for _ in range(_HALVINGS if found[best].choice is not None else 0):
        step = -(-step // 2)
        look((best - step, best + step))
    return found[best]


# ---- the plan -------------------------------------------------------------------------------------------------------


def _plan(solution: _Solution, asked: Mapping[str, Activations], said: PlanInfo, *, elastic: bool) -> Plan:
    problem, choice = solution.problem, solution.choice
    assert choice is not None
    table, arrangement = problem.table, choice.arrangement
    policies = policies_for(problem, choice.level)
    saves = problem.saves
    nonweight = Memory(table).at(policies) + saves.device_bytes
    layout = lay_out(problem, arrangement)
    on_disk = arrangement.disk_bytes
    timeline = replay(table, layout.items, layout.residences, policies, layout.pageable)
    ranks, staging = table.ranks, problem.staged_bytes(arrangement.host_bytes, reads_disk=on_disk > 0)
    ram_parts = {
        "weights": arrangement.host_bytes,
        "activations": ranks.node_bytes(0, saves.host_bytes),
        "optimizer": ranks.node_bytes(0, table.state_on_host_bytes),
        "staging": staging,
    }
    reduce_s = ranks.unhidden_s(timeline.access_end_s)
    tails = [arrangement.tail_bytes_at(index) for index in range(problem.length)]
    beside = nonweight + np.asarray(tails, dtype=np.int64)
    at = int(beside.argmax())
    parts = _vram_parts(table, policies, at)
    parts["weights"] = arrangement.device_bytes - arrangement.slots_bytes
    parts["slots"] = arrangement.slots_bytes + saves.device_bytes + tails[at]
    times_s = durations(table, policies)  # that rows are read on the host is this plan's choice
    # Of plans with the disk, and of those without where both can be had: each kind is shorter in some case.
    kinds = {on_disk > 0} | ({True, False} if problem.disk_may_help else set())
    least_s = min(window_bound(problem, times_s, nonweight, disk_used) for disk_used in kinds)
    bound = max(least_s, sum(times_s))
    full, rest = divmod(said["workload"].accumulation, table.group)
    last_pass_s = 0.0
    if rest:
        fewer = replace(table, group=rest)
        last_pass_s = replay(fewer, layout.items, layout.residences, policies, layout.pageable).pass_s
    prediction = Prediction(
        compute_s=timeline.compute_s,
        pass_s=timeline.pass_s,
        last_pass_s=last_pass_s,
        step_s=full * timeline.pass_s + last_pass_s + reduce_s + _optimizer_s(table),
        reduce_s=reduce_s,
        bound_s=bound,
        stall_s=max(timeline.pass_s - timeline.compute_s, 0.0),
        binds=_binds(timeline),
        loads_per_pass=sum(s.begins == "load" and layout.items[s.item].kind == "weights" for s in layout.residences),
        loaded_bytes_per_pass=choice.moved_bytes - arrangement.rows_bytes,
        offloaded_bytes_per_pass=sum(save.size_bytes for save in saves.items if not save.stays),
        rows_bytes_per_pass=arrangement.rows_bytes,
        peaks=Peaks(
            vram_bytes=arrangement.device_bytes + int(beside.max()),
            ram_bytes=sum(ram_parts.values()),
            disk_bytes=on_disk,
        ),
        vram_peak_at=at,
        vram_parts=parts,
        ram_parts=ram_parts,
    )
    plan = Plan(
        schema_version=SCHEMA_VERSION,
        **said,
        group=table.group,
        budgets=problem.budgets,
        table=table,
        items=layout.items,
        arenas=layout.arenas,
        addresses=layout.addresses,
        residences=layout.residences,
        activations=tuple(ActivationPolicy(module=m, activations=p) for m, p in policies.items()),
        prediction=prediction,
        staging_bytes=staging // ranks.per_node,
        pins=dict(problem.pins),
        asked=dict(asked),
        elastic=elastic,
    )
    require(plan)  # the judge shares no code with what made it
    require_supported(plan)
    return plan


def _optimizer_s(table: CostTable) -> float:
    return sum(row.time_s for row in table.accesses if row.kind == "optimizer")


def _vram_parts(table: CostTable, policies: Mapping[str, Activations], at: int) -> dict[str, int]:
    """Return the device bytes at an access by kind, frozen weights apart. None is negative."""
    parts = dict.fromkeys(VRAM_KINDS, 0)
    for row in table.fixed:
        parts[row.kind] += row.size_bytes * (table.group if row.kind == "batch" else 1)
    busiest, lives = copies_at(table, policies, at)
    for life, count in lives:
        parts[life.kind] += count * life.size_bytes
    access = table.accesses[busiest]
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
