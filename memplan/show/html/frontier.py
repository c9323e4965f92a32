"""Device memory against the time of a step: points, and where this plan stands among them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memplan.program.results import Point, point_of
from memplan.program.schema import Plan
from memplan.show.html.memory import WIDTH, short
from memplan.show.html.tables import NONE, Row, Table, size, time
from memplan.show.sentences import percent

_HEIGHT, _EDGE = 200, 10


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
    least_bytes: int
    most_bytes: int
    slowest_s: float
    table: Table


def frontier(plan: Plan, points: Sequence[Point]) -> Frontier:
    """Return the points with the plan among them. ``points``: at least one."""
    mine = point_of(plan)
    points = sorted(points, key=lambda point: point.vram_bytes)
    every = [*points, mine]
    least, most = min(point.vram_bytes for point in every), max(point.vram_bytes for point in every)
    slowest = max(point.step_s for point in every)

    def dot(point: Point) -> Dot:
        across = (point.vram_bytes - least) / (most - least) if most > least else 0.5
        up = point.step_s / slowest if slowest else 0.0
        return Dot(
            x=short(_EDGE + across * (WIDTH - 2 * _EDGE)),
            y=short(_HEIGHT - up * (_HEIGHT - _EDGE)),
            title=f"{size(point.vram_bytes)} of vram: a step of {time(point.step_s)}",
        )

    dots = tuple(map(dot, points))
    path = f"M{dots[0].x} {dots[0].y}" + "".join(f"H{after.x}V{after.y}" for after in dots[1:]) + f"H{WIDTH}"
    return Frontier(
        dots=dots,
        steps=path,
        here=dot(mine),
        least_bytes=least,
        most_bytes=most,
        slowest_s=slowest,
        table=_table(mine, points),
    )


def _table(mine: Point, points: Sequence[Point]) -> Table:
    fastest = min(point.step_s for point in (*points, mine))
    rows = [(size(point.vram_bytes), point, "") for point in points]
    rows.append((f"{size(mine.vram_bytes)} (this plan)", mine, "sum"))
    return Table(
        id="frontier",
        caption="Budgets of vram and the step of the best plan found for each, predicted",
        head=("vram", "step", "slower", "recomputed", "offloaded", "loaded a pass", "binds"),
        rows=tuple(
            Row(
                name=name,
                cells=(
                    time(point.step_s),
                    percent(point.step_s / fastest - 1, "+") if point.step_s > fastest else NONE,
                    f"{point.recomputed:,}",
                    f"{point.offloaded:,}",
                    size(point.loaded_bytes_per_pass or None),
                    point.binds,
                ),
                style=style,
            )
            for name, point, style in rows
        ),
        texts=frozenset({6}),
    )
