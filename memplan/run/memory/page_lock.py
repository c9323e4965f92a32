"""Page-locked host memory of just the size that was asked for. Unproven: no GPU has run it yet.

torch's own allocator rounds up to a power of two, which may double an arena; its setting against that
(``pinned_max_round_threshold_mb``) is the whole process's. Here pages of our own are registered with the device.

[Note: page-locking that is refused] WSL2, containers and RLIMIT_MEMLOCK limit it, and CUDA says so in several ways. It
keeps a thread's last error, which the next kernel that is launched there would be blamed for: so it is asked in a
thread of its own, which then ends.

[Note: a fork under page-locked memory] Pages that are private would be copied when either process writes to them, and
the device would go on with the old ones. These are shared: a data loader's worker sees them where they are.
"""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
import torch
from numpy.typing import NDArray

from memplan.run.transfer.device import pin_pages, pinning, pins_pages, unpin_pages
from memplan.run.transfer.interrupts import defer_sigint
from memplan.run.transfer.worker import Worker

Bytes = NDArray[np.uint8]


def page_locked(size_bytes: int) -> torch.Tensor:
    """Return so many page-locked bytes (uint8, one dimension), at least one. Raises RuntimeError where it is
    refused.
    """
    device = pinning()
    if not pins_pages(device):
        return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)
    try:
        held = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
    except OSError as error:
        raise RuntimeError(str(error)) from error
    return torch.from_numpy(_locked(held, device))


def lock_pages(held: torch.Tensor) -> torch.Tensor:
    """Return memory that is there (uint8, from the beginning of a page) page-locked, without a copy. Raises
    RuntimeError where it is refused.
    """
    device = pinning()
    if not pins_pages(device):
        raise RuntimeError(f"{device.type} pins no memory that is there already")
    return torch.from_numpy(_locked(held.numpy().view(), device))


def _locked(held: Bytes, device: torch.device) -> Bytes:
    """Return memory page-locked for as long as the array that is returned is held."""
    address, size_bytes = held.ctypes.data, held.nbytes
    with defer_sigint():  # what is registered must be unregistered before it goes
        worker = Worker("memplan-page-lock")
        try:
            worker.submit(pin_pages, device, address, size_bytes).result()
        finally:
            worker.close()
        # Of the array, not of the pages: those are unmapped before anyone hears that they go.
        weakref.finalize(held, _unregister, address, device, os.getpid()).atexit = False
    return held


def _unregister(address: int, device: torch.device, process: int) -> None:
    if os.getpid() == process:
        unpin_pages(device, address)
