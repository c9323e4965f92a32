"""What ``memplan plan`` prints first: twelve lines of 80 columns. The rest is :mod:`memplan.show.terminal`'s."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.show import sentences as words
from memplan.show.glyphs import PLAIN, Glyphs
from memplan.show.rows import VRAM_LABELS
from memplan.show.summary import Facts, facts
from memplan.show.terminal import WIDTH, plain_text, print_or_write
from memplan.units import GIB, MIB, format_bytes

if TYPE_CHECKING:
    from memplan.program.schema import Plan

_NAMED = 3
"""Kinds of vram that have a name in the line; the others are shown as one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What a first screen says that is not in the plan."""

    device_bytes: int | None = None
    """Memory of the device; None where it is not known."""
    is_this_cpu: bool = False
    """Whether it is planned for the CPU because there is no GPU and none was named."""
    next_command: str = ""
    """What to type next."""


def write(plan: Plan, beside: Beside) -> None:
    """Print the screen to standard output: in colour to a terminal, as plain ASCII to anything else."""
    print_or_write(lambda glyphs: screen(plan, beside, glyphs))


def text(plan: Plan, beside: Beside, width: int | None = None) -> str:
    """Return the screen as plain ASCII, ``width`` columns wide: else ``COLUMNS``, else 80; never below 60."""
    return plain_text(screen(plan, beside, PLAIN), width)


def screen(plan: Plan, beside: Beside, glyphs: Glyphs) -> RenderableType:
    """Return the screen for rich."""
    known = facts(plan)
    where = "" if beside.device_bytes is None else f" {glyphs.safe(plan.hardware)}"
    lines: list[RenderableType] = [
        Text.assemble(("Fits", "bold green"), f"{where}: {words.fits(plan)}"),
        Text(_step(plan, known, glyphs)),
        Text(_subject(plan, glyphs), style="dim"),
        Text(""),
        _baselines(plan, known, beside, glyphs),
        Text(_vram(plan)),
    ]
    if more := _more(plan, glyphs):
        lines.append(Text(more))
    if beside.is_this_cpu:
        lines.append(Text("No GPU was found: this is a plan for the CPU. Name a card with --gpu, such as --gpu 4090."))
    notes = words.notes(plan, None)
    and_notes = f" and {words.plural(len(notes), 'note', 'notes')}" if notes else ""
    lines.append(Text(f"Add --verbose for all blocks, tables{and_notes}.", style="dim"))
    if beside.next_command:
        lines.append(Text.assemble("Next: ", (glyphs.safe(beside.next_command), "bold")))
    return Group(*lines)


def _step(plan: Plan, known: Facts, glyphs: Glyphs) -> str:
    """Return the time of a step, with its rate where that leaves it one line."""
    line = words.step(plan, known, glyphs, with_rate=True)
    return line if len(line) <= WIDTH else words.step(plan, known, glyphs)


def _subject(plan: Plan, glyphs: Glyphs) -> str:
    workload = plan.workload
    times = f" {glyphs.times} {workload.accumulation}" if workload.accumulation > 1 else ""
    return f"{words.trained(plan, glyphs)}, {workload.size}{times} per step{words.shared(plan)}"


def _baselines(plan: Plan, known: Facts, beside: Beside, glyphs: Glyphs) -> Table:
    """Return the plan beside what people would do else, each with whether the device holds it."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column("predicted", no_wrap=True)
    for name in ("vram", "ram", "step"):
        table.add_column(name, justify="right", no_wrap=True)
    limit = beside.device_bytes or plan.budgets.vram_bytes
    table.add_column(f"fits {format_bytes(limit)}")
    peaks = plan.prediction.peaks
    rows: list[tuple[str, int, int, float]] = [("memplan", peaks.vram_bytes, peaks.ram_bytes, plan.prediction.step_s)]
    for name, whole in (("checkpointing only", known.checkpointed), ("everything kept", known.kept)):
        if whole is not None:
            rows.append((name, whole.vram_bytes, 0, whole.step_s))
    for name, vram, ram, step_s in rows:
        verdict = Text("yes", style="green") if vram <= limit else Text("no", style="red")
        table.add_row(name, format_bytes(vram), format_bytes(ram) if ram else "-", glyphs.seconds(step_s), verdict)
    return table


def _vram(plan: Plan) -> str:
    """Return what the vram is used for, the most first, in a line."""
    parts = sorted(((size, kind) for kind, size in plan.prediction.vram_parts.items() if size > 0), reverse=True)
    named, small = parts[:_NAMED], sum(size for size, _ in parts[_NAMED:])
    unit, unit_bytes, digits = ("GiB", GIB, 2) if plan.prediction.peaks.vram_bytes >= GIB else ("MiB", MIB, 1)
    shown = [(VRAM_LABELS.get(kind, kind), size) for size, kind in named] + ([("other", small)] if small else [])
    return f"vram in {unit}: " + ", ".join(f"{name} {size / unit_bytes:.{digits}f}" for name, size in shown)


def _more(plan: Plan, glyphs: Glyphs) -> str:
    """Return what a GiB more buys, and the least that works."""
    found = []
    step_s, passes = plan.prediction.step_s, plan.workload.accumulation / plan.group
    gain = next((gain for gain in plan.gains if gain.of == "vram" and gain.more == GIB), None)
    if gain is not None:
        saved_s = (plan.prediction.pass_s - gain.pass_s) * passes
        found.append(f"1 GiB more vram saves {glyphs.seconds(saved_s)} per step ({words.percent(saved_s / step_s)})")
    elif plan.least_vram_bytes is not None:
        found.append("1 GiB more vram saves nothing worth having")
    if plan.least_vram_bytes is not None:
        found.append(f"the minimum is {format_bytes(plan.least_vram_bytes)}")
    return "; ".join(found) + "." if found else ""
