"""A link that is slower while it is busy both ways: both directions played together, as an oracle plays them."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.errors import PlanCheckError
from memplan.place.solve import place
from memplan.program.check.judge import check
from memplan.program.duplex import BothWays
from memplan.program.timeline import Load, simulate, timeline_of
from tests.support.tables import MIB, NAMES, budgets, make_table


def test_by_hand():
    """Down 2 s from 0, up 1 s from 1: alone for a second, then both at half speed until the first is over at 3 s."""
    down, up = [Load(-1, 1, 2.0, None)], [Load(0, 2, 1.0, None)]
    both = BothWays((0, 1), 0.5)
    alone = simulate([1.0, 1.0, 0.0], [down, up])
    assert alone.ends_s[:3] == [1.0, 3.0, 3.0]
    slowed = simulate([1.0, 1.0, 0.0], [down, up], both)
    assert slowed.starts_s[1] == pytest.approx(3.0)
    assert slowed.loads_s[1][0] == pytest.approx((1.0, 3.0))
    # Above, half of what goes up is left as the other ends, were it 2 s long; here both end at once.
    longer = simulate([1.0, 1.0, 0.0], [down, [Load(0, 2, 2.0, None)]], both)
    assert longer.loads_s[1][0] == pytest.approx((1.0, 4.0))


def test_what_comes_back_waits_for_what_went():
    up, down = [Load(0, 2, 2.0, None)], [Load(1, 2, 1.0, (0, 0))]
    passes = simulate([1.0, 1.0, 1.0], [up, down], BothWays((1, 0), 0.5))
    assert passes.loads_s[1][0] == pytest.approx((3.0, 4.0))


def test_what_can_never_move():
    up, down = [Load(0, 2, 1.0, None)], [Load(1, 1, 1.0, None)]
    with pytest.raises(PlanCheckError, match="waits for"):
        simulate([1.0] * 3, [up, down], BothWays((1, 0), 0.5))


def played(times, channels, share, passes):
    """The oracle, in exact numbers: the whole world from one event to the next. The mean of the second half of the
    passes.
    """
    length, ends, done = len(times), [], [[] for _ in channels]
    now, way = Fraction(0), {}  # by channel, or -1 for the compute: what is left of it
    while len(ends) < length * passes:
        for channel, loads in enumerate(channels):
            turn, at = divmod(len(done[channel]), len(loads))
            load = loads[at]
            source = load.source
            if channel in way or turn * length + load.load_after >= len(ends):
                continue
            if source is not None and len(done[source[0]]) <= turn * len(channels[source[0]]) + source[1]:
                continue
            way[channel] = Fraction(load.time_s)
        turn, index = divmod(len(ends), length)
        needed = [
            turn * len(loads) + at < len(done[channel])
            for channel, loads in enumerate(channels)
            for at, load in enumerate(loads)
            if load.first_use == index
        ]
        if -1 not in way and all(needed):
            way[-1] = Fraction(times[index])
        if not way:
            return None
        speed = {one: share if one in (0, 1) and {0, 1} <= way.keys() else Fraction(1) for one in way}
        step = min(left / speed[one] for one, left in way.items())
        now += step
        way = {one: left - step * speed[one] for one, left in way.items()}
        for one in [one for one, left in way.items() if left == 0]:
            del way[one]
            (ends if one < 0 else done[one]).append(now)
    half = passes // 2
    return float((ends[-1] - ends[half * length - 1]) / (passes - half))


@st.composite
def systems(draw):
    length = draw(st.integers(2, 7))
    seconds = st.sampled_from([0.0, 0.25, 0.5, 1.0, 1.125, 2.0])
    times = draw(st.lists(seconds, min_size=length, max_size=length))
    channels = []
    for _ in range(draw(st.integers(2, 3))):
        loads = []
        for _ in range(draw(st.integers(1, 4))):
            use = draw(st.integers(0, length - 1))
            after = use - draw(st.integers(1, length))
            loads.append(Load(after, use, draw(st.sampled_from([0.125, 0.25, 1.0, 2.75])), None))
        channels.append(sorted(loads, key=lambda load: load.first_use) if draw(st.booleans()) else loads)
    if draw(st.booleans()):  # what goes up comes back down, or what the disk brings does
        source = draw(st.integers(1, len(channels) - 1))
        at = draw(st.integers(0, len(channels[source]) - 1))
        use = draw(st.integers(0, length - 1))
        channels[0].append(Load(use - 1, use, 0.5, (source, at)))
    return times, channels


SHARES = st.sampled_from([0.5, 0.625, 0.875])


def is_as_the_oracle_plays_it(system, share):
    times, channels = system
    mean_s = played(times, channels, Fraction(share), 96)
    if mean_s is None:
        with pytest.raises(PlanCheckError):
            simulate(times, channels, BothWays((0, 1), share))
    else:
        found = simulate(times, channels, BothWays((0, 1), share)).pass_s
        assert found == pytest.approx(mean_s, rel=1e-9, abs=1e-9)
        assert found >= sum(times) * (1 - 1e-9)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(system=systems(), share=SHARES)
def test_as_the_oracle_plays_it(system, share):
    is_as_the_oracle_plays_it(system, share)


@pytest.mark.full
@settings(max_examples=1000, deadline=None, derandomize=True)
@given(system=systems(), share=SHARES)
def test_as_the_oracle_plays_it_many_times(system, share):
    is_as_the_oracle_plays_it(system, share)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(system=systems())
def test_at_full_rate_it_is_as_if_they_were_two_links(system):
    times, channels = system
    try:
        apart = simulate(times, channels)
    except PlanCheckError:
        with pytest.raises(PlanCheckError):
            simulate(times, channels, BothWays((0, 1), 1.0))
        return
    together = simulate(times, channels, BothWays((0, 1), 1.0))
    assert together.pass_s == pytest.approx(apart.pass_s, rel=1e-9, abs=1e-12)


def offloading(share, **changes):
    kinds = {"saved_bytes": 6 * MIB, "boundary_bytes": MIB // 8, "forward_s": 0.004, "backward_s": 0.006, "link": 1.5e9}
    table = make_table([4 * MIB] * 10, **{**kinds, "device": "cuda", "offloadable": True, "duplex": share, **changes})
    whole = max(table.device_bytes_at(access.index, {}) for access in table.accesses) + 40 * MIB
    activations = dict.fromkeys(table.recomputable, "offload")
    return place(table, budgets(whole // 2), activations=activations, pieces=False, **NAMES)


@pytest.mark.parametrize("share", [0.9, 0.6, 0.5])
def test_a_plan_that_offloads_takes_longer_and_the_judge_knows(share):
    full, plan = offloading(1.0), offloading(share)
    assert check(plan) == ()
    assert plan.prediction.pass_s >= full.prediction.pass_s * (1 - 1e-9)
    assert plan.prediction.bound_s <= full.prediction.bound_s * (1 + 1e-9)
    assert plan.prediction.bound_s <= plan.prediction.pass_s
    line = timeline_of(plan)
    took = {load.residence: load.end_s - load.start_s for load in line.loads}
    alone = {stay.id: plan.items[stay.item].size_bytes / 1.5e9 for stay in plan.residences if stay.begins == "load"}
    assert all(alone[stay] * (1 - 1e-9) <= took[stay] <= alone[stay] / share * (1 + 1e-9) for stay in alone)
    assert any(took[stay] > alone[stay] * 1.01 for stay in alone)
    assert any(
        "a micro-batch of" in fault for fault in check(replace(plan, table=replace(plan.table, duplex_factor=1.0)))
    )


def test_without_what_goes_up_nothing_changes():
    table = make_table([4 * MIB] * 10, device="cuda", link=5e8)
    slow = replace(table, duplex_factor=0.5)
    whole = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    plan, other = (place(one, budgets(whole + 16 * MIB), **NAMES) for one in (table, slow))
    assert (plan.prediction, plan.residences) == (other.prediction, other.residences)
