"""What a micro-batch may be repeated from waits in one room of pinned memory, from the first to detach."""

from __future__ import annotations

import weakref

import pytest
import torch

from memplan.api import smaller
from memplan.run.attach import attach
from memplan.run.memory import arena, page_lock
from memplan.run.recovery import Room, room_bytes
from tests.run.test_parity import plan_for
from tests.support.training import make


def losses_and_gradients(apart, model, handle=None, fails_at=()):
    """Of two steps of three micro-batches. One that fails has changed gradients before it does."""
    found, fails = [], set(fails_at)
    for number in range(6):

        def run(number=number):
            loss = model(**apart.batches("llama", number)).loss
            loss.backward()
            if number in fails:
                fails.remove(number)
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return loss.detach()

        found.append(run() if handle is None else handle.micro_batch(run))
        if number == 2:
            found += [p.grad.clone() for p in model.parameters() if p.requires_grad]
            model.zero_grad()
    return [part.cpu() for part in (*found, *(p.grad for p in model.parameters() if p.requires_grad))]


def test_the_room_is_had_once_and_given_back(apart, tmp_path, monkeypatch):
    asked, whole = [], losses_and_gradients(apart, make("llama").to(apart.device))
    model, lock = make("llama"), page_lock.page_locked
    grads = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with attach(model, plan_for(model, "llama", tiers="host"), replan=smaller) as handle:
        before = handle.record.ram_peak_bytes
        monkeypatch.setattr(arena, "page_locked", lambda size: asked.append(weakref.ref(room := lock(size))) or room)
        assert all(map(torch.equal, losses_and_gradients(apart, model, handle), whole))
        held = handle.record.ram_peak_bytes - before
        assert grads <= held < 1.1 * grads
        # Of buffers at first, of gradients beside them from the second on; then never again.
        assert [room() is not None for room in asked] == [False, True]
        assert asked[-1]().numel() == held
        assert asked[-1]().is_pinned()
    assert asked[-1]() is None


@pytest.mark.parametrize(("limit", "is_pinned"), [(None, True), (2**12, True), (2**12 - 1, False)])
def test_no_more_is_pinned_than_may_be(limit, is_pinned, apart):
    room, there = Room(limit), torch.arange(1024, dtype=torch.float32).to(apart.device).view(32, 32).t()
    for _ in range(2):
        room.empty_for(room_bytes(there))
        kept = room.copy(there)
        torch.sim.synchronize()
        assert kept.is_pinned() == is_pinned
        assert kept.stride() == there.stride()
        assert torch.equal(kept, there.cpu())
    assert room.size_bytes == 2**12
    others = [torch.ones(4), there[0], torch.eye(4).to_sparse()]
    assert list(map(room_bytes, others)) == [0, 0, 0]


def test_what_is_repeated_begins_where_it_began(apart, tmp_path):
    whole = losses_and_gradients(apart, make("llama").to(apart.device))
    model = make("llama")
    with attach(model, plan_for(model, "llama", share=0.4), cache=tmp_path, replan=smaller) as handle:
        found = losses_and_gradients(apart, model, handle, fails_at=(0, 2, 4))
        assert handle.recoveries == 3
    assert all(map(torch.equal, found, whole))
