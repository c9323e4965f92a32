"""The ledger of live storages, on real and on fake tensors."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.model.live_storages import StorageLedger

KIB = 1024


def kib(count=1):
    return torch.zeros(count * KIB // 4)


@pytest.fixture(params=["real", "fake"])
def ledger(request):
    found = StorageLedger()
    if request.param == "fake":
        with FakeTensorMode(), found:
            yield found
    else:
        with found:
            yield found


def test_what_dies_no_longer_counts(ledger):
    a, b = kib(), kib(2)
    assert ledger.live_bytes == 3 * KIB
    del a
    assert ledger.live_bytes == 2 * KIB
    c = b + 1
    assert (ledger.live_bytes, ledger.peak_bytes) == (4 * KIB, 4 * KIB)
    del b, c
    assert (ledger.live_bytes, ledger.peak_bytes) == (0, 4 * KIB)


def test_views_and_in_place_operators_share_a_storage(ledger):
    a = kib(4)
    view = a.view(2, -1)[1].t()
    a.add_(1).mul_(2)
    assert ledger.live_bytes == 4 * KIB
    del a
    assert ledger.live_bytes == 4 * KIB
    del view
    assert ledger.live_bytes == 0


def test_what_autograd_saved_is_alive(ledger):
    a = kib().requires_grad_()
    b = (a * 2).exp()  # saves its output
    total = b.sum()
    del b
    assert ledger.live_bytes == 2 * KIB + 4
    total.backward()
    del total
    assert ledger.live_bytes == 2 * KIB  # a and its gradient


def test_a_storage_that_is_resized(ledger):
    a = kib()
    a.resize_(2 * a.numel())
    assert ledger.live_bytes == 2 * KIB
    del a
    assert ledger.live_bytes == 0


def test_what_is_ignored_and_what_was_there_before():
    weight, other = kib(), kib(2)
    ledger = StorageLedger(ignore=[weight])
    ledger.add(other)
    ledger.add(other[1:])
    with ledger:
        view = weight.t()
        kept = other.view(-1)
    assert ledger.live_bytes == 2 * KIB
    del other, view, kept
    assert ledger.live_bytes == 0


def test_segments(ledger):
    a = kib()
    ledger.begin_segment(1)
    b = kib(2)
    c = kib(3)
    del c
    ledger.begin_segment(2)
    del a
    d = kib()
    del d
    ledger.finish()
    assert ledger.segment_peaks == {0: KIB, 1: 6 * KIB, 2: 3 * KIB}
    assert ledger.spans == {(1, 1): 3 * KIB, (0, 2): KIB, (2, 2): KIB}
    assert [(held.born, held.size_bytes) for held in ledger.alive()] == [(1, 2 * KIB)]
    assert ledger.held(b).born == 1


def test_lists_and_what_holds_no_memory():
    with StorageLedger() as ledger:
        parts = torch._foreach_add([kib(), kib()], 1)
        assert ledger.live_bytes == 2 * KIB
        torch.zeros(KIB, device="meta")
        torch.eye(4).to_sparse()
        assert ledger.live_bytes <= 2 * KIB
    del parts
