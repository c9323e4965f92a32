"""What each tier holds along the pass, as areas that stand on each other, and as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.program.memory_timeline import Moment
from memplan.program.schema import Plan
from memplan.show.html.axes import Tick, count_ticks, size_ticks
from memplan.show.html.tables import NONE, Row, Table, size
from memplan.show.html.tags import Band, Tag, bar_tags, chart_tags
from memplan.units import format_bytes

WIDTH, HEIGHT = 640, 240
"""Of the drawing, in its own units: the page stretches it."""

_TALLEST = 1.25
"""A budget that is more than this many times the peak is written, not drawn: the areas would be flat."""

_WEIGHTS, _TRAINED, _SAVED, _OTHER = "weights", "trained", "saved", "other"
_KINDS: dict[str, tuple[str, int, str]] = {
    "context": (_OTHER, 0, "what CUDA and its libraries take"),
    "communication": (_OTHER, 5, "DDP's buckets and NCCL's buffers"),
    "buffers": (_OTHER, 1, "buffers of the model"),
    "batch": (_OTHER, 2, "inputs of the micro-batch"),
    "staging": (_OTHER, 3, "through which the disk is read, and RAM that is not pinned"),
    "adapters": (_TRAINED, 0, "weights that are trained"),
    "optimizer": (_TRAINED, 1, "state of the optimizer"),
    "gradients": (_TRAINED, 2, "of the weights that are trained"),
    "weights": (_WEIGHTS, 0, "frozen blocks at home here"),
    "streamed": (_WEIGHTS, 1, "frozen blocks, from the start of their load to their last use"),
    "idle": (_WEIGHTS, 2, "room for blocks that none takes at the time"),
    "offloaded": (_SAVED, 5, "saved activations that wait for their backward"),
    "boundaries": (_SAVED, 0, "inputs of recomputed and offloaded layers"),
    "kept": (_SAVED, 1, "saved by layers for their backward"),
    "recomputed": (_SAVED, 2, "saved activations, recomputed by a backward"),
    "logits": (_SAVED, 3, "of the head and the loss, and what these need"),
    "passing": (_SAVED, 4, "of activations, between layers"),
    "activations": (_SAVED, 6, "of modules whose policy memplan cannot set"),
    "workspace": (_OTHER, 4, "temporary buffers of a module"),
}
"""By kind, from the bottom of the chart: its family (a hue), its place there (a pattern), and what it is."""

_NAMES = {
    "activations": "other activations",
    "workspace": "other workspace",
    "idle": "unused",
    "offloaded": "offloaded activations",
    "boundaries": "layer inputs",
    "kept": "kept activations",
    "recomputed": "recomputed activations",
    "passing": "passing gradients",
}
"""What a chart calls kinds whose own words stand for more, or for something else, in another place of the page."""

_TITLES = {"vram": "VRAM", "ram": "RAM", "disk": "Disk"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Area:
    """One kind: its bytes at every access, and the path of its upper edge, down to the ground."""

    kind: str
    look: str
    """Class that gives hue and pattern."""
    sizes_bytes: tuple[int, ...]
    path: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """One tier. ``areas`` are painted in their order: the whole first, each next one before it."""

    tier: str
    title: str
    description: str
    areas: tuple[Area, ...]
    peak_bytes: int
    peak_at: int
    """The access; the middle of its column is ``peak_x``."""
    peak_x: float
    top_bytes: int
    """At the upper edge of the drawing."""
    budget_bytes: int | None
    budget_y: float | None
    """None where the budget lies beyond the drawing, or there is none."""
    level: bool
    """Whether it holds the same bytes all along the pass: its drawing then is a bar, along ``ticks``."""
    bars: tuple[tuple[str, float, float, str], ...]
    """Of such: class, left, width and title of each kind's part."""
    ticks: tuple[Tick, ...]
    """Of bytes, from 0 to ``top_bytes``."""
    calls: tuple[Tick, ...]
    """Of accesses."""
    tags: tuple[Tag, ...]
    legend: Table


def charts(plan: Plan, moments: Sequence[Moment]) -> tuple[Chart, ...]:
    """Return a chart for each tier in which anything lies."""
    budgets = plan.budgets
    held = (
        ("vram", [moment.vram for moment in moments], budgets.vram_bytes),
        ("ram", [moment.ram for moment in moments], budgets.ram_bytes),
        ("disk", [{"weights": moment.disk_bytes} for moment in moments], budgets.disk_bytes),
    )
    return tuple(chart(tier, rows, budget) for tier, rows, budget in held if any(any(row.values()) for row in rows))


