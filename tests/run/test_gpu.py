"""The CUDA path: streams, events, page-locked homes. Left out where there is no CUDA device. Unproven until one ran
it.
"""

from __future__ import annotations

import dataclasses
import gc

import pytest
import torch
from msgspec.structs import replace

from memplan.case import case_of_plan
from memplan.demo import deterministic
from memplan.errors import StrayReadError
from memplan.program.page_lock import pageable_items
from memplan.program.schema import RING_BYTES
from memplan.run.attach import attach
from memplan.run.memory import arena, page_lock
from tests.run.test_parity import assert_forwards
from tests.run.test_staging import with_small_rings
from tests.support import inside
from tests.support.training import CPU, assert_equal, batch_of, loss_of, make, train

pytestmark = pytest.mark.gpu

CUDA = replace(CPU, name="test-cuda", device="cuda")


@pytest.fixture(autouse=True)
def same_bits():
    """Bitwise equality holds with deterministic kernels. Only warned, attention's backward is not (see conftest.py
    too).
    """
    with deterministic():
        yield


def plan_on_cuda(model, kind, share, monkeypatch, **options):
    from tests.run import test_parity

    monkeypatch.setattr(test_parity, "CPU", CUDA)
    return test_parity.plan_for(model, kind, share=share, **options)


def train_on_cuda(model, kind, monkeypatch, **options):
    from tests.support import training

    monkeypatch.setattr(
        training, "batch_of", lambda *a, **k: {name: value.cuda() for name, value in batch_of(*a, **k).items()}
    )
    monkeypatch.setattr(training, "loss_of", lambda output: loss_on_cuda(output))
    return train(model, kind, **options)


def loss_on_cuda(output):
    if isinstance(output, torch.Tensor):
        target = (torch.arange(output.shape[1], device="cuda").expand(output.shape[:2]) % output.shape[-1]).flatten()
        return torch.nn.functional.cross_entropy(output.flatten(0, 1), target)
    return loss_of(output)


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("checkpointing", ["off", "inside-other", "inside-reentrant", "around-other"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5", "plain"])
def test_three_steps(kind, checkpointing, share, checked, tmp_path, monkeypatch):
    whole = train_on_cuda(make(kind, checkpointing=checkpointing).cuda(), kind, monkeypatch)
    model = make(kind, checkpointing=checkpointing)
    plan = plan_on_cuda(model, kind, share, monkeypatch)
    with attach(model, plan, checked=checked, cache=tmp_path):
        planned = train_on_cuda(model, kind, monkeypatch)
    assert_equal(whole, planned)
    again = {policy.module for policy in plan.activations if policy.activations == "recompute"}
    assert_forwards(whole, planned, again, steps=3)


def test_detach_gives_the_model_back_to_where_it_was(tmp_path, monkeypatch):
    model = make("llama")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    plan = plan_on_cuda(model, "llama", 0.4, monkeypatch)
    with attach(model, plan, cache=tmp_path):
        assert {p.device.type for p in model.parameters()} == {"cuda"}
    for name, parameter in model.named_parameters():
        assert parameter.device.type == "cpu"
        assert torch.equal(parameter, before[name])


def test_peak_is_within_the_budget(tmp_path, monkeypatch):
    train_on_cuda(make("llama").cuda(), "llama", monkeypatch, steps=1)
    gc.collect()
    workspaces = torch.cuda.memory_allocated()  # cuBLAS's, which the profile of a real card counts as context
    model = make("llama")
    plan = plan_on_cuda(model, "llama", 0.4, monkeypatch)
    with attach(model, plan, cache=tmp_path) as handle:
        train_on_cuda(model, "llama", monkeypatch, steps=1)
        torch.cuda.reset_peak_memory_stats()
        train_on_cuda(model, "llama", monkeypatch, steps=2)
        assert handle.record.vram_peak_bytes <= plan.budgets.vram_bytes + workspaces


def test_a_stray_read_raises(tmp_path, monkeypatch):
    model = make("llama")
    plan = plan_on_cuda(model, "llama", 0.4, monkeypatch)
    with attach(model, plan, checked=True, cache=tmp_path) as handle:
        loss = model(**{name: value.cuda() for name, value in batch_of("llama").items()}).loss
        inside.quiesce(handle)
        inside.conductor(handle).backward_begins = lambda module, call: None
        with pytest.raises(StrayReadError):
            loss.backward()


def refused(*args):
    raise RuntimeError("out of memory")


@pytest.mark.parametrize("offload", [(), "all"], ids=["kept", "offloaded"])
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
def test_where_page_locking_is_refused(checked, offload, tmp_path, monkeypatch, caplog):
    """Even the ring's: results are the same, and the ring is counted."""
    whole = train_on_cuda(make("llama").cuda(), "llama", monkeypatch)
    model = make("llama")
    plan = plan_on_cuda(model, "llama", 0.2, monkeypatch, offload=offload)
    monkeypatch.setattr(arena, "page_locked", refused)
    with attach(model, plan, checked=checked, cache=tmp_path) as handle:
        assert_equal(whole, train_on_cuda(model, "llama", monkeypatch))
        assert handle.record.loads > 0
        assert handle.record.ram_peak_bytes == inside.tiers(handle).host_bytes + RING_BYTES
    assert sum("cannot pin" in record.message for record in caplog.records) == 2


def test_a_ring_between_pageable_memory_and_the_device(tmp_path, monkeypatch):
    """The arena is refused, the ring is not: as where a limit lies between the two."""
    whole = train_on_cuda(make("llama").cuda(), "llama", monkeypatch)
    model = make("llama")
    plan = plan_on_cuda(model, "llama", 0.2, monkeypatch, offload="all")
    lock = page_lock.page_locked
    monkeypatch.setattr(arena, "page_locked", lambda size: lock(size) if size == RING_BYTES else refused())
    with attach(model, plan, checked=True, cache=tmp_path) as handle:
        assert not any(held.bytes.is_pinned() for held in inside.host_arenas(handle).values())
        assert_equal(whole, train_on_cuda(model, "llama", monkeypatch))


@pytest.mark.parametrize("share", [0.0, 0.5])
@pytest.mark.parametrize("offload", [(), "all"], ids=["kept", "offloaded"])
def test_what_the_plan_has_pageable_is_pageable(offload, share, tmp_path, monkeypatch):
    """Beside what is page-locked, on the same channel: results are the same, and no more is locked than was said."""
    with_small_rings(monkeypatch)
    whole = train_on_cuda(make("llama").cuda(), "llama", monkeypatch)
    model = make("llama")
    kept = plan_on_cuda(model, "llama", 0.2, monkeypatch, offload=offload)
    table = replace(kept.table, pageable_bytes_per_s=kept.table.host_to_device_bytes_per_s / 2)
    limit = int(share * sum(arena.size_bytes for arena in kept.arenas[1:]))
    case = case_of_plan(replace(kept, table=table, budgets=replace(kept.budgets, page_lock_bytes=limit)))
    plan = dataclasses.replace(case, activations=kept.policies()).place(pieces=False)
    assert pageable_items(plan)
    with attach(model, plan, checked=True, cache=tmp_path) as handle:
        for arena in plan.arenas[1:]:
            assert inside.host_arenas(handle)[arena.id].bytes.is_pinned() != arena.pageable
        assert_equal(whole, train_on_cuda(model, "llama", monkeypatch))


def test_page_locked_memory_has_its_exact_size_and_is_let_go(monkeypatch):
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
