"""memplan on the simulated device: bit-identical to the CPU's whole run, whichever of copies and compute goes first.

Plans are made for a CUDA device, so that homes are pinned and disk loads staged; the device's memory is apart, what is
freed is poisoned, and a missing wait gives NaN or an old weight under one of the two extremes.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from contextlib import contextmanager
from functools import cache

import pytest
import torch
from msgspec.structs import replace
from torch.nn.attention import SDPBackend, sdpa_kernel

from memplan.case import case_of_plan
from memplan.errors import RunError, StrayReadError
from memplan.hooks.same_again import FIRST
from memplan.program.memory_timeline import timeline
from memplan.program.page_lock import pageable_items
from memplan.program.schema import RING_BYTES
from memplan.run import tiers
from memplan.run.attach import attach_on
from memplan.run.memory import arena, page_lock
from memplan.run.modules.optimizer_state import has_room_aside
from tests.device import backend
from tests.device.test_sim import batches, on_host
from tests.run import test_optimizer_state, test_parity, test_rows
from tests.run.test_parity import assert_forwards, plan_for
from tests.run.test_staging import with_small_rings
from tests.support import inside
from tests.support.training import CPU, assert_equal, batch_of, make, train

SIM = torch.device("sim", 0)
CUDA = replace(CPU, name="test-cuda", device="cuda")


PLANNED = (test_parity, test_optimizer_state, test_rows)
"""Whose plans are made for a GPU here."""


@pytest.fixture(autouse=True)
def plans_for_a_gpu(monkeypatch):
    for module in PLANNED:
        monkeypatch.setattr(module, "CPU", CUDA)


@cache
def whole(kind, **options):
    """What the CPU computes, with the attention that a device without kernels of its own takes."""
    with sdpa_kernel(SDPBackend.MATH):
        return train(make(kind, **options), kind)


def planned(kind, tmp_path, *, checked=False, plan=None, share=0.4, offload=(), tiers="all", **options):
    """Train under a plan, compare, and return the handle of the run, which has ended."""
    model = make(kind, **options)
    plan = plan or plan_for(model, kind, share=share, offload=offload, tiers=tiers)
    with attach_on(model, plan, SIM, checked=checked, cache=tmp_path) as handle:
        run = train(model, kind, batches=batches)
    assert_equal(whole(kind, **options), on_host(run))
    again = {policy.module for policy in plan.activations if policy.activations == "recompute"}
    assert_forwards(whole(kind, **options), run, again, steps=3)
    return handle


def full(*values, id=None):
    return pytest.param(*values, id=id, marks=pytest.mark.full)


@pytest.mark.parametrize(
    ("kind", "share", "checked"),
    [
        ("llama", 0.0, False), ("llama", 0.4, True), full("llama", 0.0, True), full("llama", 0.4, False),
        full("t5", 0.0, False), full("t5", 0.4, True), full("t5", 0.0, True), full("t5", 0.4, False),
    ],
)  # fmt: skip
def test_streamed(kind, share, checked, policy, tmp_path):
    handle = planned(kind, tmp_path, share=share, checked=checked)
    assert handle.record.loads > 0


@pytest.mark.parametrize("offload", [full(("model.layers.1", "model.layers.3"), id="some"), "all"])
def test_offloaded_activations(offload, policy, tmp_path):
    handle = planned("llama", tmp_path, share=0.2, offload=offload, checked=True)
    assert handle.record.offloaded_bytes > 0


CHECKPOINTING = ["inside-other", "inside-reentrant", "around-other", "around-reentrant"]


@pytest.mark.full
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", CHECKPOINTING)
@pytest.mark.parametrize("kind", ["llama", "t5", "plain"])
def test_checkpointed(kind, checkpointing, share, policy, tmp_path):
    planned(kind, tmp_path, share=share, checkpointing=checkpointing)


@pytest.mark.parametrize("checked", [False, full(True)], ids=["plain", "checked"])
@pytest.mark.parametrize("kind", ["llama", full("gpt2"), full("plain")])
def test_segments_that_come_and_go(kind, checked, policy, tmp_path, monkeypatch):
    """A plan for the CPU has them where these small models' plans for a GPU have none."""
    monkeypatch.setattr(test_parity, "CPU", CPU)
    handle = planned(kind, tmp_path, share={"llama": 0.4, "gpt2": 0.3, "plain": 0.6}[kind], checked=checked)
    assert any(segment.absent for segment in handle.plan.arenas[0].segments)


