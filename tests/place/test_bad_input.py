"""What no plan can be made from is refused with an error of memplan's own, whoever asks for the plan."""

from __future__ import annotations

import math

import pytest
from msgspec.structs import replace

from memplan.analyze.graph import Rows
from memplan.errors import DoesNotFitError, InputError, SizeError
from memplan.place.baselines import WAYS
from memplan.place.min_vram import least_vram_bytes
from memplan.place.solve import place, place_as
from memplan.program.check.judge import check
from memplan.program.schema import STAGING_BYTES
from tests.support.tables import MIB, NAMES, budgets, make_table

NAN, INF = math.nan, math.inf
TABLE = make_table([4 * MIB] * 4)
PEAK = max(TABLE.device_bytes_at(access.index, {}) for access in TABLE.accesses)
ENOUGH = budgets(PEAK + 12 * MIB)
LAST = len(TABLE.accesses) - 1


def with_access(number, /, **changes):
    return with_rows({number: changes})


def with_rows(changes):
    return replace(
        TABLE, accesses=tuple(replace(row, **changes.get(number, {})) for number, row in enumerate(TABLE.accesses))
    )


def with_life(**changes):
    return replace(TABLE, lifetimes=(replace(TABLE.lifetimes[0], **changes), *TABLE.lifetimes[1:]))


def refused(error, message, table=TABLE, given=ENOUGH, **more):
    """Each way to ask says the same."""
    ways = [lambda: place(table, given, **NAMES, **more), lambda: least_vram_bytes(table, given, **more)]
    if "pins" not in more:
        ways += [lambda way=way: place_as(way, table, given, **NAMES, **more) for way in WAYS]
    for ask in ways:
        with pytest.raises(error, match=message):
            ask()


@pytest.mark.each_value
@pytest.mark.parametrize("tier", ["vram", "ram", "disk", "staging"])
@pytest.mark.parametrize("size", [-1, NAN, INF, 1.5, "6GiB", "12 apples", True, []], ids=repr)
def test_a_budget_that_is_no_count_of_bytes(tier, size):
    if tier == "staging":
        refused(SizeError, "staging was given as", staging_bytes=size)
    else:
        refused(SizeError, f"{tier} was given as", given=replace(ENOUGH, **{f"{tier}_bytes": size}))


@pytest.mark.each_value
@pytest.mark.parametrize("rate", [0.0, -1.0, NAN, INF, -INF])
@pytest.mark.parametrize("what", ["host_to_device", "device_to_host", "disk"])
def test_a_rate_that_is_none(what, rate):
    refused(InputError, f"the rate of {what.replace('_', ' ')} is", replace(TABLE, **{f"{what}_bytes_per_s": rate}))


@pytest.mark.each_value
@pytest.mark.parametrize("time_s", [-1e-9, NAN, INF])
@pytest.mark.parametrize("of", ["time_s", "recompute_s", "offload_s", "latency"])
def test_a_time_that_is_none(of, time_s):
    if of == "latency":
        refused(InputError, "the latency of a load is", replace(TABLE, load_latency_s=time_s))
    else:
        refused(InputError, "access 2 takes", with_access(2, **{of: time_s}))


