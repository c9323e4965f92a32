"""Bytes and seconds, read and written. The only place where a size changes its unit.

Sizes are whole bytes everywhere else. Text is parsed strictly: ``"12GiB"`` is not ``"12GB"``; a letter alone is a power
of 1024, as in coreutils, Slurm and Docker, and ``i`` may stand without the ``B``: ``"12G"`` is ``"12GiB"``.
"""

from __future__ import annotations

import math
import re

from memplan.errors import SizeError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30
TIB = 1 << 40

ALIGNMENT_BYTES = 512
"""Each tensor of a block starts at a multiple of this in its slot. [Note: alignment changes bits]"""

_FACTORS = {
    "b": 1,
    **dict.fromkeys(("k", "ki"), KIB),
    **dict.fromkeys(("m", "mi"), MIB),
    **dict.fromkeys(("g", "gi"), GIB),
    **dict.fromkeys(("t", "ti"), TIB),
    "kib": KIB,
    "mib": MIB,
    "gib": GIB,
    "tib": TIB,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*")


def parse_size(size: int | float | str, what: str = "size") -> int:
    """Return ``size`` in whole bytes, rounded down (a budget is never rounded up).

    ``size`` is a count of bytes or text such as ``"6GiB"``, ``"6G"`` or ``"512 MB"``; ``what`` names it in the error.
    Text without a unit is refused: bytes and GiB are both meant by such.

    Raises SizeError for anything else: no unit, an unknown unit, NaN, infinite or negative.
    """
    if isinstance(size, bool) or not isinstance(size, (int, float, str)):
        raise SizeError(what, size)
    if isinstance(size, str):
        match = _SIZE.fullmatch(size)
        if match is None or match[2].lower() not in _FACTORS:
            raise SizeError(what, size)
        number, unit = match[1], match[2].lower()
        factor = _FACTORS[unit]
        return int(number) * factor if number.isdigit() else int(float(number) * factor)
    if not math.isfinite(size) or size < 0:
        raise SizeError(what, size)
    return int(size)


def parse_rate(rate: int | float | str, what: str) -> float:
    """Return ``rate`` in bytes a second: a count of them, or text such as ``"10Gbit"`` (of bits) or ``"1GB"`` (of
    bytes), a second each. Raises SizeError for anything else, and for 0.
    """
    text = rate.lower().removesuffix("/s").strip() if isinstance(rate, str) else ""
    is_bits = text.endswith("bit")
    found = parse_size(text.removesuffix("it"), what) / 8 if is_bits else float(parse_size(text or rate, what))
    if not found > 0:
        raise SizeError(what, rate)
    return found


def align_up(size_bytes: int, alignment_bytes: int = ALIGNMENT_BYTES) -> int:
    """Return the least multiple of ``alignment_bytes`` that is not below ``size_bytes``."""
    return -(-size_bytes // alignment_bytes) * alignment_bytes


def format_bytes(size_bytes: int) -> str:
    """Return a size for people: ``"1.50 GiB"``, ``"0.98 GiB"``, ``"12.0 MiB"``; never ``0.0`` where there are bytes."""
    sign = "-" if size_bytes < 0 else ""
    size = abs(size_bytes)
    if size >= 1000 * GIB:
        return f"{sign}{size / TIB:.2f} TiB"
    if size >= 1000 * MIB:
        return f"{sign}{size / GIB:.2f} GiB"
    if size >= MIB:
        return f"{sign}{size / MIB:.1f} MiB"
    if size >= KIB:
        return f"{sign}{size / KIB:.1f} KiB"
    return f"{sign}{size} B"


def format_seconds(seconds: float) -> str:
    """Return a time for people: ``"2.41 s"``, ``"13.2 ms"``, ``"40 µs"``, ``"3 h 10 min"``; ``"0 s"`` where there is
    none.
    """
    if seconds >= 3600:
        return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    if seconds >= 1:
        return f"{seconds:.2f} s"
    if seconds >= 1e-3:
        return f"{seconds * 1e3:.1f} ms"
    if seconds >= 1e-6:
        return f"{seconds * 1e6:.0f} µs"
    if seconds >= 1e-9:
        return f"{seconds * 1e9:.0f} ns"
    return "0 s"  # less is what sums of times leave of rounding