def test_the_optimizers_state_waits_on_the_host(policy):
    state_on_the_host()


def test_the_state_is_sent_beside_the_next_forward(monkeypatch):
    """Neither the host nor the compute waits for it: what the compute has done leaves the copy to be done."""
    left = {True: [], False: []}

    @contextmanager
    def looked_at(optimizer):
        torch.sim.synchronize()
        backend.forget_waits()
        yield
        waited = backend.waits()
        torch.sim.current_stream().synchronize()
        left[is_aside].append((backend.pending() > 0, waited))

    for is_aside in left:
        monkeypatch.setattr(tiers, "has_room_aside", lambda plan, is_aside=is_aside: is_aside)
        model = make("llama")
        with backend.present("compute first"):
            with attach_on(model, test_optimizer_state.plan_for(model), SIM):
                run = train(model, "llama", batches=batches, around_step=looked_at)
            assert_equal(whole("llama"), on_host(run))
    # The first step makes the state, which then goes to a room that is had for it.
    assert [is_left for is_left, _ in left[True][1:]] == [True] * 2
    assert [is_left for is_left, _ in left[False][1:]] == [False] * 2
    assert [waited for _, waited in left[True][1:]] == [waited for _, waited in left[False][1:]]


def test_the_state_is_sent_in_turn_where_there_is_no_room():
    plan = test_optimizer_state.plan_for(make("llama"))
    state = plan.table.state_on_host_bytes
    assert state > 0
    assert has_room_aside(plan)
    first = timeline(plan)[0].vram_bytes + state
    for vram_bytes, fits in ((first - 1, False), (first, True)):
        quick = replace(plan.table, device_to_host_bytes_per_s=1e18)
        assert has_room_aside(with_vram(replace(plan, table=quick), vram_bytes)) == fits
    slow = replace(plan, table=replace(plan.table, device_to_host_bytes_per_s=1.0))  # beside all of the pass
    peak = plan.prediction.peaks.vram_bytes
    assert not has_room_aside(with_vram(slow, peak))
    assert has_room_aside(with_vram(slow, peak + state))


def with_vram(plan, vram_bytes):
    return replace(plan, budgets=replace(plan.budgets, vram_bytes=vram_bytes))


def state_on_the_host():
    model, pinned = make("llama"), []
    plan = test_optimizer_state.plan_for(model)

    @contextmanager
    def looked_at(optimizer):
        yield
        pinned.extend(room.is_pinned() for room in inside.optimizer_rooms(handle))

    with attach_on(model, plan, SIM) as handle:
        run = train(model, "llama", batches=batches, around_step=looked_at)
    assert pinned == [True] * 3
    assert_equal(whole("llama"), on_host(run))


@pytest.mark.parametrize("where", ["mapped", "pageable", full("no address")])
def test_rows_that_are_read_on_the_host(where, policy, monkeypatch):
    """By the device where they lie only if it names an address for them; else they are looked up by the CPU."""

    def batches_there(kind, seed):
        return {name: value.to("sim") for name, value in test_rows.batch_of(kind, seed=seed).items()}

    if where == "pageable":
        monkeypatch.setattr(arena, "page_locked", refused)
    elif where == "no address":
        monkeypatch.setattr(torch.sim, "host_device_pointer", lambda address: None)
    model = test_rows.make("untied", dropout=0.0)
    plan = test_rows.plan_of("untied", share=0.0, table_at="host")
    with attach_on(model, plan, SIM) as handle:
        run = train(model, "untied", batches=batches_there)
        table = model.get_input_embeddings().weight
        assert table.device.type == ("sim" if where == "mapped" else "cpu")
    assert handle.record.misses == 0
    assert_equal(whole_rows(), on_host(run))


@cache
def whole_rows():
    with sdpa_kernel(SDPBackend.MATH):
        return train(test_rows.make("untied", dropout=0.0), "untied", batches=test_rows.batch_of)


def refused(*args):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("is_ring_pinned", [True, full(False)])
@pytest.mark.parametrize("offload", [(), full("all")], ids=["kept", "offloaded"])
def test_where_pinning_is_refused(offload, is_ring_pinned, policy, tmp_path, monkeypatch):
    """Results are the same, by way of a ring where that can be had."""
    lock = page_lock.page_locked
    monkeypatch.setattr(
        arena, "page_locked", lambda size: lock(size) if is_ring_pinned and size == RING_BYTES else refused()
    )
    handle = planned("llama", tmp_path, share=0.2, offload=offload, checked=True)
    said = handle.plan.prediction  # of a plan that has one ring less than pages that are refused take
    state_bytes = said.ram_parts["optimizer"]  # of AdamW, which does not train here
    assert handle.record.ram_peak_bytes == said.peaks.ram_bytes - state_bytes + 2 * RING_BYTES


