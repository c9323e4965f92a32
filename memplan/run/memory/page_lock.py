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

from memplan.run.transfer.interrupts import defer_sigint
from memplan.run.transfer.worker import Worker


def page_locked(size_bytes: int) -> torch.Tensor:
    """Return so many page-locked bytes (uint8, one dimension), at least one. Raises RuntimeError where it is
    refused.
    """
    if not torch.cuda.is_available():
        raise RuntimeError("torch sees no CUDA device")
    device = torch.cuda.current_device()
    try:
        held = np.frombuffer(mmap.mmap(-1, size_bytes), np.uint8)
    except OSError as error:
        raise RuntimeError(str(error)) from error
    address = held.ctypes.data
    with defer_sigint():  # what is registered must be unregistered before it goes
        worker = Worker("memplan-page-lock")
        try:
            worker.submit(_register, address, size_bytes, device).result()
        finally:
            worker.close()
        # Of the array, not of the pages: those are unmapped before anyone hears that they go.
        weakref.finalize(held, _unregister, address, device, os.getpid()).atexit = False
    return torch.from_numpy(held)


def _register(address: int, size_bytes: int, device: int) -> None:
    with torch.cuda.device(device):
        torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))


def _unregister(address: int, device: int, process: int) -> None:
    """Let pages go, once no copy is under way: one of an optimizer's state may be, though transfers are closed before
    arenas go.
    """
    if os.getpid() == process:
        with torch.cuda.device(device):
            torch.cuda.synchronize()
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
