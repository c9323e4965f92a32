"""The least vram for which there is a plan, and the least RAM and disk beside it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from msgspec.structs import replace

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.place.alternatives import Task
from memplan.place.generators import recipes
from memplan.place.layout.layout import Arrangement
from memplan.place.layout.ring_layout import Rings
from memplan.place.problem import Problem, nonweight_bytes
from memplan.place.validate import require_input
from memplan.program.schema import STAGING_BYTES, Budgets, StateHome, Tier
from memplan.units import ALIGNMENT_BYTES


def least_vram_bytes(
    table: CostTable,
    budgets: Budgets,
    *,
    pins: Mapping[int, Tier] | None = None,
    activations: Mapping[str, Activations] | None = None,
    staging_bytes: int = STAGING_BYTES,
    optimizer_state: StateHome | None = None,
) -> int | None:
    """Return the least vram for which :func:`memplan.place.solve.place` returns a plan; None where ``ram`` and ``disk``
    are too little.

    Raises InputError as that does.
    """
    require_input(table, budgets, staging_bytes)
    task = Task(table, budgets, staging_bytes, pins or {}, activations or {}, optimizer_state)
    least = min(Least(problem).vram_bytes for problem in task.problems())
    return None if math.isinf(least) else int(least)


class Least:
    """The least vram of a problem, and what sets it."""

    def __init__(self, problem: Problem) -> None:
        nonweight = nonweight_bytes(problem)
        self.problem = problem
        self.level = min(range(len(nonweight)), key=lambda level: (int(nonweight[level].max()), level))
        self.nonweight = nonweight[self.level]
        self.smallest = _smallest(problem)
        """The room and the arrangement; None where no vram would do."""

    def within(self, budgets: Budgets) -> Problem:
        """Return the problem with other budgets."""
        return dataclasses.replace(self.problem, budgets=budgets)

    @property
    def vram_bytes(self) -> float:
        """In bytes; infinity where no vram would do."""
        return math.inf if self.smallest is None else self.smallest[0] + int(self.nonweight.max())


def _smallest(problem: Problem) -> tuple[int, Arrangement] | None:
    """Return the least room for which there is an arrangement, and that; None where ``ram`` and ``disk`` are too
    little.
    """
    listed, made_in = list(recipes(problem)), Rings(problem)

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


class Spared(NamedTuple):
    """RAM and disk of one arrangement."""

    ram_bytes: int
    disk_bytes: int


def fitting(least: Least, budgets: Budgets) -> list[Spared]:
    """Return what each arrangement within ``budgets`` takes that is tried; empty where there is none.

    :func:`memplan.place.solve.place` returns a plan where there is one.
    """
    problem = least.within(budgets)
    room = (budgets.vram_bytes - int(least.nonweight.max())) // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    if room < 0 or problem.ram_bytes < 0:
        return []
    made_in = Rings(problem)
    found = [made for ring in recipes(problem) if (made := made_in.arrange(ring, room)) is not None]
    beside = budgets.ram_bytes - problem.ram_bytes
    return [
        Spared(
            beside + made.host_bytes + problem.staged_bytes(made.host_bytes, reads_disk=made.reads_disk),
            made.disk_bytes,
        )
        for made in found
    ]


_PLENTY = 1 << 60
"""More bytes than any arrangement takes."""


def least_ram_bytes(problems: Iterable[Least], budgets: Budgets) -> int | None:
    """Return the least RAM with which something fits the other budgets, to a step of alignment; None where none would
    do.
    """
    best: int | None = None
    for least in problems:
        spared = fitting(least, replace(budgets, ram_bytes=_PLENTY))
        if not spared:
            continue
        low, high = (
            -1,
            -(-min(one.ram_bytes for one in spared) // ALIGNMENT_BYTES),
        )  # nothing fits in low, something in high
        if best is not None and not fitting(least, replace(budgets, ram_bytes=best - ALIGNMENT_BYTES)):
            continue
        if not fitting(least, replace(budgets, ram_bytes=high * ALIGNMENT_BYTES)):
            high = _PLENTY // ALIGNMENT_BYTES
        while high - low > 1:
            middle = (low + high) // 2
            if fitting(least, replace(budgets, ram_bytes=middle * ALIGNMENT_BYTES)):
                high = middle
            else:
                low = middle
        best = high * ALIGNMENT_BYTES if best is None else min(best, high * ALIGNMENT_BYTES)
    return best


def least_disk_bytes(problems: Iterable[Least], budgets: Budgets) -> int | None:
    """Return disk with which something fits the other budgets; None where none would do, or any amount may be used
    already.
    """
    if budgets.disk_bytes is None:
        return None
    found = (fitting(least, replace(budgets, disk_bytes=None)) for least in problems)
    return min((one.disk_bytes for spared in found for one in spared), default=None)
