"""The link's rates are those of memory that runs use: pages of memplan's own, registered."""

from __future__ import annotations

import time

import torch

from memplan.hardware.calibrate import cuda
from memplan.hardware.calibrate.rates import Rates
from memplan.run.memory import page_lock
from memplan.units import MIB
from tests.device.backend import SIM


def seconds(work):
    torch.sim.synchronize()
    start = time.perf_counter()
    work()
    torch.sim.synchronize()
    return time.perf_counter() - start


def test_the_link_is_measured_with_registered_pages(policy, monkeypatch):
    registered, rates = [], Rates()
    register = page_lock.pin_pages
    monkeypatch.setattr(page_lock, "pin_pages", lambda *asked: registered.append(asked[2]) or register(*asked))
    monkeypatch.setattr(cuda, "COPY_BYTES", MIB)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **given: empty(*size, **given))
    cuda.measure_link(rates, SIM, seconds)
    assert registered == [MIB, MIB]
    assert min(rates.to_device, rates.to_host, rates.pageable, rates.latency) > 0
    assert 0 < rates.duplex <= 1


def test_page_locks_are_tried_with_registered_pages(policy, monkeypatch):
    """Of just that size, and given back when they were tried."""
    monkeypatch.setattr(cuda, "COPY_BYTES", MIB)
    freed, free = [], page_lock.unpin_pages
    monkeypatch.setattr(page_lock, "unpin_pages", lambda *asked: freed.append(asked) or free(*asked))
    assert cuda.tried_page_locks(cuda.page_locked, 5 * MIB) == (4 * MIB, None)
    assert len(freed) == 3
    held = cuda.page_locked(3 * MIB)
    assert held.is_pinned()
    assert held.untyped_storage().nbytes() == 3 * MIB
