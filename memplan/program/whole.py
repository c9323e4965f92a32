"""What training takes where every frozen block stays on the device: what people compare a plan with.

With every activation kept, and with gradient checkpointing of every layer. Sums are those of the cost rows; no plan is
made.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from memplan.cost.table import CostTable
from memplan.program.schema import Plan
from memplan.program.timeline import durations
from memplan.units import align_up


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """All weights on the device."""

    vram_bytes: int
    """At the peak; the optimizer's state is on the device too."""
    step_s: float
    """Of one step: all micro-batches and the optimizer."""


def everything_kept(plan: Plan) -> Whole:
    """Return what it takes with all weights on the device and no activation recomputed."""
    return _whole(plan, frozenset())


def checkpointing_only(plan: Plan) -> Whole | None:
    """Return what it takes with all weights on the device and each layer recomputed; None where memplan cannot set
    what any layer does: a model that checkpoints by itself is so already.
    """
    return _whole(plan, frozenset(plan.table.recomputable)) if plan.table.recomputable else None


def _whole(plan: Plan, recomputed: frozenset[str]) -> Whole:
    table = plan.table
    weights = sum(align_up(block.size_bytes) for block in table.blocks)
    pass_s = sum(durations(table, dict.fromkeys(recomputed, "recompute")))
    return Whole(
        vram_bytes=weights + max(_beside(table, recomputed), default=0),
        step_s=plan.workload.accumulation * pass_s + _optimizer_s(table),
    )


def _beside(table: CostTable, recomputed: frozenset[str]) -> list[int]:
    """Return the device bytes at the peak of each access, frozen weights apart; as
    :meth:`memplan.cost.table.CostTable.device_bytes_at`, of all accesses at once.
    """
    length = len(table.accesses)
    changes = [0] * (length + 1)
    for life in table.lifetimes:
        policy = "recompute" if table.accesses[life.born].module in recomputed else "keep"
        if life.kind != "optimizer" and life.policy in ("any", policy):
            changes[life.born] += life.size_bytes
            changes[life.last + 1] -= life.size_bytes
    always = sum(row.size_bytes for row in table.fixed) + table.state_on_host_bytes
    return [
        always + alive + row.transient("recompute" if row.module in recomputed else "keep")
        for alive, row in zip(accumulate(changes), table.accesses, strict=False)
    ]


def _optimizer_s(table: CostTable) -> float:
    """Return the optimizer's time without the copies of its state, at the link's rate, where that waits in RAM."""
    rates = (table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s)
    copies_s = sum(table.state_on_host_bytes / rate for rate in rates)
    return max(0.0, sum(row.time_s for row in table.accesses if row.kind == "optimizer") - copies_s)