@pytest.mark.parametrize(
    ("table", "message"),
    [
        (replace(TABLE, accesses=()), "no accesses"),
        (with_access(1, blocks=(4,)), "access 1 reads block 4, which is not there"),
        (with_access(1, blocks=(-1,)), "access 1 reads block -1"),
        (with_access(1, rows=(Rows(block=3, size_bytes=8),)), "access 1 reads rows of a block that it does not read"),
        (with_access(1, rows=(Rows(block=1, size_bytes=-8),)), "the rows of access 1 are -8"),
        (with_access(3, index=4), r"accesses\[3\] has id 4"),
        (replace(TABLE, accesses=TABLE.accesses[::-1]), r"accesses\[0\] has id"),
        (replace(TABLE, blocks=TABLE.blocks[::-1]), r"blocks\[0\] has id 3"),
        (replace(TABLE, blocks=TABLE.blocks[:3]), "reads block 3, which is not there"),
        (with_access(5, forward=99), "access 5, a backward, belongs to access 99"),
        (with_access(5, forward=-1), "access 5, a backward, belongs to access -1"),
        (with_access(5, forward=5), "access 5, a backward, belongs to access 5"),
        (with_access(5, forward=6), "access 5, a backward, belongs to access 6"),
        (with_access(0, forward=1), "access 0, a forward, belongs to access 1"),
        (
            with_rows({0: {"kind": "backward", "forward": 8}, 8: {"kind": "forward", "forward": 8}}),
            "access 0, a backward, belongs to access 8",
        ),
        (replace(TABLE, recomputable=(*TABLE.recomputable, "lost")), "lost is to be recomputable, but does not run"),
        (with_life(born=3, last=2), "a lifetime runs from access 3 to 2"),
        (with_life(born=-1), "a lifetime runs from access -1"),
        (with_life(last=LAST + 1), "a lifetime runs from access 0 to"),
        (with_life(size_bytes=-1), "what lives from access 0 are -1"),
        (replace(TABLE, fixed=(replace(TABLE.fixed[0], size_bytes=-1),)), "the adapters are -1"),
        (replace(TABLE, blocks=(replace(TABLE.blocks[0], size_bytes=-1), *TABLE.blocks[1:])), r"layers\.0 are -1"),
        (replace(TABLE, blocks=(replace(TABLE.blocks[0], size_bytes=NAN), *TABLE.blocks[1:])), r"layers\.0 are nan"),
        (with_access(1, offload_bytes=-1), "what access 1 offloads are -1"),
        (with_access(1, transient_bytes=NAN), "the transient bytes of access 1"),
        (replace(TABLE, device="tpu"), "its device is 'tpu'"),
    ],
)
def test_a_table_that_is_not_of_a_pass(table, message):
    refused(InputError, message, table)


@pytest.mark.parametrize(
    ("pins", "given"),
    [
        (dict.fromkeys(range(4), "device"), budgets(PEAK + 12 * MIB)),  # more pinned to the device than vram holds
        (dict.fromkeys(range(4), "host"), budgets(PEAK + 12 * MIB, ram=12 * MIB)),  # and to the host than ram does
        ({0: "disk"}, budgets(1 << 40, disk=0)),
        ({0: "disk"}, budgets(1 << 40, ram=STAGING_BYTES - 1)),
        ({0: "host", 1: "device"}, budgets(1 << 40, ram=0)),
        ({}, budgets(0)),
        ({}, budgets(0, ram=0, disk=0)),
        ({}, budgets(PEAK, ram=0, disk=0)),
        ({}, budgets(PEAK + 12 * MIB, ram=2 * MIB, disk=2 * MIB)),  # every block is larger than every tier
    ],
)
def test_budgets_and_pins_that_leave_no_plan(pins, given):
    table = replace(TABLE, recomputable=())  # else recomputing makes room
    with pytest.raises(DoesNotFitError) as caught:
        place(table, given, **NAMES, pins=pins)
    assert caught.value.suggestions
    least = caught.value.least_vram_bytes
    if least is not None:
        assert check(place(table, replace(given, vram_bytes=least), **NAMES, pins=pins)) == ()


@pytest.mark.parametrize("block", [-1, 4, 10**9])
def test_a_pin_of_no_block(block):
    refused(InputError, f"block {block} was pinned", pins={block: "host"})


@pytest.mark.parametrize("policy", ["keep", "recompute", "offload"])
def test_activations_of_no_module(policy):
    refused(InputError, "memplan cannot set them", activations={"layers.9": policy})


def test_nothing_but_an_optimizer_is_a_plan_of_no_loads():
    """A pass may read nothing at all: that is odd and not wrong."""
    table = replace(TABLE, accesses=(replace(TABLE.accesses[-1], index=0),), lifetimes=(), recomputable=())
    plan = place(table, budgets(1 << 40), **NAMES)
    assert check(plan) == ()
    assert plan.prediction.loads_per_pass == 0
