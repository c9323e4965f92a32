"""Plans with one thing changed: the judge sees nearly every change that means something."""

from __future__ import annotations

import random

import pytest
from msgspec.structs import replace

from memplan.place.solve import place
from memplan.program.check.judge import check
from memplan.program.page_lock import page_locked_bytes
from memplan.program.schema import RING_BYTES, STAGING_BYTES, Segment
from tests.support.tables import MIB, NAMES, WORKLOAD, budgets, make_table

CAUGHT = 0.95


def _plans():
    """Return plans of several kinds: streamed from RAM and from disk, recomputed, unequal, shared, offloaded."""
    equal = make_table([10 * MIB] * 8)
    rest = max(equal.device_bytes_at(access.index, {}) for access in equal.accesses)
    yield place(equal, budgets(rest + 45 * MIB), **NAMES)
    yield place(equal, budgets(rest - 10 * MIB + 35 * MIB), **NAMES)
    yield place(equal, budgets(rest + 45 * MIB, ram=STAGING_BYTES + 25 * MIB), **NAMES)
    sizes = [3 * MIB, 11 * MIB, 7 * MIB, 5 * MIB, 13 * MIB, 2 * MIB, 9 * MIB]
    unequal = make_table(sizes, latency_s=1e-4, device="cuda")
    yield place(unequal, budgets(rest + 24 * MIB), **NAMES)
    yield place(
        equal,
        budgets(rest + 45 * MIB),
        **NAMES,
        pins={0: "host"},
        activations=dict.fromkeys(equal.recomputable, "keep"),
    )
    limited = make_table([10 * MIB] * 8, device="cuda", pageable=5e8)
    yield place(limited, budgets(rest + 45 * MIB, page_lock=RING_BYTES + 20 * MIB), **NAMES)
    offloads = make_table([4 * MIB] * 8, device="cuda", pageable=5e8, offloadable=True, saved_bytes=6 * MIB, duplex=0.6)
    saved = {"layers.1": "offload", "layers.2": "offload", "layers.3": "offload"}
    yield place(offloads, budgets(40 * MIB, page_lock=RING_BYTES), activations=saved, pieces=False, **NAMES)
    shared = make_table(sizes, [(0,), (1,), (2,), (0,), (3,), (4,), (5,), (6,)])
    yield place(shared, budgets(rest + 26 * MIB), **NAMES)
    for accumulation, group in ((8, 4), (7, 3)):
        yield _grouped(accumulation, group)


def _grouped(accumulation, group):
    """A plan of groups of micro-batches, that wait for loads and recompute some layers."""
    table = make_table([10 * MIB] * 8, link=2e8, saved_bytes=2 * MIB)
    names = {**NAMES, "workload": replace(WORKLOAD, accumulation=accumulation)}
    return place(table, budgets(55 * MIB), groups=(group,), **names)


def _one_of(rng, rows, **changes):
    """Return rows with one of them changed; ``changes`` are functions of its field."""
    at = rng.randrange(len(rows))
    row = rows[at]
    return (*rows[:at], replace(row, **{k: f(getattr(row, k)) for k, f in changes.items()}), *rows[at + 1 :])


def _loads(plan):
    return [i for i, stay in enumerate(plan.residences) if stay.begins == "load"]


def _load_changed(rng, plan, **changes):
    at = rng.choice(_loads(plan))
    stays = list(plan.residences)
    stays[at] = replace(stays[at], **{k: f(getattr(stays[at], k)) for k, f in changes.items()})
    return replace(plan, residences=tuple(stays))


def _swapped(rng, plan):
    """Two addresses of one arena; those of equal size that are both there always may be swapped without harm."""
    pairs = [
        (a, b)
        for a in range(len(plan.addresses))
        for b in range(a)
        if plan.addresses[a].arena == plan.addresses[b].arena
        and plan.addresses[a].size_bytes != plan.addresses[b].size_bytes
    ] or [(0, 1)]
    a, b = rng.choice(pairs)
    rows = list(plan.addresses)
    rows[a], rows[b] = (
        replace(rows[a], offset_bytes=rows[b].offset_bytes),
        replace(rows[b], offset_bytes=rows[a].offset_bytes),
    )
    return replace(plan, addresses=tuple(rows))


