"""What is cached, as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from memplan.show.glyphs import RICH
from memplan.units import format_bytes


def write_cache(folder: str, rows: Sequence[tuple[str, int, str]]) -> None:
    """Print rows of (what, bytes, date) and their sum to standard output."""
    console = Console(highlight=False)
    if not rows:
        console.print(Text(f"No packed blocks in {RICH.safe(folder)}."), soft_wrap=True)
        return
    table = Table(box=None, pad_edge=False)
    table.add_column("packed", overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("written", no_wrap=True)
    for what, size_bytes, date in rows:
        table.add_row(Text(RICH.safe(what) or "?"), format_bytes(size_bytes), date)
    console.print(table)
    total = format_bytes(sum(size for _, size, _ in rows))
    console.print(Text(f"\n{len(rows)} blocks, {total} in {RICH.safe(folder)}"), soft_wrap=True)
