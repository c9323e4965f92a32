"""The strip: one mark a block, so that a placement can be seen at once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from memplan.show.glyphs import Glyphs
from memplan.units import format_bytes

if TYPE_CHECKING:
    from memplan.program.schema import Tier
    from memplan.show.summary import BlockFact

GROUP = 10
"""Marks between two spaces: people count in tens."""

_TIERS: tuple[tuple[Tier, str], ...] = (
    ("device", "stay on the device"),
    ("host", "streamed from ram"),
    ("disk", "streamed from disk"),
)
_MOST_RANGES = 6


def strip(blocks: Sequence[BlockFact], glyphs: Glyphs, width: int) -> Iterator[Text]:
    """Yield the lines of the strip, none wider than ``width``; beneath it what is not kept of activations."""
    indent = max(5, len(str(len(blocks))) + 2)
    groups = max(1, (width - indent - 1) // (GROUP + 1))
    for start in range(0, len(blocks), groups * GROUP):
        row = blocks[start : start + groups * GROUP]
        marks, under = Text.assemble((f"{start:>{indent}}  ", "dim")), Text(" " * (indent + 2))
        for place, block in enumerate(row):
            if place and place % GROUP == 0:
                marks.append(" ")
                under.append(" ")
            marks.append(glyphs.mark(block.home), style=glyphs.style(block.home))
            under.append({"recompute": glyphs.recomputed, "offload": glyphs.offloaded}.get(block.activations, " "))
        yield marks
        if under.plain.strip():
            under.stylize("magenta")
            yield under


def legend(blocks: Sequence[BlockFact], glyphs: Glyphs) -> Table:
    """Return what the marks mean, with counts and bytes; tiers without blocks are left out."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column()
    table.add_column()
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    for tier, meaning in _TIERS:
        here = [block for block in blocks if block.home == tier]
        if here:
            table.add_row(
                Text(f"    {glyphs.mark(tier)}", style=glyphs.style(tier)),
                Text(tier),
                Text(_count(len(here))),
                Text(format_bytes(sum(block.size_bytes for block in here))),
                Text(meaning, style="dim"),
            )
    for policy, mark, name, meaning in (
        ("recompute", glyphs.recomputed, "recomputed", "activations recomputed in backward"),
        ("offload", glyphs.offloaded, "offloaded", "activations wait in ram for the backward"),
    ):
        count = sum(block.activations == policy for block in blocks)
        if count:
            table.add_row(
                Text(f"    {mark}", style="magenta"),
                Text(name),
                Text(_count(count)),
                Text(""),
                Text(meaning, style="dim"),
            )
    return table


def ranges(blocks: Sequence[BlockFact], glyphs: Glyphs) -> Table:
    """Return which numbers of the strip are which blocks, a stack in one line."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    runs: list[tuple[int, int]] = []
    for place, block in enumerate(blocks):
        if runs and block.stack and blocks[runs[-1][0]].stack == block.stack:
            runs[-1] = (runs[-1][0], place)
        else:
            runs.append((place, place))
    # The last line of a cut list is the last run: the head, where there is one.
    shown = runs if len(runs) <= _MOST_RANGES else runs[: _MOST_RANGES - 1]
    for first, last in shown:
        table.add_row(*_range_row(blocks, glyphs, first, last))
    if len(shown) < len(runs):
        left = len(runs) - len(shown) - 1
        table.add_row(Text(""), Text(f"{glyphs.dots} {left} more", style="dim"))
        table.add_row(*_range_row(blocks, glyphs, *runs[-1]))
    return table


def _range_row(blocks: Sequence[BlockFact], glyphs: Glyphs, first: int, last: int) -> tuple[Text, Text]:
    numbers, name = f"    {first}", glyphs.safe(blocks[first].name)
    if last > first:
        numbers, name = f"    {first}-{last}", f"{name} {glyphs.dots} {glyphs.safe(blocks[last].name)}"
    return Text(numbers, style="dim"), Text(name)


def _count(number: int) -> str:
    return "1 block" if number == 1 else f"{number:,} blocks"
