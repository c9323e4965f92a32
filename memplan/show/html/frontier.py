"""Device memory against the time of a step: points, and where this plan is among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memplan.program.results import Point, point_of
from memplan.program.schema import Plan
from memplan.show.html.axes import Tick, size_ticks, time_ticks
from memplan.show.html.memory import WIDTH, short
from memplan.show.html.tables import NONE, Row, Table, size, time
from memplan.show.html.tags import Tag, width
from memplan.show.sentences import percent

HEIGHT = 200
_BESIDE = 0.25
"""A card that has this much more, as a share of the axis, than all weights take is not drawn: points would be close."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Dot:
    """A point of the drawing."""

    x: str
    y: str
    title: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Frontier:
    """The drawing, whose ground is a step of no time, and the same as a table."""

    dots: tuple[Dot, ...]
    steps: str
    """Path of what each budget gets: the step of the greatest point that is not above it."""
    here: Dot
    first_bytes: int
    """At the left edge."""
    last_bytes: int
    top_s: float
    """At the upper edge."""
    card_bytes: int | None
    card_x: str | None
    """None where the card's memory is beyond the drawing, or not known."""
    sizes: tuple[Tick, ...]
    times: tuple[Tick, ...]
    tags: tuple[Tag, ...]
    table: Table


def frontier(plan: Plan, points: Sequence[Point], card_bytes: int | None = None) -> Frontier:
    """Return the points with the plan among them. ``points``: at least one. ``card_bytes``: all memory of the card."""
    mine = point_of(plan)
    points = sorted(points, key=lambda point: point.vram_bytes)
    every = [*points, mine]
    least, most = min(point.vram_bytes for point in every), max(point.vram_bytes for point in every)
    shown = card_bytes is not None and least <= card_bytes <= most + _BESIDE * (most - least)
    first, last = least, max(most, card_bytes if shown and card_bytes is not None else 0)
    edge = max(1, (last - first) // 50 or last // 10)
    first, last = max(0, first - edge), last + edge
    top_s = max(point.step_s for point in every) * 1.12 or 1.0

    def across(size_bytes: int) -> float:
        return (size_bytes - first) / (last - first)

    def dot(point: Point) -> Dot:
        return Dot(
            x=short(WIDTH * across(point.vram_bytes)),
            y=short(HEIGHT * (1 - point.step_s / top_s)),
            title=f"{size(point.vram_bytes)} of vram: a step of {time(point.step_s)}",
        )

    dots = tuple(map(dot, points))
    path = f"M{dots[0].x} {dots[0].y}" + "".join(f"H{after.x}V{after.y}" for after in dots[1:]) + f"H{WIDTH}"
    here, high = across(mine.vram_bytes), mine.step_s / top_s
    # Below the steps there is room, since they go down to the right.
    below = high > 0.2
    beside = below and here > width("this plan")
    tags = [
        Tag(text="this plan", x=here, y=1 - high + (0.1 if below else -0.1), anchor="end" if beside else "start"),
    ]
    if shown and card_bytes is not None:
        x, text = across(card_bytes), f"card {size(card_bytes)}"
        tags.append(Tag(text=text, x=x, y=0.05, anchor="start" if x + width(text) <= 1 else "end"))
    return Frontier(
        dots=dots,
        steps=path,
        here=dot(mine),
        first_bytes=first,
        last_bytes=last,
        top_s=top_s,
        card_bytes=card_bytes,
        card_x=short(WIDTH * across(card_bytes)) if shown and card_bytes is not None else None,
        sizes=size_ticks(first, last),
        times=time_ticks(top_s, upwards=True),
        tags=tuple(tags),
        table=_table(mine, points),
    )


def _table(mine: Point, points: Sequence[Point]) -> Table:
    fastest = min(point.step_s for point in (*points, mine))
    rows = [(size(point.vram_bytes), point, "") for point in points]
    rows.append((f"{size(mine.vram_bytes)} (this plan)", mine, "sum"))
    return Table(
        id="frontier",
        caption="Budgets of vram and the step of the best plan found for each, predicted",
        head=(
            "vram budget",
            "step",
            "slower",
            "layers recomputed",
            "layers offloaded",
            "loaded per micro-batch",
            "limited by",
        ),
        rows=tuple(
            Row(
                name=name,
                cells=(
                    time(point.step_s),
                    percent(point.step_s / fastest - 1, "+") if point.step_s > fastest else NONE,
                    f"{point.recomputed:,}",
                    f"{point.offloaded:,}",
                    size(round(point.loaded_bytes_per_pass / point.group) or None),
                    point.binds,
                ),
                style=style,
            )
            for name, point, style in rows
        ),
        texts=frozenset({6}),
    )