def _orders_swapped(rng, plan):
    channel = plan.residences[_loads(plan)[0]].channel
    loads = [i for i in _loads(plan) if plan.residences[i].channel == channel]
    if len(loads) < 2:
        return plan
    a, b = rng.sample(loads, 2)
    stays = list(plan.residences)
    stays[a], stays[b] = replace(stays[a], order=stays[b].order), replace(stays[b], order=stays[a].order)
    return replace(plan, residences=tuple(stays))


def _dropped(rng, plan):
    gone = rng.choice(_loads(plan))
    kept = [stay for i, stay in enumerate(plan.residences) if i != gone]
    return replace(plan, residences=tuple(replace(stay, id=i) for i, stay in enumerate(kept)))


def _said(rng, plan):
    field = rng.choice(["pass_s", "step_s", "compute_s", "loaded_bytes_per_pass", "loads_per_pass"])
    return replace(plan, prediction=replace(plan.prediction, **{field: getattr(plan.prediction, field) * 2 + 1}))


def _absence_changed(rng, plan, change):
    """The plan with one stretch of a segment's absence changed; the same where nothing is ever absent."""
    device, *others = plan.arenas
    elastic = [number for number, segment in enumerate(device.segments) if segment.absent]
    if not elastic:
        return plan
    number = rng.choice(elastic)
    absent = list(device.segments[number].absent)
    at = rng.randrange(len(absent))
    absent[at : at + 1] = change(*absent[at])
    segments = list(device.segments)
    segments[number] = replace(segments[number], absent=tuple(absent))
    return replace(plan, arenas=(replace(device, segments=tuple(segments)), *others))


def _pages_changed(rng, plan):
    """The plan with one host arena page-locked that was not, or pageable that was not."""
    at = rng.choice([arena.id for arena in plan.arenas if arena.tier == "host"] or [0])
    arenas = list(plan.arenas)
    arenas[at] = replace(arenas[at], pageable=not arenas[at].pageable)
    return replace(plan, arenas=tuple(arenas))


def _regrouped(plan, group):
    return replace(plan, group=group, table=replace(plan.table, group=group))


MUTATIONS = {
    "a load later": lambda rng, plan: _load_changed(rng, plan, load_after=lambda at: at + rng.randint(1, 4)),
    "a load earlier": lambda rng, plan: _load_changed(rng, plan, load_after=lambda at: at - rng.randint(1, 4)),
    "used earlier": lambda rng, plan: _load_changed(rng, plan, first_use=lambda at: at - 1),
    "used later": lambda rng, plan: _load_changed(rng, plan, first_use=lambda at: at + 1),
    "kept shorter": lambda rng, plan: _load_changed(rng, plan, last_use=lambda at: at - 1),
    "kept longer": lambda rng, plan: _load_changed(rng, plan, last_use=lambda at: at + rng.randint(1, 4)),
    "a slot smaller": lambda rng, plan: replace(
        plan, addresses=_one_of(rng, plan.addresses, size_bytes=lambda size: size - 512)
    ),
    "an arena smaller": lambda rng, plan: replace(
        plan,
        arenas=tuple(
            replace(a, segments=tuple(replace(s, size_bytes=s.size_bytes - 512) for s in a.segments))
            for a in plan.arenas
        ),
    ),
    "an absence gone": lambda rng, plan: _absence_changed(rng, plan, lambda first, last: []),
    "an absence longer": lambda rng, plan: _absence_changed(
        rng, plan, lambda first, last: [(first - rng.randint(3, 5), last + rng.randint(3, 5))]
    ),
    "an absence moved": lambda rng, plan: _absence_changed(
        rng, plan, lambda first, last: [(first + shift, last + shift) for shift in [rng.choice([-4, 4])]]
    ),
    "two addresses swapped": _swapped,
    "two orders swapped": _orders_swapped,
    "a wait dropped": _dropped,
    "an other home": lambda rng, plan: replace(
        plan,
        items=_one_of(
            rng, plan.items, home=lambda home: rng.choice([t for t in ("device", "host", "disk") if t != home])
        ),
    ),
    "an other item": lambda rng, plan: _load_changed(
        rng, plan, item=lambda item: (item + rng.randint(1, len(plan.items) - 1)) % len(plan.items)
    ),
    "an other policy": lambda rng, plan: replace(
        plan,
        activations=_one_of(
            rng, plan.activations, activations=lambda policy: "recompute" if policy == "keep" else "keep"
        ),
    ),
    "less vram": lambda rng, plan: replace(
        plan, budgets=replace(plan.budgets, vram_bytes=plan.prediction.peaks.vram_bytes - 1)
    ),
    "an other figure": _said,
    "an other group": lambda rng, plan: _regrouped(plan, plan.group + rng.choice((-1, 1)) if plan.group > 1 else 2),
    "other pages": _pages_changed,
    "less may be page-locked": lambda rng, plan: (
        replace(plan, budgets=replace(plan.budgets, page_lock_bytes=max(page_locked_bytes(plan) - 1, 0)))
        if plan.table.device == "cuda" and page_locked_bytes(plan)
        else plan
    ),
}


