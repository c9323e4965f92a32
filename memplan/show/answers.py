"""Answers in a terminal: memory against time, the most that fits, what other ways of placing cost."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from memplan.program.answers import Fit, Point
from memplan.show.glyphs import RICH
from memplan.units import format_bytes, format_seconds

_BAR = 16
"""Characters of the longest bar."""
_LEAST_WIDTH = 84
"""Of what is piped: no figure is cut."""


def write_frontier(title: str, points: Sequence[Point]) -> None:
    """Print the points, the cheapest first, each with a bar as long as its step."""
    fastest = min(point.step_s for point in points)
    slowest = max(point.step_s for point in points)
    table = _table("vram", "step", "slower", "recomputed", "loaded", "binds", "")
    table.columns[-1].justify = "left"
    for point in points:
        more = point.step_s / fastest - 1
        table.add_row(
            format_bytes(point.vram_bytes),
            format_seconds(point.step_s),
            f"{more:+.1%}" if more else "-",
            str(point.recomputed) if point.recomputed else "-",
            format_bytes(point.loaded_bytes_per_pass) if point.loaded_bytes_per_pass else "-",
            point.binds,
            "#" * max(1, round(_BAR * point.step_s / slowest)),
        )
    _print(title, table)


def write_fit(title: str, fit: Fit) -> None:
    """Print the answers."""
    table = _table("", "", "vram", "step")
    table.columns[1].justify = "left"
    for what, answer, point in _answers(fit):
        table.add_row(
            what,
            answer,
            format_bytes(point.peak_bytes) if point else "-",
            format_seconds(point.step_s) if point else "-",
        )
    _print(title, table)


def _answers(fit: Fit) -> Iterator[tuple[str, str, Point | None]]:
    yield "as asked", "fits" if fit.asked else "does not fit", fit.asked
    yield "least vram", "" if fit.least else "none would do: give more RAM or disk", fit.least
    if fit.least_at is not None:
        yield f"least vram, {fit.slowdown:.0%} slower", "", fit.least_at
    yield "all on the device", "", fit.whole
    for what, found in sorted(fit.most.items()):
        beyond = " (not for lack of memory)" if what in fit.bounded else ""
        yield f"greatest {what}", "none fits" if found is None else f"{found[0]:,}{beyond}", found[1] if found else None
    for name, point in fit.quantized.items():
        yield f"as {name}", "fits" if point else "does not fit", point


def write_compared(title: str, rows: Sequence[tuple[str, Point | None]]) -> None:
    """Print ways of placing, each with what a step takes under it; the first is the plan."""
    table = _table("placed by", "vram", "ram", "step", "slower", "loaded")
    table.columns[0].justify = "left"
    best = rows[0][1]
    assert best is not None
    for name, point in rows:
        if point is None:
            table.add_row(name, "does not fit", "-", "-", "-", "-")
            continue
        more = point.step_s / best.step_s - 1
        table.add_row(
            name,
            format_bytes(point.peak_bytes),
            format_bytes(point.ram_bytes),
            format_seconds(point.step_s),
            f"{more:+.1%}" if point is not best else "-",
            format_bytes(point.loaded_bytes_per_pass),
        )
    _print(title, table)


def _table(*names: str) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _print(title: str, *parts: RenderableType) -> None:
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = max(console.width, _LEAST_WIDTH)
    console.print(Group(Text(RICH.safe(title)), Text(""), *parts))
