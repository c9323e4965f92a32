"""Axes: which values are marked, and how these are written, each with its unit."""

from __future__ import annotations

import math
from dataclasses import dataclass

from memplan.units import GIB, KIB, MIB, TIB

_SIZES = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B"))
_TIMES = ((3600.0, "h"), (60.0, "min"), (1.0, "s"), (1e-3, "ms"), (1e-6, "µs"), (1e-9, "ns"))
_MOST = 4
"""Steps of an axis from left to right: their labels are apart on a phone too."""
_MOST_UP = 6
"""Likewise upwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """A marked value. ``at``: its share of the axis."""

    at: float
    text: str


def size_ticks(first_bytes: int, last_bytes: int, *, upwards: bool = False) -> tuple[Tick, ...]:
    """Return the marks of an axis of bytes, at round numbers of one unit."""
    unit_bytes, unit = next((size, name) for size, name in _SIZES if last_bytes >= size or size == 1)
    return _ticks(first_bytes / unit_bytes, last_bytes / unit_bytes, unit, upwards, least=1 if unit == "B" else 0)


def time_ticks(end_s: float, *, upwards: bool = False) -> tuple[Tick, ...]:
    """Return the marks of an axis of time from 0 on, at round numbers of one unit."""
    unit_s, unit = next(
        ((size, name) for size, name in _TIMES if end_s >= (2 * size if size > 1 else size)), _TIMES[-1]
    )
    return _ticks(0.0, end_s / unit_s, unit, upwards)


def count_ticks(count: int) -> tuple[Tick, ...]:
    """Return the marks of an axis of ``count`` columns, numbered from 0, each at its column's middle."""
    step = max(1, round(_nice(count / _MOST)))
    return tuple(Tick(at=(number + 0.5) / count, text=f"{number:,}") for number in range(0, count, step))


def _ticks(first: float, last: float, unit: str, upwards: bool, least: float = 0.0) -> tuple[Tick, ...]:
    if last <= first:
        return ()
    step = max(_nice((last - first) / (_MOST_UP if upwards else _MOST)), least)
    digits = max(0, -math.floor(math.log10(step)))
    numbers = range(math.ceil(first / step - 1e-9), math.floor(last / step + 1e-9) + 1)
    return tuple(
        Tick(
            at=min(1.0, max(0.0, (number * step - first) / (last - first))),
            text=f"{number * step:,.{digits}f} {unit}" if number else f"0 {unit}",
        )
        for number in numbers
    )


def _nice(least: float) -> float:
    """Return the least of 1, 2 and 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= least * (1 - 1e-9))
