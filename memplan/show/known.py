"""What can be planned for by name: models and hardware, as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from memplan.show.glyphs import Glyphs
from memplan.show.terminal import print_or_write


def write_models(rows: Sequence[tuple[str, str, str]]) -> None:
    """Print rows of (name, parameters, name on the hub)."""
    print_or_write(lambda glyphs: _table(("model", "parameters", "on the Hub"), rows, glyphs))


def write_hardware(rows: Sequence[tuple[str, str, str]]) -> None:
    """Print rows of (name, memory, description)."""
    print_or_write(lambda glyphs: _table(("hardware", "memory", "what it is"), rows, glyphs))


def _table(head: tuple[str, str, str], rows: Sequence[tuple[str, str, str]], glyphs: Glyphs) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column(head[0], no_wrap=True)
    table.add_column(head[1], justify="right", no_wrap=True)
    table.add_column(head[2], overflow="fold")
    for name, size, text in rows:
        table.add_row(Text(glyphs.safe(name), style="bold"), size, Text(glyphs.safe(text), style="dim"))
    return table
