"""Every way to break a plan is seen by the judge, which shares no code with the solver."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from memplan.errors import PlanCheckError
from memplan.place.solve import place
from memplan.program.check.judge import check, require
from memplan.program.schema import RING_BYTES, STAGING_BYTES
from tests.support.tables import MIB, NAMES, budgets, make_table

X = 10 * MIB


@pytest.fixture(scope="module")
def plan():
    table = make_table([X] * 10, recomputable=False)
    rest = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    made = place(table, budgets(rest + 4 * X, ram=4 * X + STAGING_BYTES), elastic=False, **NAMES)
    assert check(made) == ()
    return made


def moved(values, index, **changes):
    return tuple(replace(value, **changes) if i == index else value for i, value in enumerate(values))


def streamed(plan):
    return [stay for stay in plan.residences if stay.begins == "load"]


def expect(broken, message):
    faults = check(broken)
    assert any(message in fault for fault in faults), faults
    with pytest.raises(PlanCheckError) as caught:
        require(broken)
    assert caught.value.faults == faults


def test_two_blocks_on_the_same_bytes(plan):
    resident = next(i for i, a in enumerate(plan.addresses) if plan.items[a.item].home == "device")
    other = next(i for i, a in enumerate(plan.addresses) if plan.items[a.item].home != "device" and a.arena == 0)
    place_of_resident = plan.addresses[resident].offset_bytes
    expect(
        replace(plan, addresses=moved(plan.addresses, other, offset_bytes=place_of_resident)),
        "take the same bytes at the same time",
    )


def test_a_load_that_starts_too_early(plan):
    stay = next(s for s in streamed(plan) if s.first_use - s.load_after > 1 and s.last_use < len(plan.table.accesses))
    broken = moved(plan.residences, stay.id, load_after=stay.load_after - 1)
    expect(replace(plan, residences=broken), "take the same bytes at the same time")


def test_a_residence_that_is_missing(plan):
    stay = streamed(plan)[-1]
    left = tuple(s for s in plan.residences if s.id != stay.id)
    left = tuple(replace(s, id=i) for i, s in enumerate(left))
    expect(replace(plan, residences=left), "which no residence has on the device then")


def test_a_residence_that_ends_too_soon(plan):
    stay = next(s for s in streamed(plan) if s.last_use > s.first_use)
    expect(
        replace(plan, residences=moved(plan.residences, stay.id, last_use=stay.first_use)),
        "which no residence has on the device then",
    )


def test_orders_that_cannot_run(plan):
    loads = [s for s in streamed(plan) if s.channel == "disk"]
    one, two = loads[0], loads[-1]
    residences = moved(moved(plan.residences, one.id, order=two.order), two.id, order=one.order)
    expect(replace(plan, residences=residences), "deadlock")
    residences = moved(plan.residences, one.id, order=two.order)
    expect(replace(plan, residences=residences), "the orders on the channel disk")


@pytest.mark.parametrize(
    ("tier", "message"), [("vram_bytes", "of vram are needed"), ("ram_bytes", "of ram are needed")]
)
def test_budgets(plan, tier, message):
    less = getattr(plan.prediction.peaks, tier) - 1
    expect(replace(plan, budgets=replace(plan.budgets, **{tier: less})), message)


def test_disk_budget(plan):
    expect(replace(plan, budgets=replace(plan.budgets, disk_bytes=X)), "of disk are needed")


def test_a_prediction_that_is_not_what_the_rows_say(plan):
    peaks = replace(plan.prediction.peaks, vram_bytes=plan.prediction.peaks.vram_bytes - 1)
    expect(replace(plan, prediction=replace(plan.prediction, peaks=peaks)), "the rows say")
    parts = {**plan.prediction.vram_parts, "slots": 0}
    expect(replace(plan, prediction=replace(plan.prediction, vram_parts=parts)), "do not sum")


def test_homes(plan):
    on_host = next(item.id for item in plan.items if item.home == "host")
    expect(replace(plan, items=moved(plan.items, on_host, home="device")), "is not always there")
    expect(replace(plan, items=moved(plan.items, on_host, home="disk")), "but its home is disk")
    blocks = moved(plan.table.blocks, on_host, pinned_because="its weight is read by name")
    expect(
        replace(plan, table=replace(plan.table, blocks=blocks)), "must stay on the device (its weight is read by name)"
    )
    expect(replace(plan, staging_bytes=0), "no staging bytes")


@pytest.fixture(scope="module")
def pageable_plan():
    table = make_table([X] * 10, recomputable=False, device="cuda", pageable=4e8)
    rest = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    return place(table, budgets(rest + 4 * X, page_lock=RING_BYTES + 3 * X), **NAMES)


def test_page_locks(pageable_plan):
    """Two host arenas: what is page-locked, and what is not."""
    plan = pageable_plan
    assert check(plan) == ()
    assert [(arena.tier, arena.pageable) for arena in plan.arenas] == [
        ("device", False),
        ("host", False),
        ("host", True),
    ]
    limit = plan.budgets.page_lock_bytes
    locked = replace(plan, arenas=moved(plan.arenas, 2, pageable=False))
    expect(locked, "of ram are to be pinned, the budget is 46.0 MiB")
    expect(replace(plan, budgets=replace(plan.budgets, page_lock_bytes=limit - 1)), "of ram are to be pinned")
    expect(replace(plan, arenas=moved(plan.arenas, 1, pageable=True)), "a micro-batch of")
    expect(replace(plan, arenas=moved(plan.arenas, 0, pageable=True)), "only RAM beside a GPU is")
    expect(replace(plan, staging_bytes=RING_BYTES - 1), "passes through 16.0 MiB of staging")
    said = replace(
        plan.prediction, peaks=replace(plan.prediction.peaks, ram_bytes=plan.prediction.peaks.ram_bytes - RING_BYTES)
    )
    expect(replace(plan, prediction=said), "the prediction says a ram peak")
    expect(replace(plan, table=replace(plan.table, pageable_bytes_per_s=None)), "no rate at which it is read")
    expect(replace(plan, table=replace(plan.table, pageable_bytes_per_s=8e8)), "a micro-batch of")
    expect(replace(plan, table=replace(plan.table, pageable_bytes_per_s=0.0)), "the rate of pageable RAM is")
    expect(replace(plan, table=replace(plan.table, device="cpu")), "only RAM beside a GPU is")
    slow = next(address for address in plan.addresses if address.arena == 2)
    twice = (*plan.addresses, replace(slow, arena=1))
    expect(replace(plan, addresses=twice), f"item {slow.item} is both in pinned and in pageable RAM")


def test_a_block_that_is_pinned_by_hand_onto_the_device(plan):
    """Hand-edited plans are welcome if they pass."""
    other = place(plan.table, plan.budgets, **NAMES, pins={5: "device"})
    assert check(other) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"offset_bytes": 100}, "no multiple of 512"),
        ({"offset_bytes": 1 << 40}, "reaches beyond arena"),
        ({"size_bytes": 512}, "the item"),
        ({"arena": 7}, "not both there"),
        ({"item": 99}, "not both there"),
    ],
)
def test_addresses(plan, change, message):
    expect(replace(plan, addresses=moved(plan.addresses, 0, **change)), message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": "staging"}, "comes from"),
        ({"channel": None}, "no channel"),
        ({"first_use": 99}, "outside of the micro-batch"),
        ({"last_use": 90}, "longer than a micro-batch"),
        ({"source": "residence:999"}, "not there"),
        ({"source": "residence:²"}, "not there"),
        ({"source": "residence:0"}, "comes from"),
        ({"id": 3}, "has id 3"),
        ({"begins": "made"}, "only ever read"),
        ({"ends": "store"}, "only ever read"),
    ],
)
def test_residences(plan, change, message):
    stay = streamed(plan)[0]
    expect(replace(plan, residences=moved(plan.residences, stay.id, **change)), message)


def test_a_copy_on_the_host_may_be_the_source(plan):
    """Of the same item, and there as long as the load may run; anything else brings another block's bytes."""
    stay = next(stay for stay in streamed(plan) if stay.channel == "h2d")
    copies = [s for s in plan.residences if s.begins == "always" and plan.arenas[s.arena].tier == "host"]
    own = next(copy for copy in copies if copy.item == stay.item)
    other = next(copy for copy in copies if copy.item != stay.item)
    named = moved(plan.residences, stay.id, source=f"residence:{own.id}")
    assert check(replace(plan, residences=named)) == ()
    expect(replace(plan, residences=moved(plan.residences, stay.id, source=f"residence:{other.id}")), "comes from")


