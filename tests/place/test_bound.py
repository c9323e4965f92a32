"""The bound is the closed form where there is one, and never above what a plan really takes."""

from __future__ import annotations

import itertools
import random
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.errors import DoesNotFitError
from memplan.place.bound import window_bound
from memplan.place.problem import Memory, make_problem
from memplan.place.solve import place
from memplan.program.schema import STAGING_BYTES
from memplan.program.timeline import durations
from tests.place import fluid
from tests.support.tables import MIB, NAMES, budgets, make_table

X = 10 * MIB
FLAT = {"saved_bytes": 0, "boundary_bytes": 0, "recomputable": False}  # the room is the same all along the pass


def bound_of(table, given_budgets, disk_used=False):
    problem = make_problem(table, given_budgets, STAGING_BYTES, {})
    return window_bound(problem, durations(table, {}), Memory(table).at({}), disk_used)


def rest_of(table):
    return max(table.device_bytes_at(access.index, {}) for access in table.accesses)


@pytest.mark.each_value
@pytest.mark.parametrize(("n", "m"), [(8, 3), (8, 5), (8, 7), (32, 3), (32, 10), (32, 24)])
@pytest.mark.parametrize("link", [1e8, 1e9, 4e9])
def test_the_closed_form_for_equal_blocks(n, m, link):
    """max(Σf, (N-M)x + f_first + f_last) + max(Σb, (N-M)x + b_first + b_last), and the loss between."""
    f, b, loss, x = 0.01, 0.02, 0.001, X / link
    table = make_table([X] * n, forward_s=f, backward_s=b, link=link, **FLAT)
    found = bound_of(table, budgets(rest_of(table) + m * X))
    closed = max(n * f, (n - m) * x + 2 * f) + max(n * b, (n - m) * x + 2 * b)
    assert closed <= found + 1e-9
    assert found <= closed + 2 * loss + 1e-9  # the loss is an access of its own, beside which loads run


def test_compute_alone_where_all_fits():
    table = make_table([X] * 6, **FLAT)
    assert bound_of(table, budgets(1 << 40)) == pytest.approx(sum(durations(table, {})))


def test_as_the_longest_path_written_out():
    """Paths over every chain of windows of one period, on a small case, from sums written out for themselves."""
    table = make_table([X, 3 * X, 2 * X], forward_s=0.003, backward_s=0.005, link=1e9, **FLAT)
    room = 4 * X
    times, length = durations(table, {}), len(table.accesses)

    def wait_s(p, q):
        needed = {block for k in range(p + 1, q + 1) for block in table.accesses[k % length].blocks}
        needed |= set(table.accesses[p % length].blocks)
        return max(0, sum(table.blocks[block].size_bytes for block in needed) - room) / 1e9

    longest = 0.0
    for start in range(length):
        inner = range(start + 1, start + length)
        for count in range(length):
            for stops in itertools.combinations(inner, count):
                path = [start, *stops, start + length]
                hops = itertools.pairwise(path)
                longest = max(longest, sum(wait_s(p, q) + times[q % length] for p, q in hops))
    assert bound_of(table, budgets(rest_of(table) + room)) == pytest.approx(longest)


@pytest.mark.each_value
@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("held", [0, 4, 7, 10])
def test_host_and_disk_at_once(device, held):
    """As fast as each other, both in use: on the CPU together they bring twice as much, to a card over its one link no
    more.
    """
    table = make_table([X] * 16, forward_s=1e-4, backward_s=1e-4, link=1e8, disk=1e8, device=device, **FLAT)
    said = place(table, budgets(rest_of(table) + 4 * X, ram=held * X + STAGING_BYTES), **NAMES).prediction
    assert said.bound_s <= said.pass_s * (1 + 1e-9)
    together = 2e8 if device == "cpu" else 1e8
    assert said.bound_s >= 2 * (16 - 4) * X / together


def test_what_neither_tier_holds_comes_from_the_disk():
    table = make_table([X] * 16, link=1e10, disk=1e8, **FLAT)
    found = bound_of(table, budgets(rest_of(table) + 4 * X, ram=2 * X + STAGING_BYTES), disk_used=True)
    assert found >= 2 * (16 - 4 - 2) * X / 1e8


