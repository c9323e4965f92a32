"""The first touch of fresh memory, by a thread ahead of those that fill it.

An arena's pages come from the kernel as each is first written, and that costs several times the copy into it, in the
path of the threads that read the disk. Here they come beside it, while the disk reads. The kernel is asked for pieces
of pages in one call each (Linux 5.14 on); a page that is there already is passed over as it is, so it does not matter
who of the two is ahead. Where the kernel refuses, pages come as ever.

Only what is going to be filled is touched: no more memory is taken than without it.
"""

from __future__ import annotations

import ctypes
import sys
import threading
from collections.abc import Sequence
from contextlib import ExitStack

import torch

from memplan.run.transfer.interrupts import defer_sigint
from memplan.run.transfer.worker import Worker
from memplan.units import MIB

_POPULATE_WRITE = 23
"""Linux's MADV_POPULATE_WRITE: Python's ``mmap`` does not name it."""
_PAGE_BYTES = 4096
_PIECE_BYTES = 8 * MIB
"""Between two of them it is seen whether to end."""


def touch_ahead(parts: Sequence[torch.Tensor], undo: ExitStack) -> None:
    """Begin to touch byte ranges that are about to be filled in this order; ``undo`` ends it, done or not."""
    on_host = [part for part in parts if part.device.type == "cpu"]
    if sys.platform != "linux" or not on_host:
        return
    with defer_sigint():
        ended = threading.Event()
        worker = Worker("memplan-first-touch")
        undo.callback(worker.close)
        undo.callback(ended.set)
        worker.submit(_touch, on_host, ended)


def _touch(parts: Sequence[torch.Tensor], ended: threading.Event) -> None:
    for part in parts:
        begin = part.data_ptr() // _PAGE_BYTES * _PAGE_BYTES
        end = part.data_ptr() + part.numel()
        for address in range(begin, end, _PIECE_BYTES):
            if ended.is_set() or not _populate(address, min(_PIECE_BYTES, end - address)):
                return


def _populate(address: int, size_bytes: int) -> bool:
    """Have the pages of a range there, their contents as they are. False where the kernel does not do that."""
    refused: int = _MADVISE(address, size_bytes, _POPULATE_WRITE)
    return not refused


def _madvise() -> ctypes._NamedFuncPointer:
    found = ctypes.CDLL(None).madvise
    found.argtypes, found.restype = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int), ctypes.c_int
    return found


_MADVISE = _madvise()