def test_numbers_with_which_nothing_could_run(plan):
    expect(replace(plan, table=replace(plan.table, host_to_device_bytes_per_s=0.0)), "nothing could ever be loaded")
    expect(replace(plan, workload=replace(plan.workload, accumulation=0)), "a step has 0 micro-batches")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vram_peak_at": 999}, "which is not there"),
        ({"vram_peak_at": 0}, "bytes are needed, not"),
        ({"loads_per_pass": 0}, "the residences are"),
        ({"loaded_bytes_per_pass": 1}, "the residences are"),
    ],
)
def test_a_prediction_of_another_plan(plan, change, message):
    expect(replace(plan, prediction=replace(plan.prediction, **change)), message)


def test_every_shift_of_a_load_is_seen_or_harmless(plan):
    """Each stay is moved one access each way: whatever the judge lets pass still covers and never overlaps."""
    length = len(plan.table.accesses)
    for stay in streamed(plan):
        for change in ({"load_after": stay.load_after - 1}, {"last_use": stay.last_use + 1}):
            broken = replace(plan, residences=moved(plan.residences, stay.id, **change))
            slots = {}
            for other in streamed(broken):
                address = next(a for a in plan.addresses if a.item == other.item and a.arena == 0)
                for when in range(other.load_after + 1, other.last_use + 1):
                    slots.setdefault((address.offset_bytes, when % length), []).append(other.id)
            clash = any(len(found) > 1 for found in slots.values())  # equal blocks: same bytes means same offset
            assert bool(check(broken)) == clash


def test_a_store_over_no_channel_is_a_fault_and_no_traceback():
    table = make_table([MIB] * 6, offloadable=True, device="cuda")
    plan = place(table, budgets(300 * MIB), **NAMES, activations=dict.fromkeys(table.recomputable, "offload"))
    stays = tuple(replace(stay, channel=None) if stay.channel == "d2h" else stay for stay in plan.residences)
    assert any("over no channel" in fault for fault in check(replace(plan, residences=stays)))