def test_a_hundred_and_sixty_accesses_take_a_moment():
    table = make_table([X] * 80, link=1e9, **FLAT)
    begin = time.process_time()
    bound_of(table, budgets(rest_of(table) + 20 * X))
    assert time.process_time() - begin < 1.0


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    sizes=st.lists(st.integers(1, 40), min_size=2, max_size=8),
    again=st.integers(0, 7),
    times=st.tuples(st.floats(1e-4, 1e-2), st.floats(1e-4, 1e-2)),
    saved=st.sampled_from([0, MIB]),
    rates=st.tuples(st.sampled_from([1e7, 1e8, 1e9]), st.sampled_from([1e7, 1e8, 1e9])),
    room=st.floats(0.2, 1.0),
    ram=st.sampled_from([0.0, 0.3, 0.6, 100.0]),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_never_above_a_plan(sizes, again, times, saved, rates, room, ram, device):
    unit = 64 * 1024
    reads = [(index,) for index in range(len(sizes))] + [(again % len(sizes),)]
    table = make_table(
        [size * unit for size in sizes],
        reads,
        forward_s=times[0],
        backward_s=times[1],
        saved_bytes=saved,
        link=rates[0],
        disk=rates[1],
        device=device,
    )
    total = sum(sizes) * unit
    try:
        plan = place(table, budgets(rest_of(table) + int(total * room), ram=int(total * ram) + STAGING_BYTES), **NAMES)
    except DoesNotFitError:
        return
    assert plan.prediction.bound_s <= plan.prediction.pass_s * (1 + 1e-9)


UNIT = 512


def _random_problem(rng):
    """Return a table, and the room at each access: 3 or 4 unequal blocks, half the time one read twice a sweep."""
    sizes = [rng.randint(1, 8) * UNIT for _ in range(rng.randint(3, 4))]
    reads = [(block,) for block in range(len(sizes))]
    if rng.random() < 0.5:
        reads.insert(rng.randint(0, len(sizes)), (rng.randrange(len(sizes)),))
    table = make_table(sizes, reads, **FLAT, link=rng.choice([0.125, 0.25, 0.5, 1, 2]) * UNIT)
    rows = tuple(replace(row, time_s=float(rng.randint(1, 8))) for row in table.accesses)
    base = max(sizes) + rng.randrange(sum(sizes) // UNIT) * UNIT
    varies = rng.random() < 0.5
    return replace(table, accesses=rows), [base + (rng.randint(0, 4) * UNIT if varies else 0) for _ in rows]


@pytest.mark.parametrize("count", [1000, pytest.param(30_000, marks=pytest.mark.full)])
def test_never_above_the_optimum_and_nearly_always_it(count):
    """The optimum of bytes that flow, by linear programming, on small problems, room varying by access."""
    rng = random.Random(count)
    equal = waits = varying = shared = 0
    for _ in range(count):
        table, rooms = _random_problem(rng)
        times = durations(table, {})
        vram = max(rooms)
        problem = make_problem(table, budgets(vram), 0, {})
        bound = max(window_bound(problem, times, np.array([vram - room for room in rooms]), False), sum(times))
        sizes, reads = [block.size_bytes for block in table.blocks], [access.blocks for access in table.accesses]
        best = fluid.optimum(times, reads, sizes, rooms, table.host_to_device_bytes_per_s)
        assert best is not None
        assert bound <= best * (1 + 1e-7)
        if best > sum(times) * 1.01:  # else there is nothing to bound
            waits += 1
            varying += len(set(rooms)) > 1
            shared += len(reads) > 2 * len(sizes) + 2  # a block that is read twice a sweep
            equal += bound >= best * (1 - 1e-6)
    assert waits >= 0.3 * count
    assert equal >= 0.99 * waits
    assert min(varying, shared) >= 0.1 * count  # of those in which the link has a say


@pytest.mark.each_value
@pytest.mark.parametrize("backward", [1, 2, 3])
@pytest.mark.parametrize("count", [8, 32, pytest.param(80, marks=pytest.mark.full)])
def test_equal_blocks_meet_it(count, backward):
    """Forward to backward 1:1 to 1:3, a load half to three times a forward, room from two blocks up."""
    for load in (0.5, 1, 2, 3):
        table = make_table([X] * count, forward_s=1, backward_s=backward, link=X / load, **FLAT)
        for room in {2, 3, count // 4, count // 2, 3 * count // 4, count - 1}:
            said = place(table, budgets(rest_of(table) + room * X), **NAMES).prediction
            assert said.pass_s <= said.bound_s * 1.001
