"""A table as the page writes it, and how its cells are written."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memplan.show.glyphs import RICH
from memplan.units import format_bytes

NONE = "–"
"""Where there is nothing to say. Zero bytes that were counted are ``0 B``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A row: its name, its cells as text, and how it stands out (``sum``, ``part``, ``group`` or empty)."""

    name: str
    cells: tuple[str, ...] = ()
    style: str = ""
    swatch: str = ""
    """Class of the mark beside the name, where there is one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """One table. ``head`` names all columns, that of the rows' names too; ``texts``: columns that are no figures."""

    id: str
    caption: str
    head: tuple[str, ...]
    rows: tuple[Row, ...]
    texts: frozenset[int] = frozenset()
    long: bool = False
    """Whether it is folded."""


def size(size_bytes: int | None, *, signed: bool = False) -> str:
    """Return bytes as a cell; None where there are none."""
    if size_bytes is None:
        return NONE
    return ("+" if signed and size_bytes > 0 else "") + format_bytes(size_bytes)


def time(time_s: float | None) -> str:
    """Return seconds as a cell; None where nobody knows."""
    return NONE if time_s is None else RICH.seconds(time_s)


def numbers(values: Iterable[int]) -> tuple[str, ...]:
    """Return counts as cells."""
    return tuple(f"{value:,}" for value in values)