def _meaning(plan):
    """What a plan says, but for what changes nothing: a load's earliest start that others hold up anyway."""
    return (
        plan.residences,
        plan.addresses,
        plan.items,
        plan.activations,
        plan.budgets,
        plan.prediction,
        plan.arenas,
        plan.group,
    )


@pytest.mark.parametrize("count", [1000])
def test_nearly_every_mutation_is_caught(count):
    rng = random.Random(7)
    plans = list(_plans())
    assert all(check(plan) == () for plan in plans)
    missed, made = {}, 0
    while made < count:
        name = rng.choice(list(MUTATIONS))
        plan = rng.choice(plans)
        other = MUTATIONS[name](rng, plan)
        if _meaning(other) == _meaning(plan):
            continue
        made += 1
        if not check(other):
            missed[name] = missed.get(name, 0) + 1
    assert sum(missed.values()) <= (1 - CAUGHT) * count, missed


@pytest.mark.parametrize(("accumulation", "group"), [(8, 4), (7, 3), (6, 6)])
def test_a_wrong_group_is_always_caught(accumulation, group):
    """Whatever says so: the plan alone, its rows alone, both; and rows of which the sum was taken already."""
    plan = _grouped(accumulation, group)
    assert check(plan) == ()
    for other in (1, 2, 3, 4, 5, 6, 7, 8):
        if other == group:
            continue
        assert check(_regrouped(plan, other))
        assert any("by the rows" in fault for fault in check(replace(plan, group=other)))
        assert any("by the rows" in fault for fault in check(replace(plan, table=replace(plan.table, group=other))))
    ungrouped = place(plan.table, plan.budgets, groups=(1,), **{**NAMES, "workload": plan.workload})
    assert check(ungrouped) == ()
    assert check(_regrouped(ungrouped, group))


def test_what_no_group_can_do_is_caught():
    """A block that leaves within the visit at the turn-around, bytes given back for part of it, offloads."""
    plan = _grouped(8, 4)
    first, last = plan.table.turn_around
    block = plan.table.accesses[first].blocks[0]
    streamed = [
        stay
        for stay in plan.residences
        if stay.begins == "load" and plan.items[stay.item].block == block and stay.first_use <= first <= stay.last_use
    ]
    assert streamed or plan.home_of(block) == "device"
    for stay in streamed:
        stays = list(plan.residences)
        stays[stay.id] = replace(stay, last_use=first)
        assert any("before the next one" in fault for fault in check(replace(plan, residences=tuple(stays))))
    device, *others = plan.arenas
    more = Segment(offset_bytes=device.size_bytes, size_bytes=0, absent=((first, first),))
    arenas = (replace(device, segments=(*device.segments, more)), *others)
    assert any("for part of a visit" in fault for fault in check(replace(plan, arenas=arenas)))
    arenas = (replace(device, segments=(*device.segments, replace(more, absent=((first, last),)))), *others)
    assert check(replace(plan, arenas=arenas)) == ()
    rows = list(plan.table.accesses)
    rows[last] = replace(rows[last], forward=0)
    assert any(
        "not of one module" in fault for fault in check(replace(plan, table=replace(plan.table, accesses=tuple(rows))))
    )
    many = replace(plan, workload=replace(plan.workload, accumulation=3))
    assert any("a group has 4 micro-batches, a step 3" in fault for fault in check(many))
