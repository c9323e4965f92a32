"""What the page draws: to scale, with nothing lost or added."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from memplan.errors import DoesNotFitError
from memplan.place.solve import place
from memplan.program.memory_timeline import DEVICE_KINDS, timeline
from memplan.program.schema import Plan
from memplan.program.timeline import timeline_of
from memplan.show.html import memory, times
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
    assert legend["all"] == size(chart.peak_bytes)


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
    assert {lane.name for lane in drawn.lanes} >= {"compute", "link, to the device", "disk"}

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
