"""More memory or a faster link is never slower: exactly for equal blocks, and for a few unequal ones within half a percent."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.errors import DoesNotFitError
from memplan.place.solve import place
from tests.tables import MIB, NAMES, budgets, make_table

FLAT = {"saved_bytes": 0, "boundary_bytes": 0, "transient_bytes": 0, "recomputable": False}
SLACK = 0.005


def rest_of(table):
    return max(table.device_bytes_at(access.index, {}) for access in table.accesses)


def passes(table, rooms, **more):
    """Return the pass in s at each room that is enough."""
    found = []
    for room in rooms:
        try:
            found.append(place(table, budgets(rest_of(table) + room, **more), **NAMES).prediction.pass_s)
        except DoesNotFitError:
            assert not found  # what fits in less fits in more
    return found


def never_slower(found, slack=1e-9):
    best = float("inf")
    for pass_s in found:
        assert pass_s <= best * (1 + slack)
        best = min(best, pass_s)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    count=st.integers(4, 12),
    backward=st.sampled_from([1, 2, 3]),
    link=st.sampled_from([0.5, 1, 2, 4]),
    saved=st.sampled_from([0, MIB]),
)
def test_equal_blocks(count, backward, link, saved):
    more = {**FLAT, "saved_bytes": saved, "recomputable": saved > 0}
    table = make_table([8 * MIB] * count, forward_s=1, backward_s=backward, link=link * MIB, **more)
    rooms = range(0, (count + 1) * 8 * MIB, 5 * MIB)
    never_slower(passes(table, rooms))
    faster = replace(table, host_to_device_bytes_per_s=2 * table.host_to_device_bytes_per_s)
    for slow, fast in zip(passes(table, rooms), passes(faster, rooms), strict=True):
        assert fast <= slow * (1 + 1e-9)


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 8), min_size=2, max_size=5),
    times=st.lists(st.integers(1, 8), min_size=14, max_size=14),
    link=st.sampled_from([0.5, 1, 2, 4]),
)
def test_a_few_unequal_blocks(sizes, times, link):
    table = make_table([size * MIB for size in sizes], link=link * MIB, **FLAT)
    rows = [replace(row, time_s=float(time_s)) for row, time_s in zip(table.accesses, times, strict=False)]
    table = replace(table, accesses=(*rows, *table.accesses[len(rows) :]))
    never_slower(passes(table, range(max(sizes) * MIB, sum(sizes) * MIB, MIB)), SLACK)
