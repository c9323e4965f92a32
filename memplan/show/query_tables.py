"""Answers in a terminal: memory against time, the most that fits, what other ways of placing cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.program.results import Fit, Point
from memplan.show.glyphs import Glyphs
from memplan.show.sentences import percent
from memplan.show.terminal import print_or_write
from memplan.units import format_bytes

_BAR = 10
"""Characters of the longest bar: with it the widest figures take 80 columns."""


def write_frontier(title: str, points: Sequence[Point]) -> None:
    """Print the points, the cheapest first, each with a bar as long as its step."""
    print_or_write(lambda glyphs: _titled(title, _frontier(points, glyphs), glyphs))


def write_fit(title: str, fit: Fit) -> None:
    """Print the answers."""
    print_or_write(lambda glyphs: _titled(title, _fit(fit, glyphs), glyphs))


def write_compared(title: str, rows: Sequence[tuple[str, Point | None]]) -> None:
    """Print ways of placing, each with what a step takes under it; the first is the plan."""
    print_or_write(lambda glyphs: _titled(title, _compared(rows, glyphs), glyphs))


def _frontier(points: Sequence[Point], glyphs: Glyphs) -> Table:
    fastest = min(point.step_s for point in points)
    slowest = max(point.step_s for point in points)
    table = _table("vram", "step", "slower", "recomputed", "loaded", "binds", "")
    table.columns[-1].justify = "left"
    for point in points:
        table.add_row(
            format_bytes(point.vram_bytes),
            glyphs.seconds(point.step_s),
            _slower(point.step_s, fastest),
            f"{point.recomputed:,}" if point.recomputed else "-",
            _loaded(point) if point.loaded_bytes_per_pass else "-",
            Text(glyphs.safe(point.binds)),
            "#" * max(1, round(_BAR * point.step_s / slowest)),
        )
    return table


def _fit(fit: Fit, glyphs: Glyphs) -> Table:
    table = _table("", "", "vram", "step")
    table.columns[0].justify = table.columns[1].justify = "left"
    table.columns[1].no_wrap = False
    for what, answer, point in _answers(fit):
        table.add_row(
            Text(glyphs.safe(what)),
            answer,
            format_bytes(point.peak_bytes) if point else "-",
            glyphs.seconds(point.step_s) if point else "-",
        )
    return table


def _answers(fit: Fit) -> Iterator[tuple[str, str, Point | None]]:
    yield "as asked", "fits" if fit.asked else "does not fit", fit.asked
    yield "least vram", "" if fit.least else "none would do: give more RAM or disk", fit.least
    if fit.least_at is not None:
        yield f"least vram, {100 * fit.slowdown:.3g}% slower", "", fit.least_at
    yield "all on the device", "", fit.whole
    for what, found in sorted(fit.most.items()):
        beyond = " (not for lack of memory)" if what in fit.bounded else ""
        yield f"greatest {what}", "none fits" if found is None else f"{found[0]:,}{beyond}", found[1] if found else None
    for name, point in fit.quantized.items():
        yield f"as {name}", "fits" if point else "does not fit", point


def _compared(rows: Sequence[tuple[str, Point | None]], glyphs: Glyphs) -> Table:
    table = _table("placed by", "vram", "ram", "step", "slower", "loaded")
    table.columns[0].justify = "left"
    table.columns[0].no_wrap = False
    best = rows[0][1]
    assert best is not None
    for name, point in rows:
        if point is None:
            table.add_row(name, "does not fit", "-", "-", "-", "-")
            continue
        table.add_row(
            name,
            format_bytes(point.peak_bytes),
            format_bytes(point.ram_bytes),
            glyphs.seconds(point.step_s),
            _slower(point.step_s, best.step_s) if point is not best else "-",
            _loaded(point),
        )
    return table


def _loaded(point: Point) -> str:
    """Return what a micro-batch loads, or its share of what its group does."""
    return format_bytes(round(point.loaded_bytes_per_pass / point.group))


def _slower(step_s: float, than_s: float) -> str:
    return "-" if step_s == than_s else percent(step_s / than_s - 1, "+")


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _titled(title: str, table: Table, glyphs: Glyphs) -> RenderableType:
    return Group(Text(glyphs.safe(title)), Text(""), table)
