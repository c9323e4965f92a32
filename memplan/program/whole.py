"""What training takes where every frozen block stays on the device: what people compare a plan with.

With every activation kept, and with gradient checkpointing of every layer. Sums are those of the cost rows; no plan is
made.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from memplan.analyze.graph import Activations
from memplan.cost.group import grouped
from memplan.cost.table import CostTable
from memplan.program.schema import Plan
from memplan.program.timeline import durations
from memplan.units import align_up

_RECOMPUTE: Activations = "recompute"


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
    table, policies = grouped(plan.table, 1, plan.workload.accumulation), dict.fromkeys(recomputed, _RECOMPUTE)
    weights = sum(align_up(block.size_bytes) for block in table.blocks)
    # State that waits in RAM is among the bytes of the optimizer's step alone.
    state = table.state_on_host_bytes
    beside = zip(table.device_bytes(policies), table.accesses, strict=True)
    times_s = durations(table, policies)
    ends_s = list(accumulate(times_s))
    return Whole(
        vram_bytes=weights + max(size + (0 if row.kind == "optimizer" else state) for size, row in beside),
        step_s=plan.workload.accumulation * sum(times_s) + table.ranks.unhidden_s(ends_s) + _optimizer_s(table),
    )


def _optimizer_s(table: CostTable) -> float:
    """Return the optimizer's time without the copies of its state, at the link's rate, where that waits in RAM."""
    rates = (table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s)
    copies_s = sum(table.state_on_host_bytes / rate for rate in rates)
    return max(0.0, sum(row.time_s for row in table.accesses if row.kind == "optimizer") - copies_s)
