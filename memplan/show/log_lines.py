"""Lines for logs: four as a training begins under a plan, four as it ends, one per step where that is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from memplan.show import sentences as words
from memplan.show.glyphs import PLAIN
from memplan.show.summary import facts, measured
from memplan.units import GIB, format_bytes

if TYPE_CHECKING:
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan


def begin_lines(plan: Plan) -> tuple[str, ...]:
    """Return what a plan says as training begins: what is trained, memory, time, blocks."""
    said, known = plan.prediction, facts(plan)
    at = {tier: sum(block.home == tier for block in known.blocks) for tier in ("device", "host", "disk")}
    policies = list(plan.policies().values())
    parts = [f"{at['device']:,} of {words.plural(len(known.blocks), 'block', 'blocks')} stay on the device"]
    parts += [f"{at[tier]:,} streamed from {word}" for tier, word in (("host", "ram"), ("disk", "disk")) if at[tier]]
    parts.append(f"{format_bytes(said.loaded_bytes_per_pass)} loaded per {words.cycle(plan)}")
    for policy, what in (("recompute", "recomputed"), ("offload", "offloaded")):
        if policy in policies:
            parts.append(f"{words.plural(policies.count(policy), 'layer', 'layers')} {what}")
    return (
        f"{words.trained(plan, PLAIN)}, {words.subject(plan, PLAIN)}",
        f"predicted to need {words.fits(plan)}",
        f"predicted: {words.step(plan, known, PLAIN)}",
        f"{', '.join(parts)}.",
    )


def end_lines(plan: Plan, record: RunRecord, report: str | None) -> tuple[str, ...]:
    """Return what was measured beside what was predicted; ``report``: the file that has the whole report, if any."""
    seen, said = measured(plan, record), plan.prediction
    lines = [f"trained {words.run(record, PLAIN)}."]
    if seen.pass_s is not None and seen.stall_s is not None:
        error = seen.errors.get("pass_s")
        beside = "" if error is None else f", {words.percent(error, '+')}"
        lines.append(
            f"{words.cycle(plan)} {PLAIN.seconds(seen.pass_s)} (predicted {PLAIN.seconds(said.pass_s)}{beside}), of it "
            f"waiting {words.percent(seen.stall_s / seen.pass_s)}."
        )
    peaks = [
        f"{name} peak {format_bytes(value)} of {format_bytes(budget)} (predicted {format_bytes(predicted)})"
        for name, value, predicted, budget in (
            ("vram", seen.vram_bytes, said.peaks.vram_bytes, plan.budgets.vram_bytes),
            ("ram", seen.ram_bytes, said.peaks.ram_bytes, plan.budgets.ram_bytes),
        )
        if value
    ]
    if seen.vram_reserved_bytes is not None:
        peaks.insert(1, f"{format_bytes(seen.vram_reserved_bytes)} reserved by torch")
    lines.append(f"{', '.join(peaks)}." if peaks else "memory peaks were not measured.")
    if over := words.over_budget(plan, seen):
        lines.append(over)
    where = f"the report is in {report}" if report else "for tables and notes add --report FILE"
    lines.append(f"{words.counts(record)}; {where}.")
    return tuple(lines)


def step_line(step: int, scalars: Mapping[str, float]) -> str:
    """Return one step's line for people; ``scalars`` are those of :meth:`memplan.Handle.scalars`."""
    parts = [f"step {step}: micro-batch {PLAIN.seconds(scalars['memplan/pass_s'])}"]
    parts.append(f"waiting {scalars['memplan/stall_share']:.1%}")
    parts.append(f"loading {format_bytes(round(scalars['memplan/loaded_gib_per_s'] * GIB))}/s")
    if "memplan/vram_peak_gib" in scalars:
        parts.append(f"vram peak {format_bytes(round(scalars['memplan/vram_peak_gib'] * GIB))}")
    if "memplan/vram_reserved_gib" in scalars:
        parts.append(f"reserved {format_bytes(round(scalars['memplan/vram_reserved_gib'] * GIB))}")
    return ", ".join(parts)
