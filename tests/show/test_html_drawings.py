"""What the page draws: to scale, with nothing lost or added."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan.errors import DoesNotFitError
from memplan.place.solve import place
from memplan.program.memory_timeline import DEVICE_KINDS, timeline
from memplan.program.results import point_of
from memplan.program.schema import Plan
from memplan.program.timeline import timeline_of
from memplan.show.html import axes, memory, tags, times
from memplan.show.html.frontier import frontier
from memplan.units import format_bytes as size
from tests.show.plans import disk_plan, make_plan, solve_plan
from tests.support.tables import MIB, NAMES, budgets, make_table


def heights(path: str, count: int) -> list[float]:
    """Return how high a path of steps stands over each of ``count`` columns, as a share of the drawing."""
    assert re.fullmatch(rf"M0 {memory.HEIGHT}(V[\d.]+H[\d.]+)+V{memory.HEIGHT}z", path)
    steps = [(float(level), float(right)) for level, right in re.findall(r"V([\d.]+)H([\d.]+)", path)]
    assert steps[-1][1] == memory.WIDTH
    middles = [(place_ + 0.5) * memory.WIDTH / count for place_ in range(count)]
    return [1 - next(level for level, right in steps if right > x) / memory.HEIGHT for x in middles]


def holds(chart: memory.Chart, rows: list[dict[str, int]]) -> None:
    """Check a chart against what it draws: its parts sum to the whole, its greatest is the peak, and all is to
    scale.
    """
    sums = [sum(row.values()) for row in rows]
    assert chart.peak_bytes == max(sums) == sums[chart.peak_at]
    for place_, row in enumerate(rows):
        assert {a.kind: a.sizes_bytes[place_] for a in chart.areas if a.sizes_bytes[place_]} == {
            kind: size_bytes for kind, size_bytes in row.items() if size_bytes
        }
    below = [0] * len(rows)
    for area in reversed(chart.areas):
        below = [low + more for low, more in zip(below, area.sizes_bytes, strict=True)]
        drawn = heights(area.path, len(rows))
        assert drawn == pytest.approx([level / chart.top_bytes for level in below], abs=0.06 / memory.HEIGHT)
    assert below == sums
    if chart.budget_y is not None and chart.budget_bytes is not None:
        assert 1 - chart.budget_y / memory.HEIGHT == pytest.approx(chart.budget_bytes / chart.top_bytes, abs=0.001)
    legend = {row.name: row.cells[0] for row in chart.legend.rows}
    assert legend["total"] == size(chart.peak_bytes)


@pytest.mark.parametrize("made", [solve_plan, disk_plan, lambda: make_plan("dhhhkkd", recomputed=" ^^")])
def test_charts_are_the_plans_memory(made: Callable[[], Plan]) -> None:
    plan = made()
    moments = timeline(plan)
    drawn = {chart.tier: chart for chart in memory.charts(plan, moments)}
    holds(drawn["vram"], [dict(moment.vram) for moment in moments])
    if plan.residences:  # one by hand says peaks that no check has held
        assert drawn["vram"].peak_bytes == plan.prediction.peaks.vram_bytes
        assert drawn["ram"].peak_bytes == plan.prediction.peaks.ram_bytes
    if "disk" in drawn:
        assert drawn["disk"].peak_bytes == plan.prediction.peaks.disk_bytes


KINDS = st.sampled_from([*DEVICE_KINDS, "absent"])
ROWS = st.lists(st.dictionaries(KINDS, st.integers(0, 1 << 42), min_size=1), min_size=1, max_size=40)


@given(ROWS.filter(lambda rows: any(any(row.values()) for row in rows)), st.none() | st.integers(1, 1 << 45))
def test_any_memory_is_drawn_to_scale(rows: list[dict[str, int]], budget_bytes: int | None) -> None:
    holds(memory.chart("vram", rows, budget_bytes), rows)


@settings(max_examples=10, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=7, max_size=9),  # of up to six the solver looks at every arrangement
    st.floats(0.2, 1.2),
    st.booleans(),
    st.booleans(),
)
def test_charts_of_random_plans(sizes: list[int], share: float, offloadable: bool, on_disk: bool) -> None:
    table = make_table([MIB * size_ for size_ in sizes], offloadable=offloadable, device="cuda")
    most = sum(sizes) * MIB
    vram = max(int(share * most), 2 * max(sizes) * MIB) + 40 * MIB
    try:
        plan = place(table, budgets(vram, ram=most // 2 if on_disk else most * 3, disk=1 << 40), **NAMES)
    except DoesNotFitError:
        assume(False)
    moments = timeline(plan)
    for chart in memory.charts(plan, moments):
        held = {
            "vram": [dict(moment.vram) for moment in moments],
            "ram": [dict(moment.ram) for moment in moments],
            "disk": [{"weights": moment.disk_bytes} for moment in moments],
        }
        holds(chart, held[chart.tier])
        peaks = plan.prediction.peaks
        assert (
            chart.peak_bytes == {"vram": peaks.vram_bytes, "ram": peaks.ram_bytes, "disk": peaks.disk_bytes}[chart.tier]
        )


def test_the_timeline_is_to_scale() -> None:
    plan = disk_plan()
    line = timeline_of(plan)
    drawn = times.lanes(plan, line)
    assert drawn.end_s == pytest.approx(line.pass_s)
    assert {lane.name for lane in drawn.lanes} >= {"compute", "RAM to device", "disk to device"}

    def width(path: str) -> float:
        return sum(map(float, re.findall(r"h([\d.]+)v", path)))

    scale = memory.WIDTH / line.pass_s
    looks = {look: path for look, path, _ in drawn.lanes[0].marks}
    assert width(looks["forward"]) + width(looks["backward"]) == pytest.approx(line.compute_s * scale, abs=4)
    assert width(looks["stall"]) == pytest.approx(line.total_stall_s * scale, abs=4)
    for lane in drawn.lanes[1:]:
        assert width(lane.marks[0][1]) == pytest.approx(lane.busy_s * scale, abs=4)
    assert line.total_stall_s > 0

    waits = times.waits(plan, line)
    assert sum(wait.stall_s for wait in waits) == pytest.approx(plan.prediction.stall_s)
    for wait in waits:
        assert wait.block is None or wait.block in plan.table.accesses[wait.access].blocks


# ---- axes and words -------------------------------------------------------------------------------------------------

UNITS = {
    "B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40,
    "ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0,
}  # fmt: skip


def right(ticks: tuple[axes.Tick, ...], first: float, last: float) -> None:
    """Check that every mark is where its own text says, that they are few and that no two say the same."""
    for tick in ticks:
        number, unit = tick.text.replace(",", "").split()
        assert first + tick.at * (last - first) == pytest.approx(float(number) * UNITS[unit], rel=1e-6, abs=last * 1e-9)
    assert len({tick.text for tick in ticks}) == len(ticks) <= 7
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)


@given(st.integers(0, 1 << 45), st.integers(1, 1 << 45), st.booleans())
def test_marks_of_bytes_are_where_they_say(first: int, span: int, upwards: bool) -> None:
    right(axes.size_ticks(first, first + span, upwards=upwards), first, first + span)


@given(st.floats(1e-8, 1e6), st.booleans())
def test_marks_of_times_are_where_they_say(end_s: float, upwards: bool) -> None:
    ticks = axes.time_ticks(end_s, upwards=upwards)
    right(ticks, 0.0, end_s)
    assert len(ticks) >= 2


@given(st.integers(1, 100_000))
def test_marks_of_calls_are_at_the_middle_of_their_columns(count: int) -> None:
    for tick in axes.count_ticks(count):
        assert tick.at == pytest.approx((int(tick.text.replace(",", "")) + 0.5) / count)


def apart(drawn: tuple[tags.Tag, ...]) -> None:
    """Check that no word is on another, and none beyond the drawing, with the widths of a phone."""
    for tag in drawn:
        left, edge, top, bottom = tag.box
        assert -1e-9 <= left < edge <= 1 + 1e-9, tag
        assert -1e-9 <= top < bottom <= 1 + 1e-9, tag
    for one, other in itertools.combinations(drawn, 2):
        a, b = one.box, other.box
        assert not (a[0] < b[1] and b[0] < a[1] and a[2] < b[3] and b[2] < a[3]), (one, other)


@given(ROWS.filter(lambda rows: any(any(row.values()) for row in rows)), st.none() | st.integers(1, 1 << 45))
def test_words_are_apart_and_each_is_on_its_band(rows: list[dict[str, int]], budget_bytes: int | None) -> None:
    chart = memory.chart("vram", rows, budget_bytes)
    apart(chart.tags)
    if chart.level:
        return
    names = {memory._name(area.kind): area for area in chart.areas}
    count = len(rows)
    for tag in chart.tags:
        if tag.text not in names:
            assert tag.text.startswith(("peak ", "budget "))
            continue
        column = min(count - 1, int(tag.x * count - (1e-9 if tag.anchor == "end" else 0)))
        if tag.anchor != "middle" and tag.leader is None:
            column = max(0, min(count - 1, round(tag.x * count) - (tag.anchor == "start")))
        order = [area.kind for area in reversed(chart.areas)]
        kind = names[tag.text].kind
        below = sum(rows[column].get(other, 0) for other in order[: order.index(kind)]) / chart.top_bytes
        upper = below + rows[column].get(kind, 0) / chart.top_bytes
        y = 1 - (tag.y if tag.leader is None else tag.leader)
        assert below - 1e-6 <= y <= upper + 1e-6, tag


def test_a_bar_of_what_never_changes_is_to_scale() -> None:
    rows = [{"weights": 6 * MIB, "staging": 2 * MIB}] * 5
    chart = memory.chart("ram", rows, 9 * MIB)
    assert chart.level
    widths = {title.split(":")[0]: wide / memory.WIDTH for _, _, wide, title in chart.bars}
    assert widths["weights"] == pytest.approx(6 * MIB / chart.top_bytes, abs=1e-3)
    assert widths["staging"] == pytest.approx(2 * MIB / chart.top_bytes, abs=1e-3)
    assert {tag.text for tag in chart.tags} == {"weights", "staging"}
    apart(chart.tags)


@pytest.mark.parametrize("card_mib", [None, 900, 1500, 1600, 4000])
def test_the_frontier_marks_the_card_where_it_is(card_mib: int | None) -> None:
    plan = solve_plan()
    mine = point_of(plan)
    points = [msgspec.structs.replace(mine, vram_bytes=size_ * MIB, step_s=2.0 / size_) for size_ in (1000, 1300, 2000)]
    card = None if card_mib is None else card_mib * MIB
    drawn = frontier(plan, points, card)
    apart(drawn.tags)
    right(drawn.sizes, drawn.first_bytes, drawn.last_bytes)
    right(drawn.times, 0.0, drawn.top_s)
    least, most = (pick(p.vram_bytes for p in (*points, mine)) for pick in (min, max))
    inside = card is not None and least <= card <= most + (most - least) // 4
    assert (drawn.card_x is not None) == inside
    if drawn.card_x is not None and card is not None:
        share = (card - drawn.first_bytes) / (drawn.last_bytes - drawn.first_bytes)
        assert float(drawn.card_x) == pytest.approx(share * memory.WIDTH, abs=0.06)
        assert f"card {size(card)}" in {tag.text for tag in drawn.tags}
