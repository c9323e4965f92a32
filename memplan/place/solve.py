"""The solver: rings over all numbers of recomputed modules, judged by the timeline, and what it says where nothing fits."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import NotRequired, TypedDict, Unpack

import numpy as np

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.errors import DoesNotFitError
from memplan.place.arrangement import Arrangement, lay_out
from memplan.place.baselines import Way
from memplan.place.bound import window_bound
from memplan.place.door import require_input
from memplan.place.pieces import split
from memplan.place.problem import Bytes, Memory, Problem, make_problem, policies_for
from memplan.place.ring import Rings
from memplan.place.search import Choice, Search, rings
from memplan.place.variants import Variants
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
from memplan.units import ALIGNMENT_BYTES, format_bytes

_BINDS_SHARE = 0.01
"""A stall below this share of the pass is rounding of the real machine: compute binds."""

_HALVINGS = 3
"""Numbers of offloading modules are tried ever nearer to the best, so often by half the distance."""

_MUCH = 3e-3
"""Blocks are split where a pass is longer than it need be by more than this share of it,"""

_WORTH = 1e-3
"""and where that makes it shorter by more than this."""

_MOST_TIPS = 4
"""That a refusal gives."""


class Said(TypedDict):
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
    **said: Unpack[Said],
) -> Plan:
    """Return the plan with the shortest pass that keeps the budgets. Same input, same plan.

    ``pins``: tier by block id. ``activations``: what becomes of a module's, where that is not to be chosen here.
    ``pieces``: whether blocks may be split into their natural parts where that buys time; the plan's table then has these
    for blocks. ``elastic``: whether the device arena may have bytes beyond what the access with the least room allows, which
    are given back around it; None: on the CPU alone, since no GPU has proven it. Raises DoesNotFitError with the least
    vram for which this returns a plan, InputError for a pin or activations that cannot be kept, and for budgets or a table
    that cannot be (see :mod:`memplan.place.door`).
    """
    require_input(table, budgets, staging_bytes)
    asked = activations or {}
    elastic = table.device == "cpu" if elastic is None else elastic
    solution = plain = _solve(table, budgets, staging_bytes, pins or {}, asked, elastic)
    if plain.may_gain_by_offloading:
        solution = _with_offloads(plain, table, budgets, staging_bytes, pins or {}, asked, elastic)
    if solution.choice is None:
        smallest = min(
            (_Least(p) for p in _problems(table, budgets, staging_bytes, pins or {}, asked)),
            key=lambda least: least.vram_bytes,
        )
        raise _does_not_fit(smallest, said["workload"])
    # What is offloaded may be better as long as blocks are whole, and worse than what is not where they are split.
    for whole in dict.fromkeys((plain, solution)) if pieces else ():
        if whole.choice is None or not whole.leaves_much:
            continue
        finer, finer_pins = split(table, pins or {})
        if finer is not table:
            given, near = whole.problem.activations, whole.choice.recomputed
            other = _solve(finer, budgets, staging_bytes, finer_pins, given, elastic, solution.choice, near)
            solution = other if other.choice is not None else solution
    plan = _plan(solution, asked, said)
    require(plan)  # the judge shares no code with what made it
    return plan


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
    """Return a pass in s that :func:`place` reaches at least, without splitting blocks or offloading more; None where that
    does not fit, or takes ``below_s`` or longer.
    """
    problem = make_problem(table, budgets, staging_bytes, pins or {}, activations or {})
    elastic = table.device == "cpu" if elastic is None else elastic
    choice = Search(problem, _nonweight(problem), below_s, elastic=elastic).best(climb=False)
    return None if choice is None else choice.pass_s


def place_as(
    way: Way,
    table: CostTable,
    budgets: Budgets,
    *,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
    **said: Unpack[Said],
) -> Plan | None:
    """Return the plan that another way of placing comes to, on the same timeline; None where it does not fit.

    As for :func:`place`; these ways know no pins.
    """
    require_input(table, budgets, staging_bytes)
    problem = make_problem(table, budgets, staging_bytes, {}, activations or {})
    nonweight = _nonweight(problem)
    search = Search(problem, nonweight)
    solution = _Solution(problem=problem, nonweight=nonweight, choice=search.as_others(way), least_s=0.0)
    if solution.choice is None:
        return None
    plan = _plan(solution, activations or {}, said)
    require(plan)
    return plan


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Solution:
    problem: Problem
    nonweight: list[Bytes]
    """Device bytes at each access apart from frozen weights, by number of recomputed modules."""
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


def _solve(
    table: CostTable,
    budgets: Budgets,
    staging_bytes: int,
    pins: Mapping[int, Tier],
    activations: Mapping[str, Activations],
    elastic: bool,
    than: Choice | None = None,
    near: int | None = None,
) -> _Solution:
    """``than``: what is not better is no choice. ``near``: about the best number of recomputed modules, where it is known."""
    problem = make_problem(table, budgets, staging_bytes, pins, activations)
    nonweight = _nonweight(problem)
    search = Search(problem, nonweight, None if than is None else than.pass_s * (1 - _WORTH), elastic=elastic)
    choice = search.best(near)
    return _Solution(problem=problem, nonweight=nonweight, choice=choice, least_s=search.least_of_all_s)


def _with_offloads(
    solution: _Solution,
    table: CostTable,
    budgets: Budgets,
    staging_bytes: int,
    pins: Mapping[int, Tier],
    asked: Mapping[str, Activations],
    elastic: bool,
) -> _Solution:
    """Return what is better where activations are offloaded too: of ever more modules, then of about as many as the best."""
    variants = Variants(table, asked)
    for given in variants.every:
        other = _solve(table, budgets, staging_bytes, pins, given, elastic, solution.choice)
        solution = other if other.choice is not None else solution
    found, tried = {0: solution}, {0}
    best = 0

    def look(counts: Iterable[int]) -> None:
        nonlocal best
        for count in sorted({count for count in counts if 0 < count <= variants.most} - tried):
            tried.add(count)
            other = _solve(table, budgets, staging_bytes, pins, variants.of(count), elastic, found[best].choice)
            if other.choice is not None:
                found[count], best = other, count

    look(variants.counts)
    step = variants.counts[0] if variants.counts else 0
    for _ in range(_HALVINGS if found[best].choice is not None else 0):
        step = -(-step // 2)
        look((best - step, best + step))
    return found[best]


def _nonweight(problem: Problem) -> list[Bytes]:
    """Return the device bytes at each access apart from frozen weights, by number of recomputed modules."""
    memory, slots_bytes = Memory(problem.table), problem.saves.device_bytes
    return [memory.at(policies_for(problem, level)) + slots_bytes for level in range(problem.levels)]


def least_vram_bytes(
    table: CostTable,
    budgets: Budgets,
    *,
    pins: Mapping[int, Tier] | None = None,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
) -> int | None:
    """Return the least vram for which :func:`place` returns a plan; None where ``ram`` and ``disk`` are too little.

    Raises InputError as :func:`place` does.
    """
    require_input(table, budgets, staging_bytes)
    problems = _problems(table, budgets, staging_bytes, pins or {}, activations or {})
    least = min(_Least(problem).vram_bytes for problem in problems)
    return None if math.isinf(least) else int(least)


def _problems(
    table: CostTable,
    budgets: Budgets,
    staging_bytes: int,
    pins: Mapping[int, Tier],
    activations: Mapping[str, Activations],
) -> Iterator[Problem]:
    """Yield the problems that :func:`place` solves: with what was asked, and with more offloaded."""
    variants = Variants(table, activations)
    for given in (activations, *variants.every, *map(variants.of, variants.counts)):
        yield make_problem(table, budgets, staging_bytes, pins, given)


class _Least:
    """The least vram of a problem, and what sets it."""

    def __init__(self, problem: Problem) -> None:
        nonweight = _nonweight(problem)
        self.problem = problem
        self.level = min(range(len(nonweight)), key=lambda level: (int(nonweight[level].max()), level))
        self.nonweight = nonweight[self.level]
        self.smallest = _smallest(problem)
        """The room and the arrangement; None where no vram would do."""

    @property
    def vram_bytes(self) -> float:
        """In bytes; infinity where no vram would do."""
        return math.inf if self.smallest is None else self.smallest[0] + int(self.nonweight.max())


# ---- what does not fit ----------------------------------------------------------------------------------------------


def _smallest(problem: Problem) -> tuple[int, Arrangement] | None:
    """Return the least room for which there is an arrangement, and that; None where ``ram`` and ``disk`` are too little."""
    listed, made_in = list(rings(problem)), Rings(problem)

    def first(room_bytes: int) -> Arrangement | None:
        made = (made_in.arrange(ring, room_bytes) for ring in listed)
        return next((found for found in made if found is not None), None)

    low, high = -1, 2 * sum(problem.sizes_bytes) // ALIGNMENT_BYTES  # nothing fits in low, all that can fits in high
    found = first(high * ALIGNMENT_BYTES)
    while found is not None and high - low > 1:
        middle = (low + high) // 2
        less = first(middle * ALIGNMENT_BYTES)
        if less is None:
            low = middle
        else:
            found, high = less, middle
    return None if found is None else (high * ALIGNMENT_BYTES, found)


def _does_not_fit(of: _Least, workload: Workload) -> DoesNotFitError:
    problem, level = of.problem, of.level
    budgets = problem.budgets
    asked = f"{problem_name(workload)} was to be trained in {format_bytes(budgets.vram_bytes)} of vram"
    if of.smallest is None:
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
    peak = int(of.nonweight.max())
    room, smallest = of.smallest
    least = peak + room
    shown = format_bytes(least)
    if shown == format_bytes(budgets.vram_bytes):
        shown = f"{least - budgets.vram_bytes} bytes more"
    access = problem.table.accesses[int(of.nonweight.argmax())]
    where = f"the {access.kind}" + (f" of {access.module}" if access.module else "")
    how = (
        f", {len(problem.recomputed_at(level))} of {len(problem.table.recomputable)} modules recomputed"
        if level
        else ""
    )
    limited = (
        f"{format_bytes(peak)} of activations, adapters and optimizer state at {where}{how}, beside weights of "
        f"{format_bytes(room)} ({format_bytes(smallest.slots_bytes)} of it slots)"
    )
    fixed = sum(row.size_bytes for row in problem.table.fixed)
    tips = [f"give at least {format_bytes(least)} of vram ({least} bytes)"]
    no_staging = budgets.disk_bytes != 0 and budgets.ram_bytes < problem.staging_bytes
    if no_staging:
        staging = format_bytes(problem.staging_bytes)
        limited += f"; the disk is read through {staging} of ram, and there are {format_bytes(budgets.ram_bytes)}"
        tips.append(f"give at least {staging} of ram, so that blocks may be read from the disk")
    elif smallest.device_bytes > 4 * smallest.slots_bytes and len(smallest.homes) < len(problem.movable):
        tips.append("give more ram or a disk budget, so that more blocks may leave the device")
    if fixed > least // 4:
        tips.append("use a smaller adapter rank or an optimizer with less state")
    if len(tips) < 2 or peak - fixed > smallest.device_bytes // 4:
        tips.append(
            "use a smaller micro-batch with more accumulation, or shorter sequences: activations shrink with them"
        )
    looked = any(row.offload_bytes for row in problem.table.accesses)
    if level and not looked and problem.table.device != "cpu" and len(tips) < _MOST_TIPS:
        tips.append('let activations wait in ram too (activations "any"), which may need less vram')
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


def _plan(solution: _Solution, asked: Mapping[str, Activations], said: Said) -> Plan:
    problem, choice = solution.problem, solution.choice
    assert choice is not None
    nonweight = solution.nonweight[choice.recomputed]
    table, arrangement = problem.table, choice.arrangement
    policies = policies_for(problem, choice.recomputed)
    saves = problem.saves
    layout = lay_out(problem, arrangement)
    timeline = replay(table, layout.items, layout.residences, policies)
    on_disk = arrangement.disk_bytes
    staging = problem.staging_bytes if on_disk else 0
    tails = [arrangement.tail_bytes_at(index) for index in range(problem.length)]
    beside = nonweight + np.asarray(tails, dtype=np.int64)
    at = int(beside.argmax())
    parts = _vram_parts(table, policies, at)
    parts["weights"] = arrangement.device_bytes - arrangement.slots_bytes
    parts["slots"] = arrangement.slots_bytes + saves.device_bytes + tails[at]
    times_s = durations(table, policies)  # that rows are read on the host is this plan's choice
    bound = max(window_bound(problem, times_s, nonweight, on_disk > 0), sum(times_s))
    optimizer_s = sum(row.time_s for row in table.accesses if row.kind == "optimizer")
    prediction = Prediction(
        compute_s=timeline.compute_s,
        pass_s=timeline.pass_s,
        step_s=said["workload"].accumulation * timeline.pass_s + optimizer_s,
        bound_s=bound,
        stall_s=max(timeline.pass_s - timeline.compute_s, 0.0),
        binds=_binds(timeline),
        loads_per_pass=sum(s.begins == "load" and layout.items[s.item].kind == "weights" for s in layout.residences),
        loaded_bytes_per_pass=choice.moved_bytes - arrangement.rows_bytes,
        offloaded_bytes_per_pass=sum(save.size_bytes for save in saves.items if not save.stays),
        rows_bytes_per_pass=arrangement.rows_bytes,
        peaks=Peaks(
            vram_bytes=arrangement.device_bytes + int(beside.max()),
            ram_bytes=arrangement.host_bytes + saves.host_bytes + staging,
            disk_bytes=on_disk,
        ),
        vram_peak_at=at,
        vram_parts=parts,
        ram_parts={"weights": arrangement.host_bytes, "activations": saves.host_bytes, "staging": staging},
    )
    return Plan(
        schema_version=SCHEMA_VERSION,
        **said,
        budgets=problem.budgets,
        table=table,
        items=layout.items,
        arenas=layout.arenas,
        addresses=layout.addresses,
        residences=layout.residences,
        activations=tuple(ActivationPolicy(module=m, activations=p) for m, p in policies.items()),
        prediction=prediction,
        staging_bytes=staging,
        pins=dict(problem.pins),
        asked=dict(asked),
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
