"""The cost rows with the optimizer's state in RAM between steps: on the device for the optimizer's step alone."""

from __future__ import annotations

from msgspec.structs import replace

from memplan.analyze.graph import Lifetime
from memplan.cost.table import CostTable


def state_on_host(table: CostTable, *, is_pageable: bool = False) -> CostTable:
    """Return the rows where the optimizer's state is brought before its step and sent back behind it; as they are where
    it is so already, or there is none.

    Nothing runs beside the two copies, so the step is longer by both of them, at the rates of the link;
    ``is_pageable``: of RAM that is not page-locked.
    """
    state_bytes = sum(row.size_bytes for row in table.fixed if row.kind == "optimizer")
    step = next((row for row in table.accesses if row.kind == "optimizer"), None)
    if step is None or not state_bytes:
        return table
    rates = (table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s)
    slow = table.pageable_bytes_per_s
    copies_s = sum(state_bytes / (min(rate, slow) if is_pageable and slow is not None else rate) for rate in rates)
    there = replace(step, time_s=step.time_s + copies_s)
    life = Lifetime(kind="optimizer", born=step.index, last=step.index, size_bytes=state_bytes, policy="any")
    return replace(
        table,
        accesses=(*table.accesses[: step.index], there, *table.accesses[step.index + 1 :]),
        lifetimes=(*table.lifetimes, life),
        fixed=tuple(row for row in table.fixed if row.kind != "optimizer"),
    )
