"""Which activations are offloaded, where that is to be chosen: the numbers of modules that are tried."""

from __future__ import annotations

from collections.abc import Mapping

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.place.problem import evenly

_PARTS = 6
"""So many different numbers of modules are tried first, beside none."""


class Variants:
    """What was asked, with the activations of some of the other modules offloaded, evenly spread.

    There is none on the CPU, whose own memory is where they would go.
    """

    def __init__(self, table: CostTable, given: Mapping[str, Activations]) -> None:
        can = {access.module for access in table.accesses if access.kind == "forward" and access.offload_bytes}
        on_cpu = table.device == "cpu"
        self._given = given
        self._free = [m for m in table.recomputable if m in can and m not in given and not on_cpu]
        self.most = len(self._free)
        parts = range(1, _PARTS + 1) if self.most else ()
        self.counts = sorted({-(-self.most * part // _PARTS) for part in parts})
        """Numbers of modules that are tried first."""

    def of(self, count: int) -> dict[str, Activations]:
        """Return the activations with those of ``count`` modules offloaded."""
        return {**self._given, **dict.fromkeys([self._free[i] for i in evenly(count, self.most)], "offload")}
