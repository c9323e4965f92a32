"""The sentences of a report, the same on a terminal and on a page."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from memplan.device_kinds import is_apart
from memplan.show.glyphs import Glyphs
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan, Workload
    from memplan.show.summary import Facts, Measured

_NOTHING = 1e-9
"""A share below this is what rounding leaves of none."""
_BINDS = {"compute": "compute-bound", "link": "PCIe-bound", "disk": "disk-bound"}
_CPU_BINDS = {**_BINDS, "link": "copy-bound"}
"""Beside the CPU blocks are copied within its RAM."""


def subject(plan: Plan, glyphs: Glyphs) -> str:
    """Return what is trained, on what: micro-batch, how many of them a step has, hardware."""
    workload = plan.workload
    shapes = {name: f" {glyphs.times} ".join(map(str, shape)) for name, shape in workload.batch.items() if shape}
    if len(set(shapes.values())) == 1:
        batch = f"micro-batch {next(iter(shapes.values()))}"
    else:
        batch = "micro-batch " + ", ".join(f"{glyphs.safe(name)} {shape}" for name, shape in shapes.items())
    where = f"{glyphs.safe(plan.hardware)} ({glyphs.safe(plan.table.device)})"
    return f"{batch} ({workload.size}), {workload.accumulation} per step{shared(plan)}, on {where}"


def shared(plan: Plan) -> str:
    """Return how many micro-batches share each load, as the end of a clause; empty where each loads for itself."""
    return f", {plan.group} share each load" if plan.group > 1 else ""


def cycle(plan: Plan) -> str:
    """Return what a pass of the plan is: a micro-batch, or a group of them."""
    return f"group of {plan.group}" if plan.group > 1 else "micro-batch"


def trained(plan: Plan, glyphs: Glyphs) -> str:
    """Return the model, its adapter and the optimizer."""
    how = ", ".join(part for part in (plan.workload.adapter, plan.workload.optimizer) if part)
    return glyphs.safe(f"{plan.model}: {how}" if how else plan.model)


def fits(plan: Plan) -> str:
    """Return what the plan needs of the budgets that it keeps."""
    peaks, budgets = plan.prediction.peaks, plan.budgets
    text = f"{_share(peaks.vram_bytes, budgets.vram_bytes)} vram"
    if peaks.ram_bytes:
        text += f", {_share(peaks.ram_bytes, budgets.ram_bytes)} ram"
    return text + "."


def step(plan: Plan, facts: Facts, glyphs: Glyphs, *, with_rate: bool = False) -> str:
    """Return the time of a step, and beside what it is slower or faster. ``with_rate``: and its tokens a second."""
    shown = f"{glyphs.seconds(plan.prediction.step_s)} per step"
    if with_rate and facts.tokens_per_s is not None:
        shown += f", {rate(facts.tokens_per_s)} {plan.workload.unit}/s"
    return f"{shown}, {binds(plan, glyphs)}: {speed(facts)}."


def speed(facts: Facts) -> str:
    """Return how much longer or shorter a step is than without memplan."""
    ratio, than = facts.step_ratio, facts.baseline
    if ratio is None:
        return "the time is not known"
    if abs(ratio - 1) < 0.0005:
        return f"as fast as {than}"
    if ratio < 1:
        return f"{percent(1 - ratio)} faster than {than}"
    if ratio >= 2:
        return f"{ratio:.{0 if ratio >= 10 else 1}f} times as long as {than}"
    return f"{percent(ratio - 1)} slower than {than}"


def binds(plan: Plan, glyphs: Glyphs) -> str:
    """Return what sets the time of a micro-batch."""
    names = _CPU_BINDS if not is_apart(plan.table.device) else _BINDS
    return names.get(plan.prediction.binds, f"{glyphs.safe(plan.prediction.binds)}-bound")


def why_slower(facts: Facts) -> str:
    """Return what makes a micro-batch slower than one with everything kept; empty where nothing does."""
    why = [
        f"{percent(part)} {name}"
        for part, name in ((facts.recompute_slowdown, "recompute"), (facts.stall_slowdown, "waiting"))
        if part is not None and part >= 0.0005
    ]
    return f"Slower than everything kept by {' and '.join(why)}." if why else ""


def gains(plan: Plan, glyphs: Glyphs) -> list[str]:
    """Return what would make a micro-batch shorter, and by how much; the most first."""
    pass_s = plan.prediction.pass_s
    return [
        f"With {_CHANGED[gain.of](gain.more)} a {cycle(plan)} would be {glyphs.seconds(pass_s - gain.pass_s)} "
        f"({percent(1 - gain.pass_s / pass_s)}) shorter."
        for gain in sorted(plan.gains, key=lambda gain: gain.pass_s)
    ]


_CHANGED: dict[str, Callable[[int], str]] = {
    "vram": lambda more: f"{format_bytes(more)} more vram",
    "ram": lambda more: f"{format_bytes(more)} more ram",
    "link": lambda more: f"a PCIe link that is {format_bytes(more)}/s faster",
    "loss": lambda more: f"the loss in chunks of {more:,} tokens",
}


def bound(plan: Plan, facts: Facts, glyphs: Glyphs) -> str:
    """Return how far a micro-batch is above the lower bound: the least time of any plan of these blocks."""
    gap, least = facts.bound_gap, glyphs.seconds(plan.prediction.bound_s)
    if gap is None:
        return "No bound is known for these blocks."
    if gap < _NOTHING:
        return f"At the lower bound ({least}): no plan of these blocks is faster."
    return f"At most {gap_up(gap)} above the lower bound of these blocks ({least})."


def gap_up(gap: float) -> str:
    """Return a distance to the bound in percent, rounded up: "within" may not promise too much."""
    return "0%" if gap < _NOTHING else f"{max(1, math.ceil(gap * 1000 - 1e-6)) / 10:.1f}%"


def whole_run(workload: Workload) -> str:
    """Return the steps of a run whose steps are known."""
    steps = plural(workload.steps or 0, "step", "steps")
    if workload.examples is None or workload.epochs is None:
        return steps
    epochs = plural(workload.epochs, "epoch", "epochs")
    return f"{epochs} of {plural(workload.examples, 'example', 'examples')} ({steps})"


def over_budget(plan: Plan, seen: Measured | None) -> str:
    """Return by how much a run left the vram budget; empty where it kept it, or nobody looked. What was reserved may
    take the margin too.
    """
    if seen is None or seen.vram_bytes is None:
        return ""
    limit = plan.budgets.vram_bytes
    if seen.vram_bytes > limit:
        return f"The run went {format_bytes(seen.vram_bytes - limit)} over the vram budget."
    limit += plan.budgets.margin_bytes
    if seen.vram_reserved_bytes is None or seen.vram_reserved_bytes <= limit:
        return ""
    return (
        f"The run kept the vram budget, but torch reserved {format_bytes(seen.vram_reserved_bytes - limit)} beyond it "
        "(fragmentation): leave a larger margin."
    )


def place(plan: Plan, index: int, glyphs: Glyphs) -> str:
    """Return an access in words."""
    access = plan.table.accesses[index]
    if access.kind in ("loss", "optimizer"):
        return {"loss": "the loss", "optimizer": "the optimizer step"}[access.kind]
    name = "the whole model" if access.module == "." else glyphs.safe(access.module)
    return f"the {access.kind} of {name}"


def ram_by_lock(plan: Plan, facts: Facts) -> list[tuple[str, int]]:
    """Return the bytes of the ram peak that are pinned for a GPU, and those that are not."""
    ram = plan.prediction.peaks.ram_bytes
    if not is_apart(plan.table.device) or not ram:
        return []
    return [("pinned", facts.page_locked_bytes), ("pageable", ram - facts.page_locked_bytes)]


def page_locks(plan: Plan, facts: Facts) -> list[str]:
    """Return, in a sentence, what a limit on pinned RAM does to a plan; none where it does nothing."""
    slow = [block.size_bytes for block in facts.blocks if block.is_pageable]
    limit = plan.budgets.page_lock_bytes
    if limit is None or not any(arena.pageable for arena in plan.arenas):
        return []
    return [
        f"No more than {format_bytes(limit)} of ram may be pinned: {plural(len(slow), 'block', 'blocks')} "
        f"({format_bytes(sum(slow))}) come from pageable ram, which is slower."
    ]


def run(record: RunRecord, glyphs: Glyphs) -> str:
    """Return how long a run was, and where."""
    trained = plural(record.passes, "micro-batch", "micro-batches")
    return f"{trained} in {glyphs.seconds(record.wall_s)} on {glyphs.safe(record.device)}"


def counts(record: RunRecord) -> str:
    """Return what was counted in a run."""
    found = [f"{record.loads:,} loads", plural(record.misses, "miss", "misses")]
    found.append(f"{plural(record.out_of_order, 'access', 'accesses')} out of order")
    if record.learned:
        found.append(f"the sequence learned again {plural(record.learned, 'time', 'times')}")
    if record.direct_reads:
        weights = plural(record.direct_reads, "weight was", "weights were")
        size = format_bytes(record.direct_read_bytes)
        found.append(f"{weights} read outside of a forward or backward ({size}, brought on demand)")
    if record.direct_writes:
        found.append(f"{plural(record.direct_writes, 'write', 'writes')} to frozen weights kept")
    if record.offload_skipped:
        forwards = plural(record.offload_skipped, "forward", "forwards")
        found.append(f"{forwards} kept activations on the device instead of offloading them")
    if record.recoveries:
        found.append(
            f"ran out of memory and continued with a smaller plan {plural(record.recoveries, 'time', 'times')}"
        )
    if record.weight_copy_bytes:
        found.append(f"{format_bytes(record.weight_copy_bytes)} of copies of weights saved that are not in the plan")
    return ", ".join(found)


def notes(plan: Plan, record: RunRecord | None) -> tuple[str, ...]:
    """Return the plan's notes, and what else a reader of its figures should know."""
    device, found = plan.table.device, plan.notes
    if device == "cpu":
        found += ("The compute device is the CPU: vram is the memory that the step itself may use.",)
    if record is not None and record.device.partition(":")[0] != device:
        found += (f"The run was on {record.device}, the plan is for {device}: their times do not compare.",)
    return found


def percent(value: float, sign: str = "") -> str:
    """Return a fraction of 1 in percent, with a digit that is not 0; ``sign="+"`` writes the plus too. None is
    ``0%``.
    """
    if abs(value) < _NOTHING:
        return "0%"
    digits = 1 if abs(value) >= 0.0005 else -math.floor(math.log10(100 * abs(value)))
    return f"{value:{sign}.{digits}%}"


def number(value: float) -> str:
    """Return a count, or the mean of counts; never as 0 where there are some."""
    if value == round(value):
        return f"{value:,.0f}"
    return f"{value:,.1f}" if value >= 0.05 else f"{value:.1g}"


def rate(value: float) -> str:
    """Return a rate, such as tokens of a second."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def plural(count: int, one: str, many: str) -> str:
    """Return a count of things."""
    return f"{count:,} {one if count == 1 else many}"


def _share(part_bytes: int, whole_bytes: int) -> str:
    return f"{format_bytes(part_bytes)} of {format_bytes(whole_bytes)}"
