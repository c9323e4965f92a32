"""A device apart from the host: streams, events, pinned homes.

On the simulated device under each of its orders, and on CUDA: left out where there is none, unproven until one ran it.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from contextlib import contextmanager
from functools import cache, partial

import pytest
import torch
from msgspec.structs import replace

import memplan
from memplan.case import case_of_plan
from memplan.errors import DoesNotFitError, StrayReadError
from memplan.program.page_lock import pageable_items
from memplan.program.schema import RING_BYTES
from memplan.run.attach import attach, attach_on
from memplan.run.memory import arena, page_lock
from memplan.run.transfer import device
from tests.run import test_optimizer_state, test_parity, test_rows
from tests.run.test_parity import plan_for
from tests.run.test_staging import with_small_rings
from tests.support import devices, inside
from tests.support.devices import planned, whole_of
from tests.support.training import CPU, assert_equal, batch_of, make

CHECKPOINTING = ("off", "inside-other", "inside-reentrant", "around-other", "around-reentrant")
CHECKED = pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
OFFLOAD = pytest.mark.parametrize("offload", [(), "all"], ids=["kept", "offloaded"])


def quick(*cases):
    """The cases of a test that the quick suite has, under each order of the simulated device."""
    orders = [order.replace(" ", "-") for order in devices.ORDERS]
    return pytest.mark.quick(*(f"{order}-{case}" if case else order for order in orders for case in cases))


@pytest.fixture(params=devices.NAMES)
def apart(request):
    with devices.on(request.param) as found:
        yield found


@quick("llama-off-0.0-plain", "llama-off-0.4-checked")
@CHECKED
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "plain"])
def test_three_steps(kind, checkpointing, share, checked, apart, tmp_path):
    planned(apart, kind, tmp_path, share=share, checked=checked, checkpointing=checkpointing)


@quick("all")
@pytest.mark.parametrize("offload", [("model.layers.1", "model.layers.3"), "all"], ids=["some", "all"])
def test_offloaded_activations(offload, apart, tmp_path):
    handle = planned(apart, "llama", tmp_path, share=0.2, offload=offload, checked=True)
    assert handle.record.offloaded_bytes > 0


@quick("llama-plain")
@CHECKED
@pytest.mark.parametrize("kind", ["llama", "gpt2", "plain"])
def test_segments_that_come_and_go(kind, checked, apart, tmp_path, monkeypatch):
    """A plan for the CPU has them where these small models' plans for a GPU have none."""
    monkeypatch.setattr(test_parity, "CPU", CPU)
    share = {"llama": 0.4, "gpt2": 0.3, "plain": 0.6}[kind]
    attach_there = partial(attach_on, device=apart.device)
    handle = planned(apart, kind, tmp_path, share=share, checked=checked, attach=attach_there)
    assert any(segment.absent for segment in handle.plan.arenas[0].segments)


def test_the_optimizers_state_waits_on_the_host(apart):
    model, pinned = make("llama"), []
    plan = test_optimizer_state.plan_for(model)

    @contextmanager
    def looked_at(optimizer):
        yield
        pinned.extend(room.is_pinned() for room in inside.optimizer_rooms(handle))

    with attach(model, plan) as handle:
        run = apart.train(model, "llama", around_step=looked_at)
    assert pinned == [True] * 3
    assert_equal(whole_of(apart, "llama"), run)


@pytest.mark.parametrize("where", ["mapped", "pageable", pytest.param("no address", marks=pytest.mark.full)])
def test_rows_that_are_read_on_the_host(where, apart, monkeypatch):
    """By the device where they lie only if it names an address for them; else they are looked up by the CPU."""
    if where == "pageable":
        monkeypatch.setattr(arena, "page_locked", refused)
    elif where == "no address":
        monkeypatch.setattr(device, "_address_on", lambda device, part: None)
    model = test_rows.make("untied", dropout=0.0)
    plan = test_rows.plan_of("untied", share=0.0, table_at="host")
    with attach(model, plan) as handle:
        run = apart.train(model, "untied", batches=lambda *args, **more: apart.there(test_rows.batch_of(*args, **more)))
        table = model.get_input_embeddings().weight
        assert table.device.type == (apart.kind if where == "mapped" else "cpu")
    assert handle.record.misses == 0
    assert_equal(whole_rows(apart), run)


@cache
def whole_rows(apart):
    return apart.whole(test_rows.make("untied", dropout=0.0), "untied", batches=test_rows.batch_of)


def test_detach_gives_the_model_back_to_where_it_was(apart, tmp_path):
    model = make("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attach(model, plan_for(model, "llama"), cache=tmp_path):
        assert {p.device.type for p in model.parameters()} == {apart.kind}
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, before[name])


def test_a_model_that_is_dropped_leaves_nothing(apart, tmp_path):
    gc.collect()
    before = apart.module.memory_allocated()
    model = make("llama")
    attach(model, plan_for(model, "llama"), cache=tmp_path)
    model(**apart.batches("llama", 0)).loss.backward()
    assert apart.module.memory_allocated() > before + 2**18
    del model
    deadline = time.monotonic() + 10
    while apart.module.memory_allocated() > before + 2**10:  # a thread may be on its way out of its last job
        assert time.monotonic() < deadline
        gc.collect()


