"""Times are those of a compute stream and its channels played one event after the other, in the steady state."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.errors import PlanCheckError
from memplan.place.solve import place
from memplan.program.check.judge import check
from memplan.program.schema import STAGING_BYTES
from memplan.program.timeline import Load, durations, simulate, timeline_of
from tests.support.tables import MIB, NAMES, budgets, make_table

X = 10 * MIB


def test_one_load_by_hand():
    """Three accesses of 1 s; the second waits for a load of 2.5 s that may start when the second has ended: 3.5 s."""
    passes = simulate([1.0, 1.0, 1.0], [[Load(-2, 1, 2.5, None)]])
    assert passes.pass_s == pytest.approx(3.5)
    hidden = simulate([1.0, 1.0, 1.0], [[Load(-2, 1, 2.0, None)]])
    assert hidden.pass_s == pytest.approx(3.0)


def test_a_channel_keeps_its_order():
    """The second load is free to go from the start, but stands behind the first."""
    loads = [Load(1, 2, 1.0, None), Load(-1, 3, 1.0, None)]
    assert simulate([1.0] * 4, [loads]).pass_s == pytest.approx(5.0)
    assert simulate([1.0] * 4, [[loads[0]], [loads[1]]]).pass_s == pytest.approx(5.0)
    assert simulate([1.0] * 4, [[loads[1], loads[0]]]).pass_s == pytest.approx(5.0)
    slow = [loads[0], Load(-1, 3, 3.0, None)]
    assert simulate([1.0] * 4, [slow]).pass_s == pytest.approx(2 + 1 + 3 + 1)
    assert simulate([1.0] * 4, [[slow[0]], [slow[1]]]).pass_s == pytest.approx(5.0)


def test_a_load_waits_for_its_source():
    """The disk brings to the host in 3 s, the link from there in 1 s: the access waits for both."""
    disk, link = [Load(-1, 1, 3.0, None)], [Load(-1, 1, 1.0, (1, 0))]
    assert simulate([1.0, 1.0], [link, disk]).pass_s == pytest.approx(3 + 1 + 1)


def test_loads_that_wait_for_each_other():
    with pytest.raises(PlanCheckError, match="waits for access 2"):
        simulate([1.0] * 3, [[Load(2, 2, 1.0, None)]])
    with pytest.raises(PlanCheckError, match="its own channel brings later"):
        simulate([1.0] * 3, [[Load(0, 1, 1.0, (0, 1)), Load(1, 2, 1.0, None)]])


def test_a_prefetch_that_runs_ahead_less_and_less():
    """Equal passes are not yet a steady state: what one channel hides in the first passes shows later."""
    times = [2.0, 1.0]
    channels = [[Load(-2, 0, 0.7, None), Load(-1, 1, 2.2, None)]]
    assert simulate(times, channels).pass_s == pytest.approx(mean_pass(times, channels, 400), rel=1e-6)


def mean_pass(times, channels, passes):
    """The oracle: whatever can go, goes; the mean of the second half of many passes. None where deadlock."""
    length, ends, finished, now = len(times), [], [[] for _ in channels], 0.0
    marks = []
    while len(ends) < length * passes:
        moved = False
        for loads, done in zip(channels, finished, strict=True):
            turn, at = divmod(len(done), len(loads))
            after = turn * length + loads[at].load_after
            if after < len(ends):
                free = done[-1] if done else 0.0
                done.append(max(free, ends[after] if after >= 0 else 0.0) + loads[at].time_s)
                moved = True
        turn, index = divmod(len(ends), length)
        needed = [
            (done, turn * len(loads) + at)
            for loads, done in zip(channels, finished, strict=True)
            for at, load in enumerate(loads)
            if load.first_use == index
        ]
        if all(number < len(done) for done, number in needed):
            now = max([now, *(done[number] for done, number in needed)]) + times[index]
            ends.append(now)
            moved = True
            if index == length - 1:
                marks.append(now)
        if not moved:
            return None
    half = passes // 2
    return (marks[-1] - marks[half - 1]) / (passes - half)


@st.composite
def systems(draw):
    length = draw(st.integers(2, 8))
    seconds = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.1, 2.0])
    times = draw(st.lists(seconds, min_size=length, max_size=length))
    channels = []
    for _ in range(draw(st.integers(0, 3))):
        loads = []
        for _ in range(draw(st.integers(1, 5))):
            use = draw(st.integers(0, length - 1))
            loads.append(
                Load(use - draw(st.integers(1, length)), use, draw(st.sampled_from([0.1, 0.3, 1.0, 2.7])), None)
            )
        channels.append(sorted(loads, key=lambda load: load.first_use) if draw(st.booleans()) else loads)
    return times, channels


@settings(max_examples=150, deadline=None, derandomize=True)
@given(system=systems())
def test_as_the_oracle_plays_it(system):
    times, channels = system
    mean_s = mean_pass(times, channels, 160)
    if mean_s is None:
        with pytest.raises(PlanCheckError):
            simulate(times, channels)
    else:
        assert simulate(times, channels).pass_s == pytest.approx(mean_s, rel=1e-6, abs=1e-9)


@pytest.fixture(scope="module")
def plan():
    table = make_table([X] * 10, recomputable=False, latency_s=1e-3)
    rest = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    return place(table, budgets(rest + 4 * X, ram=5 * X + 16 * MIB), **NAMES)


def test_the_rows_of_a_plan_hang_together(plan):
    """Each rule of the model holds between the rows of the steady pass, written out for itself."""
    line = timeline_of(plan)
    length = len(plan.table.accesses)
    assert line.pass_s == pytest.approx(line.access_end_s[-1])
    assert line.pass_s == pytest.approx(line.compute_s + line.total_stall_s)
    assert line.pass_s == plan.prediction.pass_s
    assert min(line.stall_s) >= -1e-12
    timed = {load.residence: load for load in line.loads}
    assert set(timed) == {stay.id for stay in plan.residences if stay.begins == "load"}
    rates = {"h2d": plan.table.host_to_device_bytes_per_s, "disk": plan.table.disk_bytes_per_s}
    before = {}
    for stay in sorted((s for s in plan.residences if s.begins == "load"), key=lambda s: s.order):
        load = timed[stay.id]
        assert load.end_s - load.start_s == pytest.approx(1e-3 + X / rates[stay.channel])
        cycle, index = divmod(stay.load_after, length)
        assert load.start_s >= line.access_end_s[index] + cycle * line.pass_s - 1e-9
        assert load.start_s >= before.get(stay.channel, -1e9) - 1e-9
        assert line.access_start_s[stay.first_use] >= load.end_s - 1e-9
        before[stay.channel] = load.end_s


def test_the_optimizer_counts_once_a_step(plan):
    table = plan.table
    workload = replace(NAMES["workload"], accumulation=4)
    again = place(table, plan.budgets, **{**NAMES, "workload": workload})
    assert durations(table, {})[-1] == 0.0
    assert again.prediction.step_s == pytest.approx(4 * again.prediction.pass_s + table.accesses[-1].time_s)


def test_recompute_takes_time_where_it_is_planned():
    table = make_table([X] * 3)
    kept, one = durations(table, {}), durations(table, {"layers.1": "recompute"})
    changed = [row.index for row in table.accesses if kept[row.index] != one[row.index]]
    assert [table.accesses[index].kind for index in changed] == ["backward"]
    assert sum(one) - sum(kept) == pytest.approx(table.accesses[changed[0]].recompute_s)


@pytest.mark.parametrize(("disk", "share"), [(2e8, 0.2), (5e8, 0.5), (3e9, 0.5)])
def test_what_comes_from_the_disk_takes_its_share_of_a_cards_link(disk, share):
    """The disk's bytes cross the link too: both together are never faster than it, and the judge has the same times."""
    rates, kinds = {"link": 1e9, "disk": disk}, {"forward_s": 1e-6, "backward_s": 1e-6, "recomputable": False}
    table = make_table([X] * 12, device="cuda", **rates, **kinds)
    rest = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    mixed = place(table, budgets(rest + 4 * X, ram=6 * X + STAGING_BYTES), **NAMES)
    timeline = timeline_of(mixed)
    spent = {channel: {round(load.end_s - load.start_s, 9) for load in timeline.loads if load.channel == channel}
             for channel in ("h2d", "disk")}  # fmt: skip
    assert spent == {"h2d": {round(X / (1 - share) / 1e9, 9)}, "disk": {round(X / share / 1e9, 9)}}
    assert mixed.prediction.loaded_bytes_per_pass <= mixed.prediction.pass_s * 1e9
    wrong = replace(mixed.prediction, pass_s=mixed.prediction.pass_s * 0.99)
    assert check(mixed) == ()
    assert any("a micro-batch of" in fault for fault in check(replace(mixed, prediction=wrong)))
    alone = timeline_of(place(table, budgets(rest + 4 * X), **NAMES))
    assert {round(load.end_s - load.start_s, 9) for load in alone.loads} == {round(X / 1e9, 9)}


def test_on_the_cpu_the_disk_is_read_beside_the_host():
    table = make_table([X] * 12, link=1e9, disk=2e8, forward_s=1e-6, backward_s=1e-6, recomputable=False)
    rest = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    mixed = timeline_of(place(table, budgets(rest + 4 * X, ram=6 * X + STAGING_BYTES), **NAMES))
    assert {round(load.end_s - load.start_s, 9) for load in mixed.loads} == {round(X / 1e9, 9), round(X / 2e8, 9)}
