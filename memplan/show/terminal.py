"""The report as text: calm on a terminal, plain ASCII everywhere else, so that it can be pasted into an issue.

Every number is taken from the plan and the record (``summary``, ``rows``); here they only get their places.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from memplan.show import sentences as words
from memplan.show import summary as said
from memplan.show.glyphs import PLAIN, RICH, Glyphs
from memplan.show.rows import MemoryRow, TimeRow, memory_rows, time_rows
from memplan.show.strip import legend, ranges, strip
from memplan.show.summary import as_dict, failure_dict
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.errors import DoesNotFitError
    from memplan.program.record import BlockRecord, RunRecord
    from memplan.program.schema import Plan

__all__ = ["Report", "as_dict", "failure_dict", "failure_text", "render", "text", "write"]

WIDTH = 80
_LEAST_WIDTH = 60
_WIDE = 126
"""From here on memory and time stand side by side."""
_LABEL = 20
_VALUE = 11
_MOST_STALLED = 5
_STYLES = {"": "", "part": "dim", "sum": "bold"}


def render(plan: Plan, record: RunRecord | None = None) -> Report:
    """Return the report for rich. Raises PlanMismatchError where ``record`` is of another plan."""
    if record is not None:
        said.check_pair(plan, record)
    return Report(plan, record)


def text(plan: Plan, record: RunRecord | None = None, width: int | None = None) -> str:
    """Return the report as plain ASCII, ``width`` columns wide: else ``COLUMNS``, else 80; never below 60.

    The same plan, record and width give the same text. Raises PlanMismatchError as ``render``.
    """
    return plain_text(render(plan, record), width)


def write(plan: Plan, record: RunRecord | None = None, file: IO[str] | None = None) -> None:
    """Write the report to ``file`` (standard output): in colour to a terminal, as ``text`` to anything else.

    Raises PlanMismatchError as ``render``.
    """
    console = Console(file=file, highlight=False)
    if console.is_terminal:
        console.print(render(plan, record))
    else:
        console.file.write(text(plan, record))


def print_or_write(made: Callable[[Glyphs], RenderableType]) -> None:
    """Print what ``made`` makes to standard output: in colour to a terminal, as plain ASCII to anything else."""
    console = Console(highlight=False)
    if console.is_terminal:
        console.print(made(RICH))
    else:
        console.file.write(plain_text(made(PLAIN)))


def failure_text(error: DoesNotFitError) -> str:
    """Return, as plain ASCII, that no plan keeps the budgets: what would do, what limits, what helps."""
    table = _table()
    table.add_column(overflow="fold")
    least = error.least_vram_bytes
    table.add_row("Least vram", "no vram would do" if least is None else format_bytes(least))
    if error.least_ram_bytes is not None:
        table.add_row("Least ram", format_bytes(error.least_ram_bytes))
    table.add_row("Limited by", Text(PLAIN.safe(error.limited_by)))
    for place, suggestion in enumerate(error.suggestions):
        table.add_row("" if place else "Try", Text(PLAIN.safe(suggestion)))
    return plain_text(Group(Text(f"Does not fit: {PLAIN.safe(error.asked)}."), _inset(table)))


@dataclass(frozen=True, slots=True)
class Report:
    """A plan, and what became of it, as something that rich can print."""

    plan: Plan
    record: RunRecord | None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        glyphs = RICH if console.is_terminal and not options.ascii_only else PLAIN
        yield from _Page(self.plan, self.record, glyphs, max(options.max_width, _LEAST_WIDTH)).sections()


class _Page:
    """The sections of one report, written down in one way."""

    def __init__(self, plan: Plan, record: RunRecord | None, glyphs: Glyphs, width: int) -> None:
        self.plan = plan
        self.record = record
        self.glyphs = glyphs
        self.width = width
        self.facts = said.facts(plan)
        self.seen = said.measured(plan, record) if record is not None else None

    def sections(self) -> RenderResult:
        yield self.heading()
        yield Text("")
        yield self.verdict()
        yield Text("")
        if self.width >= _WIDE:
            side = Table.grid(padding=(0, 4, 0, 0))
            side.add_column(width=_LABEL + 2 + 3 * (_VALUE + 2))
            side.add_column()
            side.add_row(self.memory(), self.time())
            yield side
        else:
            yield self.memory()
            yield Text("")
            yield self.time()
        yield Text("")
        yield self.blocks()
        if self.record is not None:
            yield Text("")
            yield self.run(self.record)
        notes = words.notes(self.plan, self.record)
        if notes:
            yield Text("")
            yield Group(Text("Notes", style="bold"), *(_inset(_bullet(self.glyphs.safe(note))) for note in notes))

    # ── what was asked ────────────────────────────────────────────────────────────────────────────────────────────

    def heading(self) -> RenderableType:
        name, colon, how = words.trained(self.plan, self.glyphs).partition(": ")
        return Group(Text.assemble((name, "bold"), colon, how), Text(words.subject(self.plan, self.glyphs)))

    def verdict(self) -> RenderableType:
        plan = self.plan
        lines = [Text.assemble(("Fits:", "bold green"), f" {words.fits(plan)}")]
        lines.append(Text(words.step(plan, self.facts, self.glyphs)))
        if self.facts.run_s is not None:
            lines.append(Text(f"About {self.glyphs.seconds(self.facts.run_s)} for {words.whole_run(plan.workload)}."))
        over = words.over_budget(plan, self.seen)
        if over:
            lines.append(Text(over, style="bold red"))
        return Group(*lines)

    # ── memory and time ───────────────────────────────────────────────────────────────────────────────────────────

    def memory(self) -> RenderableType:
        table = _table("Memory", "vram", "ram", "disk")
        for row in memory_rows(self.plan, self.facts, self.seen):
            if row.begins:
                self.line(table)
            cells = (
                "" if cell is None and row.rank == "part" else self.size(cell, signed=row.is_difference)
                for cell in row.cells
            )
            table.add_row(self.label(row), *cells, style=_STYLES[row.rank])
        remarks = [f"VRAM peaks in {words.place(self.plan, self.plan.prediction.vram_peak_at, self.glyphs)}."]
        return Group(table, *map(_remark, [*remarks, *words.page_locks(self.plan, self.facts)]))

    def time(self) -> RenderableType:
        table = _table("Time", "predicted", *(("measured", "error") if self.seen is not None else ()))
        for row in time_rows(self.plan, self.facts, self.seen):
            show = row.show or self.glyphs.seconds
            cells = [self.label(row), show(row.predicted)]
            if self.seen is not None:
                unknown = "-" if row.is_measured else ""
                cells.append(unknown if row.measured is None else show(row.measured))
                cells.append("" if row.error is None else words.percent(row.error, "+"))
            table.add_row(*cells, style=_STYLES[row.rank])
        remarks = [words.bound(self.plan, self.facts, self.glyphs)]
        if why := words.why_slower(self.facts):
            remarks.append(why)
        remarks += words.gains(self.plan, self.glyphs)
        if self.seen is not None:
            remarks.append("Error: predicted against measured.")
        return Group(table, *map(_remark, remarks))

    # ── blocks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def blocks(self) -> RenderableType:
        blocks = self.facts.blocks
        total = format_bytes(sum(block.size_bytes for block in blocks))
        title = Text.assemble(("Blocks", "bold"), f"  {len(blocks)} frozen, {total}")
        parts: list[RenderableType] = [title, *strip(blocks, self.glyphs, self.width)]
        return Group(*parts, Text(""), legend(blocks, self.glyphs), Text(""), ranges(blocks, self.glyphs))

    # ── after a run ───────────────────────────────────────────────────────────────────────────────────────────────

    def run(self, record: RunRecord) -> RenderableType:
        counts = words.counts(record)
        title = Text.assemble(("Run", "bold"), f"  {words.run(record, self.glyphs)}")
        stalled = sorted((row for row in record.blocks if row.stall_s > 0), key=lambda row: (-row.stall_s, row.block))
        total = sum(row.stall_s for row in stalled)
        if not stalled:
            return Group(title, Text(f"  {counts}; no block was waited for."))
        head = Text(f"  {counts}; {self.glyphs.seconds(total)} of waiting.")
        return Group(title, head, Text(""), self.stalled(stalled, total))

    def stalled(self, rows: list[BlockRecord], total_s: float) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
        table.add_column("  most waited for", overflow="fold")
        table.add_column("home")
        for name in ("waited", "share", "loads", "misses"):
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows[:_MOST_STALLED]:
            block = self.facts.blocks[row.block]
            table.add_row(
                Text(f"  {self.glyphs.safe(block.name)}"),
                Text(block.home, style=self.glyphs.style(block.home)),
                self.glyphs.seconds(row.stall_s),
                words.percent(row.stall_s / total_s),
                f"{row.loads:,}",
                f"{row.misses:,}",
            )
        if len(rows) > _MOST_STALLED:
            rest = sum(row.stall_s for row in rows[_MOST_STALLED:])
            table.add_row(
                Text(f"  {len(rows) - _MOST_STALLED} others", style="dim"),
                "",
                self.glyphs.seconds(rest),
                words.percent(rest / total_s),
            )
        return table

    # ── cells ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def size(self, size_bytes: int | None, *, signed: bool = False) -> Text:
        if size_bytes is None:
            return Text("-", style="dim")
        return Text(("+" if signed and size_bytes > 0 else "") + format_bytes(size_bytes))

    def label(self, row: TimeRow | MemoryRow) -> str:
        return f"  {self.glyphs.safe(row.label)}"

    def line(self, table: Table) -> None:
        dashes = Text(self.glyphs.rule * (_VALUE - 1), style="dim")
        table.add_row("", *(dashes for _ in table.columns[1:]))


def _table(*names: str) -> Table:
    """Return a table whose columns stand where those of the other tables do."""
    table = Table(box=None, show_header=bool(names), pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    table.add_column(Text(names[0], style="bold") if names else "", min_width=_LABEL, no_wrap=True)
    for name in names[1:]:
        table.add_column(Text(name), justify="right", min_width=_VALUE, no_wrap=True)
    return table


def plain_text(renderable: RenderableType, width: int | None = None) -> str:
    """Return what rich prints as plain ASCII, ``width`` columns wide: else ``COLUMNS``, else 80; never below 60."""
    out = io.StringIO()
    # force_jupyter: in a notebook rich would show the text in a cell instead of giving it back.
    console = Console(
        file=out,
        width=max(_columns() if width is None else width, _LEAST_WIDTH),
        color_system=None,
        force_terminal=False,
        force_jupyter=False,
        highlight=False,
        emoji=False,
        markup=False,
    )
    console.print(renderable)
    return "".join(line.rstrip() + "\n" for line in out.getvalue().splitlines())


def _columns() -> int:
    columns = os.environ.get("COLUMNS", "")
    return int(columns) if columns.isascii() and columns.isdigit() else WIDTH


def _remark(remark: str) -> Padding:
    return _inset(Text(remark, style="dim"))


def _inset(renderable: RenderableType) -> Padding:
    return Padding(renderable, (0, 0, 0, 2))


def _bullet(note: str) -> Table:
    table = Table.grid(padding=(0, 1, 0, 0))
    table.add_row(Text("-"), Text(note))
    return table
