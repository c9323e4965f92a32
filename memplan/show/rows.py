"""The rows of a report's two tables, made once: the terminal and the page only set them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Literal

from memplan.program.schema import RAM_KINDS, VRAM_KINDS, Plan
from memplan.show import sentences as words
from memplan.show.summary import Facts, Measured
from memplan.units import format_bytes

Rank = Literal["", "part", "sum"]
"""A part of a row above, or what the rows above come to."""

VRAM_LABELS = {"slots": "streaming buffer"}
"""What kinds of vram are called where that is not their name in a plan."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeRow:
    """A figure of the steady state beside what was measured; cells of a row that is not measured stay empty."""

    label: str
    predicted: float
    show: Callable[..., str] | None
    """How it is written; None: as a time."""
    is_measured: bool
    measured: float | None
    error: float | None
    """predicted / measured - 1."""
    rank: Rank = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryRow:
    """Bytes of vram, ram and disk; None where there are none to show."""

    label: str
    cells: tuple[int | None, int | None, int | None]
    rank: Rank = ""
    is_difference: bool = False
    begins: bool = False
    """Whether a line is drawn above it."""


def time_rows(plan: Plan, facts: Facts, seen: Measured | None) -> Iterator[TimeRow]:
    """Yield times and traffic of a micro-batch, or of a group of them."""
    prediction, short = plan.prediction, "group" if plan.group > 1 else "micro-batch"
    beside = {} if seen is None else asdict(seen)

    def row(
        label: str, value: float, show: Callable[..., str] | None = None, key: str = "", rank: Rank = ""
    ) -> TimeRow:
        error = None if seen is None else seen.errors.get(key)
        return TimeRow(
            label=label, predicted=value, show=show, is_measured=bool(key), measured=beside.get(key), error=error,
            rank=rank,
        )  # fmt: skip

    yield row("compute", prediction.compute_s)
    if facts.recompute_s > 0:
        yield row("of it recompute", facts.recompute_s, rank="part")
    # Without an error, though measured: the ratio of two times near nothing says nothing.
    yield row("waiting", prediction.stall_s, key="stall_s")
    yield row(words.cycle(plan), prediction.pass_s, key="pass_s", rank="sum")
    yield row("lower bound", prediction.bound_s)
    yield row("step", prediction.step_s)
    if facts.tokens_per_s is not None:
        yield row(f"{plan.workload.unit}/s", facts.tokens_per_s, words.rate, "tokens_per_s")
    yield row(f"loads/{short}", prediction.loads_per_pass, words.number, "loads_per_pass")
    yield row(f"loaded/{short}", prediction.loaded_bytes_per_pass, format_bytes, "loaded_bytes_per_pass")
    if prediction.offloaded_bytes_per_pass:
        yield row("offloaded", prediction.offloaded_bytes_per_pass, format_bytes)
    if prediction.rows_bytes_per_pass:
        yield row("embedding rows", prediction.rows_bytes_per_pass, format_bytes)


def memory_rows(
    plan: Plan, facts: Facts, seen: Measured | None, device_bytes: int | None = None
) -> Iterator[MemoryRow]:
    """Yield bytes by kind, then peaks, budgets, and what was measured. What is used and what is free is the budget; a
    device's ``device_bytes`` are that and others'.
    """
    prediction, budgets, peaks = plan.prediction, plan.budgets, plan.prediction.peaks
    for kind in dict.fromkeys((*VRAM_KINDS, *RAM_KINDS, *prediction.vram_parts, *prediction.ram_parts)):
        vram, ram = prediction.vram_parts.get(kind), prediction.ram_parts.get(kind)
        disk = peaks.disk_bytes if kind == "weights" else None
        if vram or ram or disk:
            yield MemoryRow(label=VRAM_LABELS.get(kind, kind), cells=(vram or None, ram or None, disk or None))
        if kind == "activations" and facts.weight_copy_bytes:
            yield MemoryRow(label="of it copies", cells=(facts.weight_copy_bytes, None, None), rank="part")
    tops = (peaks.vram_bytes, peaks.ram_bytes, peaks.disk_bytes)
    limits = (budgets.vram_bytes, budgets.ram_bytes, budgets.disk_bytes)
    vram, ram, disk = (top or None for top in tops)
    yield MemoryRow(label="peak", cells=(vram, ram, disk), rank="sum", begins=True)
    for line in plan.table.reserved:
        if line.size_bytes:
            yield MemoryRow(label=f"besides {line.what}", cells=(line.size_bytes, None, None), rank="part")
    for name, part in words.ram_by_lock(plan, facts):
        yield MemoryRow(label=f"of it {name}", cells=(None, part, None), rank="part")
    vram, ram, disk = (None if limit is None else limit - top for top, limit in zip(tops, limits, strict=True))
    yield MemoryRow(label="free", cells=(vram, ram, disk))
    yield MemoryRow(label="budget", cells=limits, rank="sum")
    if device_bytes is not None:
        others = device_bytes - budgets.vram_bytes
        label = "left to others" if others >= 0 else "more than there is"
        yield MemoryRow(label=label, cells=(abs(others), None, None))
        yield MemoryRow(label="memory of the device", cells=(device_bytes, None, None), rank="sum")
    if seen is not None:
        measured = (seen.vram_bytes, seen.ram_bytes, None)
        yield MemoryRow(label="measured", cells=measured, rank="sum", begins=True)
        if seen.vram_reserved_bytes is not None:
            yield MemoryRow(label="reserved by torch", cells=(seen.vram_reserved_bytes, None, None))
        extra = (seen.unaccounted_vram_bytes, seen.unaccounted_ram_bytes, None)
        yield MemoryRow(label="unaccounted", cells=extra, is_difference=True)
