"""What is cached, what a machine has, what was measured: as tables."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def progress(what: str) -> Iterator[Callable[[str], None]]:
    """Show on standard error what is being done, where that is a terminal. Gives what is told each part's name."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield lambda part: None
        return
    with console.status(what) as status:
        yield lambda part: status.update(f"{what}: {RICH.safe(part)}")


def write_findings(rows: Sequence[tuple[str, str, str, bool]]) -> None:
    """Print rows of (what, found, what it means, whether it is a problem) to standard output."""
    console = Console(highlight=False)
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for what, found, meaning, is_problem in rows:
        table.add_row(Text(RICH.safe(what)), Text(RICH.safe(found)))
        if meaning:
            table.add_row("", Text(f"-> {RICH.safe(meaning)}", style="red" if is_problem else "yellow"))
    console.print(table)


def write_rates(rows: Sequence[tuple[str, str, str]]) -> None:
    """Print rows of (what, value, where from) to standard output. A source that all of them have stands once."""
    console = Console(highlight=False)
    sources = {source for _, _, source in rows}
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column(overflow="fold", style="dim")
    for what, value, source in rows:
        table.add_row(Text(RICH.safe(what)), value, Text(RICH.safe(source) if len(sources) > 1 else ""))
    console.print(table)
    if len(sources) == 1:
        console.print(Text(f"All {RICH.safe(*sources)}.", style="dim"), soft_wrap=True)
