"""What a run may take of a device: counted in what torch reserves, and held to where a margin is given."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
from msgspec.structs import replace

from memplan.api import smaller
from memplan.run.attach import attach
from memplan.run.recovery import _Oldest
from memplan.units import MIB
from tests.run.test_parity import plan_for
from tests.support.devices import whole_of
from tests.support.training import assert_equal, make


def with_margin(plan, margin_bytes):
    return replace(plan, budgets=replace(plan.budgets, margin_bytes=margin_bytes))


def test_peaks_are_those_since_attach(apart, tmp_path):
    """Whatever the process did before; reserved beside allocated, and both to be logged."""
    torch.empty(64 * MIB, dtype=torch.uint8, device=apart.device)
    model = make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path) as handle:
        apart.train(model, "llama")
        record, scalars = handle.record, handle.scalars()
    assert 0 < record.vram_peak_bytes <= record.vram_reserved_bytes < 64 * MIB
    assert record.vram_reserved_bytes == torch.sim.max_memory_reserved()
    assert scalars["memplan/vram_reserved_gib"] == record.vram_reserved_bytes / 2**30
    assert handle.record == record


def test_what_lay_there_before_is_given_back(apart, tmp_path):
    """A model that was moved to the device whole leaves nothing in reserve beside the plan's own."""
    held = []
    for place in ("cpu", apart.device):
        torch.sim.empty_cache()
        model = make("llama").to(place)
        with attach(model, plan_for(model, "llama"), cache=tmp_path):
            held.append(torch.sim.memory_reserved())
        del model
        gc.collect()
    assert held[1] <= held[0] + MIB // 4


def test_a_run_is_held_to_vram_and_margin(apart, tmp_path):
    model = make("llama")
    plan, other = plan_for(model, "llama"), torch.zeros(MIB, dtype=torch.uint8, device=apart.device)
    before = torch.sim.memory_reserved()
    with attach(model, with_margin(plan, MIB), cache=tmp_path):
        allowed = torch.sim.get_per_process_memory_fraction() * torch.sim.mem_get_info()[1]
        assert allowed == pytest.approx(before + plan.budgets.vram_bytes + MIB, abs=2)
        run = apart.train(model, "llama")
        with pytest.raises(torch.OutOfMemoryError):
            torch.empty(int(allowed), dtype=torch.uint8, device=apart.device)
    assert torch.sim.get_per_process_memory_fraction() == 1.0
    torch.empty(int(allowed), dtype=torch.uint8, device=apart.device)
    assert_equal(whole_of(apart, "llama"), run)
    assert not other.any().item()


def test_without_a_margin_no_run_is_ended(apart, tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama"), cache=tmp_path):
        assert torch.sim.get_per_process_memory_fraction() == 1.0


def test_the_largest_limit_holds_until_its_model_goes(apart, tmp_path):
    """Each counts what was there before; nothing is left of a model that is dropped; a script's own is never raised."""
    torch.sim.set_per_process_memory_fraction(0.5)
    models = [make("llama") for _ in range(3)]
    plans = [
        with_margin(plan_for(model, "llama"), size) for model, size in zip(models, (MIB, 2 * MIB, 2**40), strict=True)
    ]
    first, second = (attach(model, plan, cache=tmp_path) for model, plan in zip(models[:2], plans[:2], strict=True))
    both = torch.sim.get_per_process_memory_fraction()
    first.detach()
    assert torch.sim.get_per_process_memory_fraction() == both < 0.5
    attach(models[2], plans[2], cache=tmp_path)
    assert torch.sim.get_per_process_memory_fraction() == 0.5
    del models[2]
    gc.collect()
    assert torch.sim.get_per_process_memory_fraction() == both
    second.detach()
    assert torch.sim.get_per_process_memory_fraction() == 0.5


@pytest.mark.parametrize("beside", [200_000, 400_000], ids=["forward", "forward and backward"])
def test_a_run_that_reaches_its_limit_goes_on_under_a_smaller_plan(beside, apart, tmp_path):
    """From the first micro-batch on, of which nothing may stay on the device."""
    model = make("llama")
    plan, taken = plan_for(model, "llama", share=0.4), []

    def micro_batch():
        if not taken:  # what no plan counts
            taken.append(torch.zeros(beside, dtype=torch.uint8, device=apart.device))
        loss = model(**apart.batches("llama", 0)).loss
        loss.backward()
        return loss.detach()

    with attach(model, with_margin(plan, 2**16), cache=tmp_path, replan=smaller) as handle:
        share = torch.sim.get_per_process_memory_fraction()
        found = handle.micro_batch(micro_batch)
        assert handle.recoveries
        assert handle.plan.prediction.peaks.vram_bytes < plan.prediction.peaks.vram_bytes
        assert torch.sim.get_per_process_memory_fraction() == share
        assert torch.sim.max_memory_reserved() <= share * torch.sim.mem_get_info()[1]
        gradients = [p.grad.cpu() for p in model.parameters() if p.requires_grad]
    model = make("llama").to(apart.device)
    loss = model(**apart.batches("llama", 0)).loss
    loss.backward()
    assert torch.equal(found.cpu(), loss.detach().cpu())
    assert all(map(torch.equal, gradients, (p.grad.cpu() for p in model.parameters() if p.requires_grad)))


def test_a_forward_that_fails_leaves_nothing_once_unhooked(apart, tmp_path):
    """Nor does the watch for backwards that enter a layer from within, which looks at the first graph."""
    model = make("llama")
    with attach(model, plan_for(model, "llama", share=0.4), cache=tmp_path) as handle:
        torch.sim.set_per_process_memory_fraction((torch.sim.memory_reserved() + 400_000) / torch.sim.mem_get_info()[1])
        with pytest.raises(torch.OutOfMemoryError):
            model(**apart.batches("llama", 0))
        torch.sim.set_per_process_memory_fraction(1.0)
        plan = handle.plan
        handle.change(plan)
        gc.collect()
        held = torch.sim.memory_allocated()
        model(**apart.batches("llama", 0)).loss.backward()
        model.zero_grad()
        gc.collect()
        assert held == torch.sim.memory_allocated()


def test_recovery_waits_for_the_thread_that_ran_backward(apart):
    """Which is told last of an error, and may be the last to hold the graph and what was saved in it."""
    oldest, seen = _Oldest(apart.device), []
    leaf = torch.ones(4, device=apart.device, requires_grad=True)
    middle = leaf * 2
    told, goes_on = threading.Event(), threading.Event()

    def slow(gradient):
        told.set()
        goes_on.wait(10)
        seen.append(threading.current_thread())

    middle.register_hook(slow)
    other = threading.Thread(target=middle.sum().backward)
    other.start()
    told.wait(10)
    threading.Timer(0.1, goes_on.set).start()
    oldest.backward()
    assert seen
    assert seen[0] not in (other, threading.current_thread())
    other.join(10)
