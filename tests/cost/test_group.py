"""The rows of a group: bytes as an enumeration of its turns has them, times as the sum of its micro-batches."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from memplan.analyze.graph import Fixed, Lifetime, Rows
from memplan.cost.group import copies_at, grouped, size_beside_gradients, sizes
from memplan.place.problem import Memory
from memplan.place.solve import place
from memplan.program.check.groups import device_bytes
from memplan.program.timeline import durations
from tests.support.tables import MIB, NAMES, budgets, make_table
from tests.support.turns import bytes_of_turns

POLICIES = ("keep", "recompute")


def random_table(rng):
    """Lifetimes, transients (also negative ones) and kinds as they may be, whatever a model has."""
    table = make_table([MIB] * rng.randint(1, 5))
    rows = tuple(
        replace(
            row,
            transient_bytes=rng.randint(-50, 300),
            transient_recompute_bytes=rng.randint(-50, 300),
        )
        for row in table.accesses
    )
    lives = []
    for _ in range(rng.randint(0, 25)):
        born, last = sorted((rng.randrange(len(rows)), rng.randrange(len(rows))))
        kind = rng.choice(("activations", "activations", "activations", "gradients"))
        policy = rng.choice(("any", *POLICIES))
        lives.append(Lifetime(kind=kind, born=born, last=last, size_bytes=rng.randint(1, 500), policy=policy))
    fixed = (*table.fixed, Fixed(kind="batch", size_bytes=rng.randint(0, 99)))
    return replace(table, accesses=rows, lifetimes=tuple(lives), fixed=fixed)


@pytest.mark.parametrize("seed", range(40))
def test_bytes_are_those_of_every_turn(seed):
    """The rows, the solver's arrays, the judge and what is listed at an access, each by itself."""
    rng = random.Random(seed)
    table, group = random_table(rng), rng.choice((1, 2, 3, 4, 8))
    policies = {module: rng.choice(POLICIES) for module in table.recomputable}
    rows = replace(table, group=group)
    want = bytes_of_turns(table, policies, group)
    assert rows.device_bytes(policies) == want
    assert [rows.device_bytes_at(row.index, policies) for row in rows.accesses] == want
    assert Memory(rows).at(policies).tolist() == want

    plan = place(make_table([MIB] * len(table.blocks)), budgets(1 << 30), **NAMES)
    activations = tuple(replace(one, activations=policies[one.module]) for one in plan.activations)
    assert device_bytes(replace(plan, table=rows, group=group, activations=activations)) == want

    for row in rows.accesses:
        at, lives = copies_at(rows, policies, row.index)
        first, last = rows.visit(row.index)
        assert first <= at <= last
        beside = sum(one.size_bytes * (group if one.kind == "batch" else 1) for one in rows.fixed)
        beside += rows.accesses[at].transient(policies.get(rows.accesses[at].module, "keep"))
        assert beside + sum(life.size_bytes * count for life, count in lives) == want[row.index]


def test_an_access_takes_the_sum_of_its_micro_batches():
    table = make_table([MIB] * 3, device="cuda")
    rows = tuple(
        replace(row, rows=(Rows(block=0, size_bytes=4096),)) if row.index == 0 else row for row in table.accesses
    )
    table = replace(table, accesses=rows)
    policies = {"layers.1": "recompute"}
    one = durations(table, policies, on_host={0})
    assert one[0] > table.accesses[0].time_s
    assert durations(grouped(table, 5, 9), policies, on_host={0}) == pytest.approx([5 * time_s for time_s in one])
    assert durations(grouped(table, 5, 9), policies)[-1] == 0.0


def test_only_what_turns_around_in_one_module_can_be_grouped():
    table = make_table([MIB] * 3)
    assert table.turn_around == (2, 4)
    loss = next(row for row in table.accesses if row.kind == "loss")
    first = table.accesses[loss.index + 1]
    rows = list(table.accesses)
    rows[first.index] = replace(first, forward=0, module="layers.0")
    other = replace(table, accesses=tuple(rows))
    assert other.turn_around is None
    assert grouped(other, 1, 4) is other
    for rows, group in ((other, 2), (table, 0)):
        with pytest.raises(ValueError, match=f"groups of {group}"):
            grouped(rows, group, 4)


