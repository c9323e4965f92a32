"""The least vram for which there is a plan, and what is said where there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.errors import DoesNotFitError
from memplan.place.arrangement import Arrangement
from memplan.place.door import require_input
from memplan.place.problem import Problem, make_problem, nonweight_bytes
from memplan.place.ring import Rings
from memplan.place.search import rings
from memplan.place.variants import Variants, tables_of
from memplan.program.schema import RING_BYTES, STAGING_BYTES, Budgets, StateHome, Tier, Workload
from memplan.units import ALIGNMENT_BYTES, format_bytes

_MOST_TIPS = 4
"""That a refusal gives."""


def least_vram_bytes(
    table: CostTable,
    budgets: Budgets,
    *,
    pins: Mapping[int, Tier] | None = None,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
    optimizer_state: StateHome | None = None,
) -> int | None:
    """Return the least vram for which :func:`memplan.place.solve.place` returns a plan; None where ``ram`` and ``disk`` are too little.

    Raises InputError as that does.
    """
    require_input(table, budgets, staging_bytes)
    problems = _problems(table, budgets, staging_bytes, pins or {}, activations or {}, optimizer_state)
    least = min(_Least(problem).vram_bytes for problem in problems)
    return None if math.isinf(least) else int(least)


def _problems(
    table: CostTable,
    budgets: Budgets,
    staging_bytes: int,
    pins: Mapping[int, Tier],
    activations: Mapping[str, Activations],
    optimizer_state: StateHome | None,
) -> Iterator[Problem]:
    """Yield the problems that :func:`place` solves: with what was asked, with more offloaded, with the optimizer's state in RAM."""
    for rows in tables_of(table, optimizer_state, budgets.page_lock_bytes):
        variants = Variants(rows, activations)
        for given in (activations, *variants.every, *map(variants.of, variants.counts)):
            yield make_problem(rows, budgets, staging_bytes, pins, given)


class _Least:
    """The least vram of a problem, and what sets it."""

    def __init__(self, problem: Problem) -> None:
        nonweight = nonweight_bytes(problem)
        self.problem = problem
        self.level = min(range(len(nonweight)), key=lambda level: (int(nonweight[level].max()), level))
        self.nonweight = nonweight[self.level]
        self.smallest = _smallest(problem)
        """The room and the arrangement; None where no vram would do."""

    @property
    def vram_bytes(self) -> float:
        """In bytes; infinity where no vram would do."""
        return math.inf if self.smallest is None else self.smallest[0] + int(self.nonweight.max())


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


def does_not_fit(
    table: CostTable,
    budgets: Budgets,
    pins: Mapping[int, Tier],
    activations: Mapping[str, Activations],
    staging_bytes: int,
    optimizer_state: StateHome | None,
    workload: Workload,
) -> DoesNotFitError:
    """Return what to raise where no plan keeps the budgets: the least vram that would do, what sets it, what helps."""
    problems = _problems(table, budgets, staging_bytes, pins, activations, optimizer_state)
    of = min(map(_Least, problems), key=lambda least: least.vram_bytes)
    problem, level = of.problem, of.level
    asked = f"{problem_name(workload)} was to be trained in {format_bytes(budgets.vram_bytes)} of vram"
    if of.smallest is None:
        frozen = sum(block.size_bytes for block in problem.table.blocks)
        limited = f"ram of {format_bytes(budgets.ram_bytes)} and no room on disk for the streamed blocks"
        enough = frozen + problem.staged_bytes(frozen, reads_disk=True) + problem.budgets.ram_bytes - problem.ram_bytes
        tips = [f"give {format_bytes(enough)} of ram", "give a disk budget"]
        if problem.is_pageable(frozen, reads_disk=False):
            lock = format_bytes(problem.page_lock_bytes or 0)
            limited += f"; {lock} of ram may be page-locked, and what is not passes through {format_bytes(RING_BYTES)} of ram besides"
            tips.append("let more ram be page-locked, if the machine does")
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
    state = sum(row.size_bytes for row in problem.table.fixed if row.kind == "optimizer")
    is_choice = len(tables_of(table, optimizer_state, budgets.page_lock_bytes)) > 1  # then it was tried
    if state > least // 8 and not is_choice and not workload.optimizer.startswith("paged_"):
        tips.append('let the optimizer\'s state wait in ram between steps (optimizer_state "host")')
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
        suggestions=tuple(tips[:_MOST_TIPS]),
    )


def problem_name(workload: Workload) -> str:
    """Return a short name of the workload for messages."""
    return f"a micro-batch of {workload.tokens} tokens"
