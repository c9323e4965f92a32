"""Lines for logs: three when a plan is put to work, one a step where it is asked for. Their form is fixed: people grep
them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memplan.show.glyphs import PLAIN
from memplan.show.summary import facts
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from memplan.program.schema import Plan


def startup_lines(plan: Plan) -> tuple[str, str, str]:
    """Return what a plan says, in three lines of ``key=value``: memory, speed, blocks. Bytes are whole, times are
    seconds.
    """
    said, budgets, known = plan.prediction, plan.budgets, facts(plan)
    homes = {tier: [b for b in known.blocks if b.home == tier] for tier in ("device", "host", "disk")}
    policies = list(plan.policies().values())
    memory = (
        f"memory: vram={said.peaks.vram_bytes} of={budgets.vram_bytes} ram={said.peaks.ram_bytes} "
        f"of={budgets.ram_bytes} disk={said.peaks.disk_bytes}"
    )
    speed = (
        f"speed: pass_s={said.pass_s:.6g} compute_s={said.compute_s:.6g} stall_s={said.stall_s:.6g} "
        f"bound_s={said.bound_s:.6g} binds={said.binds}"
    )
    counts = " ".join(f"{tier}={len(blocks)}" for tier, blocks in homes.items())
    blocks = (
        f"blocks: {counts} loaded_bytes_per_pass={said.loaded_bytes_per_pass} recomputed={policies.count('recompute')} "
        f"offloaded={policies.count('offload')}"
    )
    return memory, speed, blocks


def step_line(step: int, scalars: Mapping[str, float]) -> str:
    """Return one step's line for people; ``scalars`` are those of :meth:`memplan.Handle.scalars`."""
    parts = [f"step {step}: pass {PLAIN.seconds(scalars['memplan/pass_s'])}"]
    parts.append(f"waiting {scalars['memplan/stall_share']:.1%}")
    parts.append(f"loading {format_bytes(round(scalars['memplan/loaded_gib_per_s'] * GIB))}/s")
    if "memplan/vram_peak_gib" in scalars:
        parts.append(f"vram peak {format_bytes(round(scalars['memplan/vram_peak_gib'] * GIB))}")
    return ", ".join(parts)
