"""Groups of micro-batches: which size is chosen, what a step takes, and that every plan of them holds."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.cost.group import grouped, sizes
from memplan.errors import DoesNotFitError
from memplan.place.min_vram import least_vram_bytes
from memplan.place.solve import place
from memplan.program.check.judge import check
from memplan.program.memory_timeline import timeline
from memplan.program.timeline import durations, replay
from tests.place import brute
from tests.support.tables import MIB, NAMES, WORKLOAD, budgets, make_table
from tests.support.turns import bytes_of_turns

EIGHT = {**NAMES, "workload": replace(WORKLOAD, accumulation=8)}
SMALL = {"saved_bytes": MIB, "boundary_bytes": MIB // 16}


def of(accumulation):
    return {**NAMES, "workload": replace(WORKLOAD, accumulation=accumulation)}


def rest_of(table):
    return max(table.device_bytes({}))


def test_loads_are_shared_where_they_are_waited_for():
    """Much longer to load than to compute: what is chosen has the shortest step of all sizes."""
    table = make_table([10 * MIB] * 8, link=2e7, **SMALL)
    room = budgets(rest_of(table) + 32 * MIB)
    plans = {group: place(table, room, groups=(group,), **EIGHT) for group in sizes(8)}
    chosen = place(table, room, groups=sizes(8), **EIGHT)
    assert chosen.group == chosen.table.group > 1
    assert chosen == min(plans.values(), key=lambda plan: plan.prediction.step_s)
    assert chosen.prediction.step_s < 0.6 * plans[1].prediction.step_s
    for group, plan in plans.items():
        assert (plan.group, check(plan)) == (group, ())
        assert plan.prediction.bound_s <= plan.prediction.pass_s * (1 + 1e-9)


def test_what_needs_no_load_is_not_grouped():
    table = make_table([10 * MIB] * 8, link=1e8, **SMALL)
    plan = place(table, budgets(1 << 34), groups=sizes(8), **EIGHT)
    assert (plan.group, plan.prediction.loads_per_pass) == (1, 0)


def test_loads_that_nobody_waits_for_are_not_shared():
    """The link is fast: a larger group takes as long, so the smallest is taken."""
    table = make_table([10 * MIB] * 8, link=1e12, **SMALL)
    plan = place(table, budgets(rest_of(table) + 45 * MIB), groups=sizes(8), **EIGHT)
    assert plan.group == 1
    assert plan.prediction.loads_per_pass > 0


def test_what_does_not_fit_is_not_chosen():
    """Where boundaries are large, only small groups have room; where none has, what is said is of the smallest."""
    table = make_table([100 * MIB] * 8, link=1e9, saved_bytes=40 * MIB, boundary_bytes=8 * MIB)
    least = {group: least_vram_bytes(grouped(table, group, 8), budgets(0)) for group in sizes(8)}
    assert sorted(least.values()) == [least[group] for group in sizes(8)]
    plan = place(table, budgets(least[4]), groups=sizes(8), **EIGHT)
    assert plan.group in (2, 4)
    assert place(table, budgets(least[8]), groups=(8,), **EIGHT).group == 8
    with pytest.raises(DoesNotFitError) as caught:
        place(table, budgets(least[1] - 512), groups=sizes(8), **EIGHT)
    assert caught.value.least_vram_bytes == least[1]
    with pytest.raises(DoesNotFitError) as caught:
        place(table, budgets(least[8] - 512), groups=(8,), **EIGHT)
    assert caught.value.least_vram_bytes == least[8]
    assert any("let 4 of the step's micro-batches share a load, not 8" in tip for tip in caught.value.suggestions)


@pytest.mark.parametrize(("accumulation", "group"), [(8, 4), (10, 4), (7, 4), (9, 2), (3, 2), (5, 5)])
def test_a_step_ends_with_what_is_left(accumulation, group):
    table = make_table([10 * MIB] * 8, link=1e9, **SMALL)
    plan = place(table, budgets(rest_of(table) + 32 * MIB), groups=(group,), **of(accumulation))
    said, policies = plan.prediction, plan.policies()
    full, rest = divmod(accumulation, group)
    took = [
        replay(replace(plan.table, group=n), plan.items, plan.residences, policies).pass_s for n in (group, rest) if n
    ]
    assert said.pass_s == pytest.approx(took[0])
    assert said.last_pass_s == pytest.approx(took[1] if rest else 0.0)
    assert said.step_s == pytest.approx(full * took[0] + sum(took[1:]) + 0.001)
    assert plan.groups == (full, rest)
    assert plan.micro_batch_s == pytest.approx((said.step_s - 0.001) / accumulation)
    assert check(plan) == ()
    if rest:
        assert check(replace(plan, prediction=replace(said, last_pass_s=said.pass_s)))
        assert check(replace(plan, prediction=replace(said, last_pass_s=0.0, step_s=said.step_s - said.last_pass_s)))


@pytest.mark.parametrize("seed", range(20))
def test_beside_every_choice_of_what_is_held(seed):
    """Few unequal blocks, whole: within 1% of the optimum over a pool of bytes, in the median of it."""
    rng = random.Random(seed)
    sizes_bytes = [rng.randint(1, 8) * MIB for _ in range(rng.randint(3, 4))]
    group = rng.choice((2, 3, 4))
    rate = rng.choice((0.25, 0.5, 1, 2)) * MIB
    table = make_table(
        sizes_bytes, saved_bytes=0, boundary_bytes=MIB // 4, transient_bytes=0, recomputable=False, link=rate
    )
    rows = tuple(replace(row, time_s=float(rng.randint(1, 8))) for row in table.accesses)
    table = grouped(replace(table, accesses=rows), group, group)
    room = max(sizes_bytes) + rng.randint(0, (sum(sizes_bytes) - max(sizes_bytes)) // MIB) * MIB
    vram = max(table.device_bytes({})) + room
    plan = place(table, budgets(vram, disk=0), **of(group), pieces=False, elastic=False)
    times = durations(table, {})
    reads = [access.blocks for access in table.accesses]
    best = brute.optimum(times, reads, sizes_bytes, [room] * len(times), rate)
    assert best is not None
    assert best <= plan.prediction.pass_s * (1 + 1e-9)
    assert plan.prediction.pass_s <= best * 1.06


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_every_plan_of_a_group_holds(data):
    """Whatever the blocks, the room and the group: judged, no shorter than its bound, with the bytes of its turns."""
    sizes_bytes = data.draw(st.lists(st.integers(1, 12).map(lambda n: n * MIB), min_size=1, max_size=7))
    saved, boundary = data.draw(st.integers(0, 4)) * MIB, data.draw(st.integers(0, 8)) * MIB // 8
    table = make_table(
        sizes_bytes,
        saved_bytes=saved,
        boundary_bytes=boundary,
        transient_bytes=data.draw(st.integers(-MIB // 8, MIB)),
        link=data.draw(st.sampled_from([1e8, 1e9, 1e10])),
        device=data.draw(st.sampled_from(["cpu", "cuda"])),
        latency_s=data.draw(st.sampled_from([0.0, 1e-4])),
    )
    group = data.draw(st.integers(1, 6))
    names = of(data.draw(st.integers(group, 13)))
    rows = grouped(table, group, names["workload"].accumulation)
    elastic = data.draw(st.booleans())
    ram, disk = data.draw(st.sampled_from([(1 << 40, 0), (40 * MIB, None), (20 * MIB, None)]))
    least = least_vram_bytes(rows, budgets(0, ram, disk))
    if least is None:
        return
    room = budgets(least + data.draw(st.integers(0, sum(sizes_bytes) // MIB)) * MIB, ram, disk)
    plan = place(table, room, groups=(group,), elastic=elastic, **names)
    assert check(plan) == ()
    assert plan.prediction.bound_s <= plan.prediction.pass_s * (1 + 1e-9)
    moments, said = timeline(plan), plan.prediction
    beside = bytes_of_turns(plan.table, plan.policies(), group)
    for moment, bytes_beside in zip(moments, beside, strict=True):
        arena = sum(one.size_bytes_at(moment.index) for one in plan.arenas if one.tier == "device")
        assert moment.vram_bytes == arena + bytes_beside
        assert min(moment.vram.values()) >= 0
    assert max(moment.vram_bytes for moment in moments) == said.peaks.vram_bytes <= room.vram_bytes
    top = moments[said.vram_peak_at].vram
    assert top["batch"] == said.vram_parts["batch"]
    assert sum(said.vram_parts.values()) == said.peaks.vram_bytes
