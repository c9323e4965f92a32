"""Plans whose device arena has bytes that come and go: shorter where activations leave room, never longer, and
judged.
"""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.errors import DoesNotFitError, PlanCheckError
from memplan.place.min_vram import least_vram_bytes
from memplan.place.solve import place
from memplan.program.check.judge import check, require
from tests.support.tables import MIB, NAMES, budgets, make_table

X = 10 * MIB
KEPT = {"recomputable": False}


def rest_of(table):
    return max(table.device_bytes_at(access.index, {}) for access in table.accesses)


def tight(count=16, room=3, **more):
    """A table of equal blocks over a slow link whose activations are a quarter of its blocks, and a budget."""
    options = {"saved_bytes": X // 4, "link": X / 0.02, **KEPT, **more}
    table = make_table([X] * count, **options)
    return table, budgets(rest_of(table) + room * X, disk=0)


def segments_of(plan):
    return plan.arenas[0].segments


def with_segments(plan, segments):
    return replace(plan, arenas=(replace(plan.arenas[0], segments=tuple(segments)), *plan.arenas[1:]))


def test_weights_that_stay_over_the_end_of_a_pass_make_it_shorter():
    table, given_budgets = tight()
    flat = place(table, given_budgets, elastic=False, **NAMES)
    plan = place(table, given_budgets, elastic=True, **NAMES)
    assert len(segments_of(flat)) == 1
    assert len(segments_of(plan)) > 1
    assert plan.prediction.pass_s < flat.prediction.pass_s * 0.95
    assert plan.prediction.loads_per_pass < flat.prediction.loads_per_pass
    assert plan.prediction.peaks.vram_bytes <= given_budgets.vram_bytes
    assert plan.prediction.bound_s <= plan.prediction.pass_s * (1 + 1e-9)


def test_room_for_one_block_at_the_worst_access_is_room_for_two_elsewhere():
    """A loss that takes more than anything else: blocks are brought ahead all the same, but around it."""
    table, _ = tight(saved_bytes=0)
    peak = next(row for row in table.accesses if row.kind == "loss")
    rows = [replace(row, transient_bytes=5 * X) if row is peak else row for row in table.accesses]
    table = replace(table, accesses=tuple(rows))
    given_budgets = budgets(rest_of(table) + X)
    flat = place(table, given_budgets, elastic=False, **NAMES)
    plan = place(table, given_budgets, elastic=True, **NAMES)
    assert plan.prediction.pass_s < flat.prediction.pass_s * 0.75


@settings(max_examples=15, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    sizes=st.lists(st.integers(1, 12), min_size=2, max_size=10),
    again=st.integers(0, 9),
    saved=st.integers(0, 12),
    room=st.floats(0.1, 1.0),
    link=st.sampled_from([1e8, 1e9, 4e9]),
    recomputable=st.booleans(),
    ram=st.sampled_from([0.5, 100.0]),
)
def test_never_slower_and_never_below_the_bound(sizes, again, saved, room, link, recomputable, ram):
    reads = [(index,) for index in range(len(sizes))] + [(again % len(sizes),)]
    options = {"saved_bytes": saved * MIB, "link": link, "recomputable": recomputable}
    table = make_table([size * MIB for size in sizes], reads, **options)
    total = sum(sizes) * MIB
    given_budgets = budgets(rest_of(table) + int(total * room), ram=int(total * ram) + 64 * MIB)
    try:
        flat = place(table, given_budgets, elastic=False, **NAMES)
    except DoesNotFitError:
        with pytest.raises(DoesNotFitError):
            place(table, given_budgets, elastic=True, **NAMES)
        return
    plan = place(table, given_budgets, elastic=True, **NAMES)
    assert check(plan) == ()
    # Of passes that are the same to a cost row's exactness the one that moves less is taken.
    assert plan.prediction.pass_s <= flat.prediction.pass_s * (1 + 2e-4)
    assert plan.prediction.bound_s <= plan.prediction.pass_s * (1 + 1e-9)


def test_it_is_for_the_cpu_alone_unless_it_is_asked_for():
    table, given_budgets = tight()
    assert len(segments_of(place(table, given_budgets, **NAMES))) > 1
    cuda = replace(table, device="cuda")
    assert len(segments_of(place(cuda, given_budgets, **NAMES))) == 1
    assert len(segments_of(place(cuda, given_budgets, elastic=True, **NAMES))) > 1
    least = least_vram_bytes(table, given_budgets)
    assert place(table, replace(given_budgets, vram_bytes=least), **NAMES).prediction.peaks.vram_bytes <= least


# ---- what the judge sees ---------------------------------------------------------------------------------------------


def test_a_segment_that_is_there_where_it_has_no_room_is_refused():
    plan = place(*tight(), elastic=True, **NAMES)
    first, *others = segments_of(plan)
    with pytest.raises(PlanCheckError, match="over the budget"):
        require(with_segments(plan, [first, *(replace(segment, absent=()) for segment in others)]))


def test_a_stay_in_bytes_that_are_given_back_is_refused():
    plan = place(*tight(), elastic=True, **NAMES)
    first, *others = segments_of(plan)
    length = len(plan.table.accesses)
    with pytest.raises(PlanCheckError, match="takes bytes that are given back in access"):
        require(with_segments(plan, [first, *(replace(segment, absent=((0, length - 1),)) for segment in others)]))


@pytest.mark.parametrize("absent", [((3, 2),), ((5, 6), (4, 4)), ((0, 1 << 20),), ((-2, 3),)])
def test_a_stretch_that_is_none_is_refused(absent):
    plan = place(*tight(), elastic=True, **NAMES)
    first, second, *others = segments_of(plan)
    faults = check(with_segments(plan, [first, replace(second, absent=absent), *others]))
    assert any("not in order, or not in a micro-batch" in fault for fault in faults)


def test_the_first_segment_and_the_hosts_are_always_there():
    plan = place(*tight(), elastic=True, **NAMES)
    first, *others = segments_of(plan)
    faults = check(with_segments(plan, [replace(first, absent=((16, 16),)), *others]))
    assert any("must be there always" in fault for fault in faults)
    host = replace(plan.arenas[1], segments=(*plan.arenas[1].segments, replace(others[0], offset_bytes=1 << 40)))
    faults = check(replace(plan, arenas=(plan.arenas[0], host)))
    assert any("must be there always" in fault for fault in faults)


def test_every_longer_absence_is_seen_or_harmless():
    """Each stretch is made longer at each end: whatever the judge lets pass has no stay there."""
    plan = place(*tight(), elastic=True, **NAMES)
    length, rng = len(plan.table.accesses), random.Random(5)
    for number, segment in enumerate(segments_of(plan)):
        for first, last in segment.absent:
            longer = (max(0, first - rng.randint(1, 6)), min(length - 1, last + rng.randint(1, 6)))
            others = tuple(one for one in segment.absent if one[1] < longer[0] or longer[1] < one[0])
            absent = tuple(sorted((*others, longer)))
            segments = list(segments_of(plan))
            segments[number] = replace(segment, absent=absent)
            gone = {at for one in absent for at in range(one[0], one[1] + 1)}
            within = {
                address.item
                for address in plan.addresses
                if address.arena == 0 and 0 <= address.offset_bytes - segment.offset_bytes < segment.size_bytes
            }
            clash = any(
                at % length in gone
                for stay in plan.residences
                if stay.item in within and stay.arena == 0
                for at in range(stay.load_after + 1, stay.last_use + 1)
            )
            assert any("given back in access" in f for f in check(with_segments(plan, segments))) == clash
