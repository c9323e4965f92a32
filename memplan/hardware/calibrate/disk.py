"""How fast this machine's disk is read: large reads by a few threads, past the page cache."""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from memplan.errors import HardwareError
from memplan.units import MIB

DISK_BYTES, PIECE_BYTES = 128 * MIB, 8 * MIB

DEPTHS = (1, 2, 4, 8)
"""Reads at once that are tried."""


def disk_rate(folder: Path) -> tuple[float, int]:
    """Return the rate at which threads read a cold file, in bytes/s, and with how many at once. Raises HardwareError
    where none can be made.
    """
    try:
        handle, name = tempfile.mkstemp(dir=folder, prefix="calibrate-", suffix=".tmp")
    except OSError as error:
        raise HardwareError(f"{folder} cannot be written ({error.strerror}): give another folder to measure") from error
    path = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            piece = os.urandom(PIECE_BYTES)  # nothing that a file system could compress or share
            for _ in range(DISK_BYTES // PIECE_BYTES):
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
            _forget(file.fileno())
        # More at once than reach nine tenths of the best rate are of no use to others.
        rates = {depth: DISK_BYTES / statistics.median(_read_s(path, depth) for _ in range(3)) for depth in DEPTHS}
        depth = next(depth for depth in DEPTHS if rates[depth] >= 0.9 * max(rates.values()))
        return rates[depth], depth
    except OSError as error:
        raise HardwareError(
            f"{folder} cannot hold a file of {DISK_BYTES // MIB} MiB ({error.strerror}): give another folder"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _read_s(path: Path, depth: int) -> float:
    descriptor = _open_direct(path)
    try:
        offsets = range(0, DISK_BYTES, PIECE_BYTES)
        # Anonymous maps start at a page, as O_DIRECT wants it. One a thread would do; one a piece is simplest, and they
        # are touched first, so that no page fault is timed.
        buffers = [mmap.mmap(-1, PIECE_BYTES) for _ in offsets]
        for buffer in buffers:
            np.frombuffer(buffer, np.uint8)[:: mmap.PAGESIZE] = 0
        with ThreadPoolExecutor(depth) as pool:
            list(pool.map(int, range(depth)))  # the threads are there before the clock starts
            start = time.perf_counter()
            read = sum(pool.map(lambda buffer, offset: os.preadv(descriptor, [buffer], offset), buffers, offsets))
            elapsed = time.perf_counter() - start
        if read != DISK_BYTES:
            raise OSError(0, f"{read} of {DISK_BYTES} bytes were read")
        _forget(descriptor)
        return elapsed
    finally:
        os.close(descriptor)


def _open_direct(path: Path) -> int:
    """Open past the page cache where the file system can, else plainly."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    except (OSError, AttributeError):  # tmpfs refuses it; not all systems have the flag
        return os.open(path, os.O_RDONLY)
    probe = mmap.mmap(-1, mmap.PAGESIZE)
    try:
        os.preadv(descriptor, [probe], 0)
    except OSError:
        os.close(descriptor)
        return os.open(path, os.O_RDONLY)
    return descriptor


def _forget(descriptor: int) -> None:
    """Ask the kernel to drop the file from its page cache; a hint, and harmless where it is not taken."""
    with contextlib.suppress(OSError, AttributeError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
