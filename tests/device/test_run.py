"""How often the host waits for the simulated device under a plan, and what it leaves to be done. What is computed
there: tests/run/test_gpu.py.
"""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from msgspec.structs import replace

from memplan.errors import RunError
from memplan.hooks.same_again import FIRST
from memplan.program.memory_timeline import timeline
from memplan.run import tiers
from memplan.run.attach import attach
from memplan.run.modules.optimizer_state import has_room_aside
from tests.device import backend
from tests.run import test_optimizer_state
from tests.run.test_parity import plan_for
from tests.support import devices
from tests.support.devices import whole_of
from tests.support.training import assert_equal, batch_of, make


def waits_of(apart, model, warm):
    """How often the host waits by the end of a forward, of its backward and of the step, after some others."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(warm + 1):
        batch = apart.batches("llama", seed)
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
@pytest.mark.parametrize("offload", ["all", pytest.param((), marks=pytest.mark.full)], ids=["offloaded", "kept"])
def test_the_host_waits_no_more_than_for_a_whole_model(offload, tiers, apart, tmp_path):
    """With pinned homes; what comes from the disk is waited for by the ring's own thread alone."""
    warm = 1 if offload else FIRST + 1  # layers that run again are compared at once at first
    expected = waits_of(apart, make("llama").to(apart.device), 0)
    model = make("llama")
    plan = plan_for(model, "llama", tiers=tiers, offload=offload)
    with attach(model, plan, cache=tmp_path) as handle:
        found = waits_of(apart, model, warm)
        assert handle.record.loads > 0
    for before, now in zip(expected, found, strict=True):
        assert {**now, "event": 0} == before
        assert now["event"] == 0 or tiers == "all"


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
        with devices.on("compute-first") as apart:
            with attach(model, test_optimizer_state.plan_for(model)):
                run = apart.train(model, "llama", around_step=looked_at)
            assert_equal(whole_of(apart, "llama"), run)
    # The first step makes the state, which then goes to a room that is had for it.
    assert [is_left for is_left, _ in left[True][1:]] == [True] * 2
    assert [is_left for is_left, _ in left[False][1:]] == [False] * 2
    assert [waited for _, waited in left[True][1:]] == [waited for _, waited in left[False][1:]]


def test_the_state_is_sent_in_turn_where_there_is_no_room():
    with devices.on("compute-first"):
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


def test_a_capture_is_refused(apart, tmp_path, monkeypatch):
    """Before anything is asked of the device; what comes after is as it was."""
    model, is_capturing = make("llama"), []
    monkeypatch.setattr(torch.sim, "is_current_stream_capturing", lambda: bool(is_capturing))
    with attach(model, plan_for(model, "llama"), cache=tmp_path):
        is_capturing.append(True)
        with pytest.raises(RunError, match="captured for a CUDA graph"):
            model(**apart.batches("llama", 0))
        is_capturing.clear()
        run = apart.train(model, "llama")
    assert_equal(whole_of(apart, "llama"), run)
    is_capturing.append(True)
    model(**batch_of("llama", seed=0))
