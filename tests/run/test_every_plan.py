"""Whatever the solver makes, ``attach`` accepts, and training under it is bit-identical to the whole run.

Plans for a GPU run on the CPU here: the same arenas, addresses, loads and stores in the same order, through the CPU's
transfers. Rings, staging and pieces are of a few KiB: else nothing of small models would be pinned in part, or be
split.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.cost.build import cost_table
from memplan.errors import DoesNotFitError
from memplan.place.alternatives import state_away
from memplan.place.baselines import WAYS
from memplan.place.layout import split as pieces
from memplan.place.layout.split import split
from memplan.place.solve import place, place_as
from memplan.program import page_lock
from memplan.program.check import page_locks as check_page_locks
from memplan.program.check.judge import require
from memplan.program.schema import Budgets, Workload
from memplan.run.attach import attach_on
from memplan.run.transfer import streams
from memplan.units import GIB
from tests.support.graphs import graph_of
from tests.support.training import CPU, KINDS, assert_equal, batch_of, loss_of, make, train, whole_run

STEPS = 2
MACHINES = {"cpu": CPU, "cuda": replace(CPU, device="cuda", name="a GPU")}
RING_BYTES = 4096
CHOICES = ("choose", "keep", "recompute", "offload", "any")


@pytest.fixture(autouse=True, scope="module")
def small_sizes():
    with pytest.MonkeyPatch.context() as patch:
        for module in (page_lock, check_page_locks, streams):
            patch.setattr(module, "RING_BYTES", RING_BYTES)
        patch.setattr(pieces, "LEAST_BYTES", RING_BYTES)
        patch.setattr(pieces, "LATENCIES", 0)
        yield


@cache
def table_of(kind, checkpointing, accumulation, device, activations):
    """The cost rows and what is asked of the layers, as ``memplan.plan`` makes them."""
    model = make(kind, checkpointing=checkpointing)
    graph = graph_of(model, batch_of(kind), loss_of, accumulation=accumulation, offload="try")
    table = cost_table(graph, MACHINES[device])
    if activations in ("choose", "keep", "recompute"):
        table = replace(table, accesses=tuple(replace(row, offload_bytes=0) for row in table.accesses))
    asked = {} if activations in ("choose", "any") else dict.fromkeys(graph.recomputable, activations)
    can = {row.module for row in table.accesses if row.offload_bytes}
    return graph, table, {name: policy for name, policy in asked.items() if policy != "offload" or name in can}


@st.composite
def plans(draw, models):
    """A plan, and how the model that it is for is made; for budgets that do not fit one with the least vram that does.

    ``models``: kind, checkpointing and accumulation to draw from.
    """
    kind, checkpointing, accumulation = draw(st.sampled_from(models))
    device = draw(st.sampled_from(["cpu", "cuda", "cuda"]))
    graph, table, asked = table_of(kind, checkpointing, accumulation, device, draw(st.sampled_from(CHOICES)))
    weights = sum(block.size_bytes for block in table.blocks)
    home = draw(st.sampled_from([None, "device", "host"]))
    limits = st.integers(0, weights).map(lambda size: size + RING_BYTES)
    limit = draw(st.one_of(st.none(), limits, limits, limits))
    if home == "host":
        table = state_away(table, limit)
    staging = (1 + (device == "cuda")) * RING_BYTES
    rest = max(table.device_bytes_at(access.index, asked) for access in table.accesses)
    budgets = Budgets(
        vram_bytes=draw(
            st.just(1) | st.integers(rest // 4, rest + weights // 2)
        ),  # of 1 byte becomes the least that works
        ram_bytes=draw(st.sampled_from([GIB, GIB, staging + weights // 4, staging + weights // 8, 0])),
        disk_bytes=draw(st.sampled_from([0, GIB, GIB])),
        page_lock_bytes=limit,
    )
    if draw(st.booleans()):
        table, _ = split(table, {})
    blocks = [block.id for block in table.blocks]
    options = {
        "pins": draw(st.dictionaries(st.sampled_from(blocks), st.sampled_from(["device", "host", "disk"]), max_size=2)),
        "elastic": draw(st.sampled_from([None, True, False])),
        "optimizer_state": home,
        "pieces": draw(st.booleans()),
        "activations": asked,
        "staging_bytes": staging,
        "workload": Workload(batch={}, tokens=graph.tokens, accumulation=accumulation, optimizer="adamw", adapter=""),
        "model": graph.model,
        "fingerprint": graph.fingerprint,
        "hardware": MACHINES[device].name,
    }
    if budgets.disk_bytes == 0 or budgets.ram_bytes == 0:
        options["pins"] = {block: tier for block, tier in options["pins"].items() if tier == "device"}
    way = draw(st.sampled_from([None, None, None, *WAYS]))
    try:
        plan = place(table, budgets, **options)
    except DoesNotFitError as error:
        if error.least_vram_bytes is None:
            return kind, checkpointing, accumulation, None
        plan = place(table, replace(budgets, vram_bytes=error.least_vram_bytes), **options)
    if way is not None:
        more = {
            name: value
            for name, value in options.items()
            if name not in ("pins", "elastic", "optimizer_state", "pieces")
        }
        plan = place_as(way, table, plan.budgets, **more) or plan
    return kind, checkpointing, accumulation, plan


def trains_bit_identically(kind, checkpointing, accumulation, plan, *others):
    """``others``: plans that are taken over before it trains, one after another."""
    require(plan)
    model = make(kind, checkpointing=checkpointing)
    with (
        TemporaryDirectory() as cache_folder,
        attach_on(model, plan, torch.device("cpu"), cache=Path(cache_folder)) as handle,
    ):
        for other in others:
            handle.change(other)
        planned = train(model, kind, steps=STEPS, accumulation=accumulation)
        assert handle.record.misses == 0
    whole = whole_run(kind, checkpointing=checkpointing, steps=STEPS, accumulation=accumulation)
    assert_equal(whole, planned)


FEW = [("llama", "off", 1), ("plain", "inside-other", 2)]
MANY = [(kind, how, count) for kind in KINDS for how in ("off", "inside-other", "around-reentrant") for count in (1, 2)]
EXAMPLES = {"deadline": None, "suppress_health_check": list(HealthCheck), "derandomize": True}


@settings(max_examples=8, **EXAMPLES)
@given(plans(FEW))
def test_attach_takes_every_plan(drawn):
    *how, plan = drawn
    if plan is not None:
        trains_bit_identically(*how, plan)


@pytest.mark.full
@settings(max_examples=100, **EXAMPLES)
@given(plans(MANY))
def test_attach_takes_many_plans(drawn):
    *how, plan = drawn
    if plan is not None:
        trains_bit_identically(*how, plan)


@pytest.mark.parametrize("activations", ["keep", "offload"])
def test_pinned_and_pageable_ram_at_once(activations):
    """What a limit of page-locking leads to: two arenas on the host."""
    graph, table, asked = table_of("llama", "off", 1, "cuda", activations)
    names = {"model": graph.model, "fingerprint": graph.fingerprint, "hardware": MACHINES["cuda"].name}
    work = Workload(batch={}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="")
    layers = [block for block in table.blocks if block.kind == "layer"]
    offloaded = sum(life.size_bytes for life in table.lifetimes if life.policy == "offload")
    lock = RING_BYTES + layers[0].size_bytes + (offloaded if activations == "offload" else 0)
    budgets = Budgets(vram_bytes=GIB, ram_bytes=GIB, disk_bytes=0, page_lock_bytes=lock)
    pins = {block.id: "host" for block in layers}
    plan = place(table, budgets, activations=asked, workload=work, pins=pins, **names)
    assert [arena.pageable for arena in plan.arenas if arena.tier == "host"] == [False, True]
    if activations == "offload":
        tiers = {plan.arenas[a.arena].tier for a in plan.addresses if plan.items[a.item].kind == "saved"}
        assert tiers == {"device", "host"}
    trains_bit_identically("llama", "off", 1, plan)
    # As where memory runs out: what lies on the host stays where it can, and what the other plan has there comes.
    other = place(table, replace(budgets, page_lock_bytes=0), activations=asked, workload=work, **names)
    trains_bit_identically("llama", "off", 1, plan, other, plan)
