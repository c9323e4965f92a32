"""Plans of a few whole blocks beside every choice there is of what is held."""

from __future__ import annotations

import itertools
import random

import pytest
from msgspec.structs import replace

from memplan.place.layout.layout import arrangement_of, stays_of
from memplan.place.problem import make_problem
from memplan.place.solve import place
from memplan.program.timeline import Load, durations, simulate
from tests.place import brute
from tests.support.tables import MIB, NAMES, budgets, make_table

ALLOWED = 0.01
"""A plan may take this much longer than the optimum."""


def _random_problem(rng, most):
    sizes = [rng.randint(1, 8) * MIB for _ in range(rng.randint(3, most))]
    reads = [(block,) for block in range(len(sizes))]
    if rng.random() < 0.3:  # a block that is read twice a sweep
        reads.insert(rng.randint(0, len(sizes)), (rng.randrange(len(sizes)),))
    table = make_table(
        sizes, reads, saved_bytes=0, boundary_bytes=0, transient_bytes=0, recomputable=False,
        link=rng.choice([0.25, 0.5, 1, 2, 4]) * MIB,
    )  # fmt: skip
    rows = tuple(replace(row, time_s=float(rng.randint(1, 8))) for row in table.accesses)
    return replace(table, accesses=rows), max(sizes) + rng.randint(0, (sum(sizes) - max(sizes)) // MIB) * MIB


def best_with_addresses(table, room, policies=None):
    """Try every address of every block, in steps of its unit: each block has one, which is more than a pool asks."""
    sizes, times = [block.size_bytes for block in table.blocks], durations(table, policies or {})
    problem = make_problem(table, budgets(room), 0, {}, policies or {})
    stores, back = problem.saves.loads(table, disk_used=False)
    homes = dict.fromkeys(range(len(sizes)), "host")
    best = float("inf")
    for addresses in itertools.product(*[range(0, room - size + 1, MIB) for size in sizes]):
        arrangement = arrangement_of(problem, dict(enumerate(addresses)), homes, room)
        stays = stays_of(problem, arrangement)
        if stays is None:
            continue
        rate = table.host_to_device_bytes_per_s
        loads = [Load(s.load_after, s.first_use, sizes[s.block] / rate, None) for s in stays]
        loads = sorted([*loads, *back], key=lambda load: load.first_use)
        best = min(best, simulate(times, [channel for channel in (stores, loads) if channel]).pass_s)
    return best


@pytest.mark.parametrize(("count", "most"), [(60, 4), pytest.param(300, 6, marks=pytest.mark.full)])
def test_whole_blocks_beside_every_choice_of_what_is_held(count, most):
    """Within 1% of the optimum over a byte pool; where a pool does what no addresses allow, of that over all
    addresses.
    """
    rng = random.Random(most)
    beyond = 0
    for _ in range(count):
        table, room = _random_problem(rng, most)
        rest = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
        plan = place(table, budgets(rest + room, disk=0), **NAMES, pieces=False)
        sizes, reads = [block.size_bytes for block in table.blocks], [access.blocks for access in table.accesses]
        times, rate = durations(table, {}), table.host_to_device_bytes_per_s
        best = brute.optimum(times, reads, sizes, [room] * len(times), rate)
        assert best is not None
        assert best <= plan.prediction.pass_s * (1 + 1e-9)
        if plan.prediction.pass_s > best * (1 + ALLOWED):
            beyond += 1
            if len(sizes) <= 4:
                assert plan.prediction.pass_s <= best_with_addresses(table, room) * (1 + ALLOWED)
    assert beyond <= 0.05 * count
