"""What was asked, and what is tried where it is to be chosen: where the optimizer's state lies, and of how many modules
activations are offloaded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from memplan.analyze.graph import Activations
from memplan.cost.optimizer_state import state_on_host
from memplan.cost.table import CostTable
from memplan.device_kinds import is_apart
from memplan.place.problem import MOST_SUBSETS, Problem, evenly, make_problem, subsets
from memplan.program.page_lock import is_state_locked
from memplan.program.schema import Budgets, StateHome, Tier

_PARTS = 6
"""So many different numbers of modules are tried first, beside none."""


def state_away(table: CostTable, page_lock_bytes: int | None) -> CostTable:
    """Return the cost rows with the optimizer's state in RAM, where no more than so much may be page-locked."""
    away = state_on_host(table)
    if not is_apart(table.device) or is_state_locked(away.state_on_host_bytes, page_lock_bytes):
        return away
    return state_on_host(table, is_pageable=True)


class Task(NamedTuple):
    """What was asked."""

    table: CostTable
    budgets: Budgets
    staging_bytes: int
    pins: Mapping[int, Tier]
    activations: Mapping[str, Activations]
    """Of the modules for which they are not to be chosen."""
    optimizer_state: StateHome | None = None
    """None: where that is to be chosen."""
    elastic: bool = False

    def problem(self) -> Problem:
        """Return the problem with these rows and activations. Raises InputError as :func:`make_problem` does."""
        return make_problem(self.table, self.budgets, self.staging_bytes, self.pins, self.activations)

    def tables(self) -> tuple[CostTable, ...]:
        """Return the cost rows with the optimizer's state where it may lie; both where it is to be chosen, on a device
        whose memory is its own, since the CPU's is where it would go.
        """
        away = state_away(self.table, self.budgets.page_lock_bytes)
        if self.optimizer_state == "host":
            return (away,)
        is_one = self.optimizer_state == "device" or away is self.table or not is_apart(self.table.device)
        return (self.table,) if is_one else (self.table, away)

    def problems(self) -> Iterator[Problem]:
        """Yield the problems that are solved: with what was asked, with more offloaded, with the optimizer's state in
        RAM.
        """
        for rows in self.tables():
            variants = Variants(rows, self.activations)
            for given in (self.activations, *variants.every, *map(variants.of, variants.counts)):
                yield self._replace(table=rows, activations=given).problem()


class Variants:
    """What was asked, with the activations of some of the other modules offloaded, evenly spread.

    There is none on the CPU, whose own memory is where they would go, nor where groups pass: an item has one place, and
    each micro-batch of a group would have its own.
    """

    def __init__(self, table: CostTable, given: Mapping[str, Activations]) -> None:
        can = {access.module for access in table.accesses if access.kind == "forward" and access.offload_bytes}
        is_none = not is_apart(table.device) or table.group > 1
        self._given = given
        self._free = [m for m in table.recomputable if m in can and m not in given and not is_none]
        few = len(self._free) <= MOST_SUBSETS
        self.every = [self._with(chosen) for chosen in subsets(self._free)[1:]] if few else []
        """Every choice of modules, where there are few."""
        self.most = 0 if few else len(self._free)
        """Modules that may be, where there are more."""
        parts = range(1, _PARTS + 1) if self.most else ()
        self.counts = sorted({-(-self.most * part // _PARTS) for part in parts})
        """Numbers of them that are tried first."""

    def of(self, count: int) -> dict[str, Activations]:
        """Return the activations with those of ``count`` modules offloaded."""
        return self._with([self._free[i] for i in evenly(count, self.most)])

    def _with(self, chosen: Sequence[str]) -> dict[str, Activations]:
        return {**self._given, **dict.fromkeys(chosen, "offload")}