@pytest.mark.parametrize("share", [0.0, 0.4])
def test_peak_is_what_was_predicted(share, apart, tmp_path):
    """Of what is asked for: a device's allocator makes multiples of 512 bytes of it."""

    def trained(model, steps):
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
        for seed in range(steps):
            model(**apart.batches("llama", seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    trained(make("llama").to(apart.device), 1)
    gc.collect()
    workspaces = apart.module.memory_allocated()  # cuBLAS's, which the profile of a real card counts as context
    model = make("llama")
    with apart.attention():
        plan = plan_for(model, "llama", share=share)
    with attach(model, plan, cache=tmp_path) as handle:
        trained(model, 1)
        apart.module.reset_peak_memory_stats()
        trained(model, 2)
        peak = torch.accelerator.memory_stats()["requested_bytes.all.peak"]
        assert handle.record.vram_peak_bytes <= 1.15 * peak
    predicted = plan.prediction.peaks.vram_bytes
    assert peak <= predicted + workspaces
    assert apart.kind == "cuda" or peak >= 0.99 * predicted


def test_a_stray_read_raises(apart, tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama"), checked=True, cache=tmp_path) as handle:
        loss = model(**apart.batches("llama", 0)).loss
        inside.quiesce(handle)
        inside.conductor(handle).backward_begins = lambda module, call: None
        with pytest.raises(StrayReadError):
            loss.backward()


def refused(*args):
    raise RuntimeError("out of memory")


@quick("kept-plain")
@CHECKED
@OFFLOAD
def test_where_pinning_is_refused(checked, offload, apart, tmp_path, monkeypatch, caplog):
    """Even the rings': results are the same, and the rings are counted."""
    model = make("llama")
    plan = plan_for(model, "llama", share=0.2, offload=offload)
    monkeypatch.setattr(arena, "page_locked", refused)
    with attach(model, plan, checked=checked, cache=tmp_path) as handle:
        assert_equal(whole_of(apart, "llama"), apart.train(model, "llama"))
        assert handle.record.loads > 0
        # One for the disk, one for what is pageable.
        assert handle.record.ram_peak_bytes == inside.tiers(handle).host_bytes + 2 * RING_BYTES
        assert not any(held.is_pinned() for held in inside.on_host(handle))
    assert "cannot pin 16.0 MiB of RAM (out of memory): pageable memory is used" in caplog.text


@quick("kept")
@OFFLOAD
def test_a_ring_between_pageable_memory_and_the_device(offload, apart, tmp_path, monkeypatch):
    """The arena is refused, the ring is not: as where a limit lies between the two."""
    lock = page_lock.page_locked
    monkeypatch.setattr(arena, "page_locked", lambda size: lock(size) if size == RING_BYTES else refused())
    model = make("llama")
    plan = plan_for(model, "llama", share=0.2, offload=offload)
    with attach(model, plan, checked=True, cache=tmp_path) as handle:
        assert not any(held.bytes.is_pinned() for held in inside.host_arenas(handle).values())
        assert_equal(whole_of(apart, "llama"), apart.train(model, "llama"))


@quick("kept-0.5")
@pytest.mark.parametrize("share", [0.0, 0.5])
@OFFLOAD
def test_what_the_plan_has_pageable_is_pageable(offload, share, apart, tmp_path, monkeypatch):
    """Beside what is pinned, on the same channel: results are the same, and no more is pinned than was said."""
    with_small_rings(monkeypatch)
    model = make("llama")
    kept = plan_for(model, "llama", share=0.2, offload=offload)
    table = replace(kept.table, pageable_bytes_per_s=kept.table.host_to_device_bytes_per_s / 2)
    limit = int(share * sum(arena.size_bytes for arena in kept.arenas[1:]))
    case = case_of_plan(replace(kept, table=table, budgets=replace(kept.budgets, page_lock_bytes=limit)))
    plan = dataclasses.replace(case, activations=kept.policies()).place(pieces=False)
    assert pageable_items(plan)
    with attach(model, plan, checked=True, cache=tmp_path) as handle:
        for one in plan.arenas[1:]:
            assert inside.host_arenas(handle)[one.id].bytes.is_pinned() != one.pageable
        assert_equal(whole_of(apart, "llama"), apart.train(model, "llama"))


def test_page_locked_memory_has_its_exact_size_and_is_let_go(apart, monkeypatch):
    let_go, unregister = [], page_lock._unregister
    monkeypatch.setattr(page_lock, "_unregister", lambda *given: (unregister(*given), let_go.append(given[0])))
    size = 3 * 2**20 + 5
    held = page_lock.page_locked(size)
    assert held.untyped_storage().nbytes() == size
    address, part = held.data_ptr(), held[7:9]
    del held
    assert part.is_pinned()
    assert not let_go
    del part
    assert let_go == [address]


def test_a_plan_names_its_kind_of_device(apart, tmp_path):
    """It is made by the public functions, kept in a file, and brings the model to that kind by itself."""
    model = make("llama")
    batch = batch_of("llama")
    given = {"ram": "1GiB", "hardware": apart.profile, "gains": False}
    with pytest.raises(DoesNotFitError) as refusal:
        memplan.plan(model, batch, vram=1, **given)
    memplan.plan(model, batch, vram=refusal.value.least_vram_bytes, **given).save(tmp_path / "plan.json")
    plan = memplan.Plan.load(tmp_path / "plan.json")
    assert plan.table.device == apart.kind
    with memplan.attach(model, plan, cache=tmp_path) as handle:
        assert {p.device for p in model.parameters()} == {apart.device}
        assert_equal(whole_of(apart, "llama"), apart.train(model, "llama"))
        assert handle.record.loads > 0