def test_sizes_that_are_looked_at():
    assert sizes(1) == (1,)
    assert sizes(6) == (1, 2, 3, 4, 6)
    assert sizes(16) == (1, 2, 4, 8, 16)
    assert sizes(7) == (1, 2, 4, 7)


def test_gradients_are_there_from_where_a_micro_batch_made_them():
    """From the first access on behind another group; where a step is one group, from its first micro-batch's on."""
    table = make_table([MIB] * 3)
    last = len(table.accesses) - 1
    lives = tuple(life for life in table.lifetimes if life.kind != "gradients")
    before = Lifetime(kind="gradients", born=0, last=last, size_bytes=70, policy="any")
    made = {4: 10, 5: 20, 6: 30}
    rows = tuple(replace(row, gradient_bytes=made.get(row.index, 0)) for row in table.accesses)
    table = replace(table, accesses=rows, lifetimes=(*lives, before))

    def gradients(rows):
        return {life.born: life.size_bytes for life in rows.lifetimes if life.kind == "gradients"}

    assert gradients(grouped(table, 2, 4)) == gradients(grouped(table, 1, 4)) == {0: 70}
    sole = grouped(table, 4, 4)
    lasting = {life.born: life.size_bytes for life in sole.lifetimes if life.kind == "gradients" and life.last == last}
    assert lasting == {0: 10, **made}
    for group in (1, 2):
        assert gradients(grouped(sole, group, 4)) == {0: 70}
    # What the first access has is said once for each policy, where its module has a choice.
    each = tuple(replace(before, policy=policy) for policy in POLICIES)
    assert gradients(grouped(replace(table, lifetimes=(*lives, *each)), 4, 4)) == {0: 10, **made}


@pytest.mark.parametrize("seed", range(40))
def test_a_smaller_group_behind_the_first_has_all_gradients(seed):
    """So has the second micro-batch of a run, whose first goes by itself: what is counted is enough for both."""
    rng = random.Random(seed)
    table, group = random_table(rng), rng.choice((2, 3, 4, 8))
    accumulation = rng.randint(group, 2 * group - 1)
    others = tuple(life for life in table.lifetimes if life.kind != "gradients")
    made = {row.index: rng.randint(0, 400) for row in table.accesses}
    rows = tuple(replace(row, gradient_bytes=made[row.index]) for row in table.accesses)
    last = len(rows) - 1
    all_there = Lifetime(kind="gradients", born=0, last=last, size_bytes=sum(made.values()), policy="any")
    table = replace(table, accesses=rows, lifetimes=(*others, all_there))
    policies = {module: rng.choice(POLICIES) for module in table.recomputable}

    found = grouped(table, group, accumulation)
    each = [replace(all_there, born=born, size_bytes=size) for born, size in made.items()]
    first = replace(table, lifetimes=(*others, *each))
    behind = bytes_of_turns(table, policies, max(1, accumulation - group))
    wanted = list(map(max, bytes_of_turns(first, policies, group), behind))
    assert grouped(found, group, accumulation).lifetimes == found.lifetimes
    assert grouped(found, 1, accumulation).device_bytes(policies) == table.device_bytes(policies)
    bytes_ = found.device_bytes(policies)
    assert all(map(int.__ge__, bytes_, wanted))
    size = size_beside_gradients(found, policies, at_each=True)
    assert max(1, accumulation - group) <= size <= group
    assert all(map(int.__le__, bytes_of_turns(table, policies, size), bytes_))
    more = size_beside_gradients(found, policies, at_each=False)
    assert size <= more
    assert max(bytes_of_turns(table, policies, more)) <= max(bytes_)

    plan = place(make_table([MIB] * len(table.blocks)), budgets(1 << 30), **NAMES)
    plan = replace(
        plan,
        table=found,
        group=group,
        activations=tuple(replace(one, activations=policies[one.module]) for one in plan.activations),
        workload=replace(plan.workload, accumulation=accumulation),
    )
    assert device_bytes(plan) == bytes_
    short = replace(found, lifetimes=(*others, *each))  # the judge finds by itself what is missing
    assert all(map(int.__ge__, device_bytes(replace(plan, table=short)), behind))