def chart(tier: str, rows: Sequence[Mapping[str, int]], budget_bytes: int | None) -> Chart:
    """Return the chart of one tier: ``rows`` are bytes by kind, one at each access."""
    sums = [sum(row.values()) for row in rows]
    peak = max(sums)
    peak_at = sums.index(peak)
    drawn = budget_bytes is not None and peak <= budget_bytes <= peak * _TALLEST
    top = budget_bytes if drawn and budget_bytes is not None else peak
    top = max(1, top + top // 8)  # room above the highest line, for words
    below, areas, bands = [0] * len(rows), list[Area](), list[Band]()
    for kind in _ordered(rows):
        sizes = tuple(row.get(kind, 0) for row in rows)
        lows = [low / top for low in below]
        below = [low + more for low, more in zip(below, sizes, strict=True)]
        bands.append(Band(name=_name(kind), low=lows, high=[high / top for high in below]))
        most = max(sizes)
        areas.append(
            Area(
                kind=kind,
                look=_look(kind),
                sizes_bytes=sizes,
                path=_edge([round(HEIGHT * (1 - level / top), 1) for level in below]),
                title=f"{_name(kind)}: {format_bytes(sizes[peak_at])} at the peak"
                + (f", at most {format_bytes(most)}" if most != sizes[peak_at] else ""),
            )
        )
    level = all(len(set(area.sizes_bytes)) == 1 for area in areas)
    budget_y = round(HEIGHT * (1 - budget_bytes / top), 1) if drawn and budget_bytes is not None else None
    peak_x = (peak_at + 0.5) / len(rows)
    if level:
        tags = bar_tags([(band.name, band.low[0], band.high[0] - band.low[0]) for band in bands])
    else:
        tags = chart_tags(
            bands,
            Tag(text=f"peak {format_bytes(peak)}", x=peak_x, y=0.0),
            f"budget {format_bytes(budget_bytes or 0)}",
            None if budget_y is None else budget_y / HEIGHT,
        )
    return Chart(
        tier=tier,
        title=_TITLES[tier],
        description=f"Bytes by kind at each of the {len(rows)} accesses of a micro-batch; at most "
        f"{format_bytes(peak)}.",
        areas=tuple(reversed(areas)),
        peak_bytes=peak,
        peak_at=peak_at,
        peak_x=round(WIDTH * peak_x, 1),
        top_bytes=top,
        budget_bytes=budget_bytes,
        budget_y=budget_y,
        level=level,
        bars=tuple(
            (area.look, round(WIDTH * band.low[0], 1), round(WIDTH * (band.high[0] - band.low[0]), 1), area.title)
            for area, band in zip(areas, bands, strict=True)
        )
        if level
        else (),
        ticks=size_ticks(0, top, upwards=not level),
        calls=count_ticks(len(rows)),
        tags=tags,
        legend=_legend(tier, areas, peak_at),
    )


def table(chart: Chart, moments: Sequence[Moment]) -> Table:
    """Return the bytes at every access; kinds as columns."""
    areas = chart.areas[::-1]
    return Table(
        id=f"bytes-{chart.tier}",
        caption=f"{chart.title} at every access",
        head=("access", "phase", "module", "total", *(_name(area.kind) for area in areas)),
        rows=tuple(
            Row(
                name=str(moment.index),
                cells=(
                    moment.kind,
                    moment.module or NONE,
                    size(sum(area.sizes_bytes[place] for area in areas)),
                    *(size(area.sizes_bytes[place] or None) for area in areas),
                ),
                style="sum" if place == chart.peak_at else "",
            )
            for place, moment in enumerate(moments)
        ),
        texts=frozenset({1, 2}),
        long=True,
    )


def _legend(tier: str, areas: Sequence[Area], peak_at: int) -> Table:
    rows = [
        Row(
            name=_name(area.kind),
            cells=(size(area.sizes_bytes[peak_at]), _KINDS.get(area.kind, ("", 0, ""))[2]),
            swatch=area.look,
        )
        for area in reversed(areas)
    ]
    total = Row(name="total", cells=(size(sum(area.sizes_bytes[peak_at] for area in areas)), ""), style="sum")
    return Table(
        id=f"legend-{tier}",
        caption=f"{_TITLES[tier]} at its peak",
        head=("kind", "at the peak", "what it is"),
        rows=(*rows, total),
        texts=frozenset({2}),
    )


def _ordered(rows: Sequence[Mapping[str, int]]) -> list[str]:
    """Return the kinds of which there are bytes, from the bottom up; one that is not known here comes last."""
    found = {kind for row in rows for kind, size_bytes in row.items() if size_bytes}
    return [kind for kind in _KINDS if kind in found] + sorted(found - set(_KINDS))


def _name(kind: str) -> str:
    return _NAMES.get(kind, kind)


def _look(kind: str) -> str:
    family, place, _ = _KINDS.get(kind, (_OTHER, 5, ""))
    return f"{family}{place}"


def _edge(levels: Sequence[float]) -> str:
    """Return the path of steps, one an access, closed along the ground. Steps of equal level are one."""
    parts, start = [f"M0 {HEIGHT}V{short(levels[0])}"], 0
    for place, level in enumerate((*levels[1:], HEIGHT), start=1):
        if level != levels[start] or place == len(levels):
            parts.append(f"H{short(place * WIDTH / len(levels))}V{short(level)}")
            start = place
    return "".join(parts) + "z"


def short(number: float) -> str:
    """Return a coordinate in as few letters as will do."""
    return f"{number:.1f}".removesuffix(".0")
