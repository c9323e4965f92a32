"""Pages of fresh memory are there before they are filled, and whoever touches them ahead is gone afterwards."""

from __future__ import annotations

import mmap
import resource
import sys
import threading
from contextlib import ExitStack

import pytest
import torch

from memplan.run.memory import prefault
from memplan.run.memory.prefault import touch_ahead
from memplan.units import MIB
from tests.support.leftovers import started_since, threads

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the kernel's call is Linux's own")


def faults(array):
    """Return how many pages came as the array was written."""
    before = resource.getrusage(resource.RUSAGE_THREAD).ru_minflt
    array[:] = 1
    return resource.getrusage(resource.RUSAGE_THREAD).ru_minflt - before


def test_pages_are_there_and_what_they_hold_stays():
    # Mappings of their own: an allocator may have room left that came long ago.
    fresh, touched = (torch.frombuffer(mmap.mmap(-1, 32 * MIB + 100), dtype=torch.uint8) for _ in range(2))
    touched[5 * MIB : 6 * MIB] = 7
    prefault._touch([touched[:MIB], touched[MIB + 3 :]], threading.Event())
    assert bool((touched[5 * MIB : 6 * MIB] == 7).all())
    assert faults(fresh.numpy()) > 1000
    assert faults(touched.numpy()) < 10


def test_what_the_kernel_refuses_is_no_error():
    assert not prefault._populate(0, mmap.PAGESIZE)


def test_the_thread_ends_with_what_it_is_for():
    part = torch.empty(1024 * MIB, dtype=torch.uint8)
    before = threads()
    with ExitStack() as undo:
        touch_ahead([part], undo)
        assert len(started_since(before)) == 1
    assert not started_since(before)
    assert faults(part.numpy()[-4 * MIB :]) > 1000  # it had not come that far
