"""What is tried where it is to be chosen: where the optimizer's state lies, and of how many modules activations are
offloaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from memplan.analyze.graph import Activations
from memplan.cost.optimizer_state import state_on_host
from memplan.cost.table import CostTable
from memplan.place.problem import MOST_SUBSETS, evenly, subsets
from memplan.program.page_lock import is_state_locked
from memplan.program.schema import StateHome

_PARTS = 6
"""So many different numbers of modules are tried first, beside none."""


def state_away(table: CostTable, page_lock_bytes: int | None) -> CostTable:
    """Return the cost rows with the optimizer's state in RAM, where no more than so much may be page-locked."""
    away = state_on_host(table)
    if table.device == "cpu" or is_state_locked(away.state_on_host_bytes, page_lock_bytes):
        return away
    return state_on_host(table, is_pageable=True)


def tables_of(
    table: CostTable, optimizer_state: StateHome | None, page_lock_bytes: int | None
) -> tuple[CostTable, ...]:
    """Return the cost rows with the optimizer's state where it may lie. ``optimizer_state``: None where that is to be
    chosen: on a device whose memory is its own, since the CPU's is where it would go.
    """
    away = state_away(table, page_lock_bytes)
    if optimizer_state == "host":
        return (away,)
    return (table,) if optimizer_state == "device" or away is table or table.device == "cpu" else (table, away)


class Variants:
    """What was asked, with the activations of some of the other modules offloaded, evenly spread.

    There is none on the CPU, whose own memory is where they would go.
    """

    def __init__(self, table: CostTable, given: Mapping[str, Activations]) -> None:
        can = {access.module for access in table.accesses if access.kind == "forward" and access.offload_bytes}
        on_cpu = table.device == "cpu"
        self._given = given
        self._free = [m for m in table.recomputable if m in can and m not in given and not on_cpu]
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