@pytest.mark.parametrize("share", [full(0.0), 0.5])
@pytest.mark.parametrize("offload", [(), full("all")], ids=["kept", "offloaded"])
def test_what_the_plan_has_pageable_is_pageable(offload, share, policy, tmp_path, monkeypatch):
    """Beside what is pinned, on the same channel: results are the same, and no more is pinned than was said."""
    with_small_rings(monkeypatch)
    kept = plan_for(make("llama"), "llama", share=0.2, offload=offload)
    table = replace(kept.table, pageable_bytes_per_s=kept.table.host_to_device_bytes_per_s / 2)
    limit = int(share * sum(arena.size_bytes for arena in kept.arenas[1:]))
    case = case_of_plan(replace(kept, table=table, budgets=replace(kept.budgets, page_lock_bytes=limit)))
    plan = dataclasses.replace(case, activations=kept.policies()).place(pieces=False)
    assert pageable_items(plan)
    planned("llama", tmp_path, plan=plan, checked=True)


def test_detach_gives_the_model_back_to_where_it_was(policy, tmp_path):
    model = make("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with attach_on(model, plan_for(model, "llama"), SIM, cache=tmp_path):
        assert {p.device.type for p in model.parameters()} == {"sim"}
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, before[name])


def test_a_model_that_is_dropped_leaves_nothing(policy, tmp_path):
    gc.collect()
    before = torch.sim.memory_allocated()
    model = make("llama")
    attach_on(model, plan_for(model, "llama"), SIM, cache=tmp_path)
    model(**batches("llama", 0)).loss.backward()
    assert torch.sim.memory_allocated() > before + 2**18
    del model
    deadline = time.monotonic() + 10
    while torch.sim.memory_allocated() > before + 2**10:  # a thread may be on its way out of its last job
        assert time.monotonic() < deadline
        gc.collect()


def test_a_capture_is_refused(policy, tmp_path, monkeypatch):
    """Before anything is asked of the device; what comes after is as it was."""
    model, is_capturing = make("llama"), []
    monkeypatch.setattr(torch.sim, "is_current_stream_capturing", lambda: bool(is_capturing))
    with attach_on(model, plan_for(model, "llama"), SIM, cache=tmp_path):
        is_capturing.append(True)
        with pytest.raises(RunError, match="captured for a CUDA graph"):
            model(**batches("llama", 0))
        is_capturing.clear()
        run = train(model, "llama", batches=batches)
    assert_equal(whole("llama"), on_host(run))
    is_capturing.append(True)
    model(**batch_of("llama", seed=0))


def test_a_stray_read_raises(policy, tmp_path):
    model = make("llama")
    with attach_on(model, plan_for(model, "llama"), SIM, checked=True, cache=tmp_path) as handle:
        loss = model(**batches("llama", 0)).loss
        inside.quiesce(handle)
        inside.conductor(handle).backward_begins = lambda module, call: None
        with pytest.raises(StrayReadError):
            loss.backward()


def waits_of(model, warm):
    """How often the host waits by the end of a forward, of its backward and of the step, after some others."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(warm + 1):
        batch = batches("llama", seed)
        backend.forget_waits()
        loss = model(**batch).loss
        forward = backend.waits()
        loss.backward()
        backward = backend.waits()
        optimizer.step()
        step = backend.waits()
        optimizer.zero_grad()
    return forward, backward, step


@pytest.mark.parametrize("tiers", ["host", "all"])
@pytest.mark.parametrize("offload", ["all", full(())], ids=["offloaded", "kept"])
def test_the_host_waits_no_more_than_for_a_whole_model(offload, tiers, policy, tmp_path):
    """With pinned homes; what comes from the disk is waited for by the ring's own thread alone."""
    warm = 1 if offload else FIRST + 1  # layers that run again are compared at once at first
    expected = waits_of(make("llama").to("sim"), 0)
    model = make("llama")
    plan = plan_for(model, "llama", tiers=tiers, offload=offload)
    with attach_on(model, plan, SIM, cache=tmp_path) as handle:
        found = waits_of(model, warm)
        assert handle.record.loads > 0
    for before, now in zip(expected, found, strict=True):
        assert {**now, "event": 0} == before
        assert now["event"] == 0 or tiers == "all"
