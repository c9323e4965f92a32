"""Words on a drawing: which bands have room for their names, and where. Positions are shares of the drawing.

The drawing is stretched to the page's width, its words are not: what has room on a phone has it everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

_LETTER = 0.024
"""Width of a letter, as a share of a drawing on a phone."""
_LINE = 0.067
"""Height of a line, likewise."""
_ROOM = 0.05
"""Of a band that its name may be written in: the name may stand out a little."""
_BUCKETS = 64
"""Columns that are looked at."""
_VISIBLE = 0.012
_LONGEST = 0.4
"""Of a leader: a longer one is not followed by the eye."""

Anchor = Literal["middle", "start", "end"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tag:
    """A word. ``x``: from the left, of its ``anchor``; ``y``: from the top, of its middle."""

    text: str
    x: float
    y: float
    anchor: Anchor = "middle"
    leader: float | None = None
    """How far down, from the top, a line leads from it to its band."""

    @property
    def box(self) -> tuple[float, float, float, float]:
        """Left, right, top and bottom, on a phone."""
        wide = width(self.text)
        left = {"middle": self.x - wide / 2, "start": self.x, "end": self.x - wide}[self.anchor]
        return left, left + wide, self.y - _LINE / 2, self.y + _LINE / 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Band:
    """A band: its edges from the ground up, as shares of the drawing's height, by column."""

    name: str
    low: Sequence[float]
    high: Sequence[float]


def width(text: str) -> float:
    """Return the share of a phone's drawing that a text is wide."""
    return (len(text) + 1) * _LETTER


def chart_tags(bands: Sequence[Band], peak: Tag, budget: str, line: float | None) -> tuple[Tag, ...]:
    """Return the words of a chart: the peak, the budget at ``line`` (from the top) and the names of bands.

    ``bands`` stand on each other; ``peak`` gives the place of the peak's column.
    """
    found = list(_limits(peak, budget, line))
    left = []
    for band in sorted(bands, key=_thickest, reverse=True):
        tag = _inside(band, found)
        if tag is None:
            left.append(band)
        else:
            found.append(tag)
    for band in left:
        tag = _beside(band, bands[-1].high, found) or _above(band, bands[-1].high, 1 - (line or 0.0), found)
        if tag is not None:
            found.append(tag)
    return tuple(found)


def bar_tags(parts: Sequence[tuple[str, float, float]]) -> tuple[Tag, ...]:
    """Return the names of a bar's parts (name, left, width) that have room for them."""
    return tuple(Tag(text=name, x=left + wide / 2, y=0.5) for name, left, wide in parts if wide >= width(name))


def _limits(peak: Tag, budget: str, line: float | None) -> Iterator[Tag]:
    """Yield the peak's and the budget's words, above all bands and apart from each other."""
    y = _LINE / 2 + 0.01
    yield Tag(text=peak.text, x=peak.x, y=y, anchor="end" if peak.x - width(peak.text) >= 0 else "start")
    if line is not None:
        right = peak.x + width(budget) <= 1 or peak.x < 0.5
        yield Tag(text=budget, x=1.0 if right else 0.0, y=y, anchor="end" if right else "start")


def _inside(band: Band, taken: Sequence[Tag]) -> Tag | None:
    """Return a band's name where it is thick enough for it, near the middle of where it is."""
    low, high = _of_buckets(band.low, max), _of_buckets(band.high, min)
    wide = math.ceil(width(band.name) * _BUCKETS)
    best: tuple[float, float, Tag] | None = None
    for start in range(_BUCKETS - wide + 1):
        bottom, top = max(low[start : start + wide]), min(high[start : start + wide])
        y = min(1 - _LINE / 2, max(_LINE / 2, 1 - (bottom + top) / 2))
        tag = Tag(text=band.name, x=(start + wide / 2) / _BUCKETS, y=y)
        if top - bottom < _ROOM or any(_meet(tag, other) for other in taken):
            continue
        found = (min(top - bottom, 2 * _LINE), -abs(tag.x - 0.25), tag)
        if best is None or found[:2] > best[:2]:
            best = found
    return None if best is None else best[2]


def _beside(band: Band, total: Sequence[float], taken: Sequence[Tag]) -> Tag | None:
    """Return a band's name beside its thickest column, where that stands out from all bands around it."""
    count, wide = len(total), width(band.name)
    at = max(range(count), key=lambda column: band.high[column] - band.low[column])
    sides: tuple[tuple[float, float, Anchor], ...] = (
        ((at + 1) / count, (at + 1) / count + wide, "start"),
        (at / count - wide, at / count, "end"),
    )
    for left, right, anchor in sides:
        if left < 0 or right > 1:
            continue
        ground = max(band.low[at], *total[int(left * count + 1e-9) : max(1, math.ceil(right * count - 1e-9))])
        tag = Tag(
            text=band.name,
            x=left if anchor == "start" else right,
            y=1 - (ground + band.high[at]) / 2,
            anchor=anchor,
        )
        if band.high[at] - ground >= _LINE and not any(_meet(tag, other) for other in taken):
            return tag
    return None


def _above(band: Band, total: Sequence[float], ceiling: float, taken: Sequence[Tag]) -> Tag | None:
    """Return a band's name in the free room above all bands, with a line that leads down to the band."""
    count = len(total)
    for column in sorted(range(count), key=lambda column: band.low[column] - band.high[column]):
        if band.high[column] - band.low[column] < _VISIBLE:
            return None
        x, middle = (column + 0.5) / count, (band.low[column] + band.high[column]) / 2
        for tag in _at(band.name, x):
            left, right, _, _ = tag.box
            if left < 0 or right > 1:
                continue
            ground = max(total[int(left * count) : math.ceil(right * count)])
            for step in range(3):
                up = ground + 0.02 + (step + 0.5) * _LINE
                if up + _LINE / 2 > ceiling or up - middle > _LONGEST:
                    break
                led = replace(tag, y=1 - up, leader=1 - middle)
                if not any(_meet(led, other) for other in taken):
                    return led
    return None


def _at(text: str, x: float) -> Iterator[Tag]:
    anchors: tuple[Anchor, ...] = ("middle", "start", "end")
    for anchor in anchors:
        yield Tag(text=text, x=x, y=0.0, anchor=anchor)


def _meet(one: Tag, other: Tag) -> bool:
    return any(
        a[0] < b[1] + 0.01 and b[0] < a[1] + 0.01 and a[2] < b[3] + 0.005 and b[2] < a[3] + 0.005
        for a in _boxes(one)
        for b in _boxes(other)
    )


def _boxes(tag: Tag) -> list[tuple[float, float, float, float]]:
    return [tag.box] if tag.leader is None else [tag.box, (tag.x, tag.x, tag.y, tag.leader)]


def _thickest(band: Band) -> float:
    return max(high - low for low, high in zip(band.low, band.high, strict=True))


def _of_buckets(levels: Sequence[float], pick: Callable[[Sequence[float]], float]) -> list[float]:
    """Return the greatest or least of the columns that each bucket touches."""
    count = len(levels)
    bounds = [(number * count // _BUCKETS, -(-(number + 1) * count // _BUCKETS)) for number in range(_BUCKETS)]
    return [pick(levels[first:last]) for first, last in bounds]
