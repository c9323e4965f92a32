"""Measures this machine's rates, in some seconds, into a HardwareProfile.

Each rate is the median of a few repeats, at shapes like those of training. What runs beside it slows it, as it
would slow training; so measure on an idle machine.

[Note: CUDA unproven] No CUDA device has run the branch for CUDA yet. Its calls are torch's documented ones, and its
figures should be held against the card's datasheet before a plan rests on them.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import psutil
import torch

from memplan.errors import HardwareError
from memplan.hardware import SCHEMA_VERSION, Figure, HardwareProfile, cache_folder, machine_key, processor_name
from memplan.units import MIB

TOKENS, WIDTH_IN, WIDTH_OUT = 1024, 1024, 2816
"""Shape of the matrix product on the CPU: a small model's up projection over 1,024 tokens."""

CUDA_TOKENS, CUDA_WIDTH_IN, CUDA_WIDTH_OUT = 4096, 4096, 11008
"""The same on a CUDA device: a 7B model's up projection over 4,096 tokens."""

COPY_BYTES = 128 * MIB
"""More than any processor's cache, so that the copy is from RAM to RAM."""

DISK_BYTES, PIECE_BYTES, DISK_THREADS = 128 * MIB, 8 * MIB, 4

_Progress = Callable[[str], None]


def measure(
    device: Literal["cpu", "cuda"] | None = None,
    folder: str | Path | None = None,
    progress: _Progress | None = None,
) -> HardwareProfile:
    """Return a profile of this machine, measured now: under 6 s on a CPU of two cores.

    ``device``: None for CUDA where there is one, else the CPU. ``folder``: where a file of 128 MiB is written, read and
    deleted to time the disk; None for the cache folder. ``progress`` is called with a short text before each part.

    Raises HardwareError where ``device`` is ``"cuda"`` and torch sees none, and where the folder cannot be written.
    """
    say = progress if progress is not None else _silent
    chosen = device if device is not None else ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == "cuda" and not torch.cuda.is_available():
        raise HardwareError("device was given as 'cuda', and torch sees no CUDA device: give 'cpu' or None")
    say("disk")
    disk = _disk_bytes_per_s(Path(folder) if folder is not None else cache_folder())
    with torch.inference_mode():
        rates = _cuda(say) if chosen == "cuda" else _cpu(say)
    return _profile(chosen, rates, disk)


class _Rates:
    """What both kinds of device are asked for."""

    def __init__(self) -> None:
        self.matmul: dict[str, float] = {}
        self.memory = self.to_device = self.to_host = self.launch = self.latency = self.context = 0.0


def _profile(device: Literal["cpu", "cuda"], rates: _Rates, disk_bytes_per_s: float) -> HardwareProfile:
    today = datetime.now(UTC).date().isoformat()

    def figure(value: float) -> Figure:
        return Figure(value=float(f"{value:.4g}"), kind="measured", source="memplan.calibrate", date=today)

    def whole(value: int) -> Figure:
        return Figure(value=float(value), kind="measured", source="memplan.calibrate", date=today)

    ram = psutil.virtual_memory().total
    if device == "cuda":
        device_bytes = int(torch.cuda.get_device_properties().total_memory)
        name = torch.cuda.get_device_name()
        description = f"{name} beside {processor_name()}, {os.cpu_count()} CPUs, torch {torch.__version__}"
    else:
        device_bytes, name = ram, processor_name()
        description = f"{name}, {torch.get_num_threads()} compute threads, torch {torch.__version__}"
    return HardwareProfile(
        schema_version=SCHEMA_VERSION,
        name=f"{name} (measured)",
        description=description,
        device=device,
        device_bytes=whole(device_bytes),
        host_bytes=whole(ram),
        matmul_flops_per_s={dtype: figure(rate) for dtype, rate in rates.matmul.items()},
        memory_bytes_per_s=figure(rates.memory),
        host_to_device_bytes_per_s=figure(rates.to_device),
        device_to_host_bytes_per_s=figure(rates.to_host),
        disk_bytes_per_s=figure(disk_bytes_per_s),
        launch_s=figure(rates.launch),
        load_latency_s=figure(rates.latency),
        context_bytes=whole(int(rates.context)),
        machine=machine_key(),
    )


# ----------------------------------------------------------------------------------------------------------- the CPU


def _cpu(say: _Progress) -> _Rates:
    rates = _Rates()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        say(f"matrix products in {name}")
        if (rate := _cpu_matmul(dtype)) is not None:
            rates.matmul[name] = rate
    say("memory")
    # Written, then read, by all threads: y = x * 2 moves each byte of x in and of y out.
    x = torch.ones(COPY_BYTES // 4)
    y = torch.empty_like(x)
    rates.memory = 2 * COPY_BYTES / _median_s(lambda: torch.mul(x, 2.0, out=y), repeats=5)
    # A load is one thread's copy: that is what a CPU's "link" is.
    source, target = x.numpy(), y.numpy()
    rates.to_device = rates.to_host = COPY_BYTES / _median_s(lambda: np.copyto(target, source), repeats=5)
    say("launches")
    a, b = torch.ones(8), torch.ones(8)
    out = torch.empty(8)
    rates.launch = _median_s(lambda: [torch.add(a, b, out=out) for _ in range(1000)], repeats=5) / 1000
    # A load is handed to a worker thread and waited for.
    with ThreadPoolExecutor(1) as pool:
        rates.latency = _median_s(lambda: [pool.submit(int).result() for _ in range(200)], repeats=5) / 200
    return rates


def _cpu_matmul(dtype: torch.dtype) -> float | None:
    """Return FLOP/s; None where torch has no such product here."""
    flops = 2 * TOKENS * WIDTH_IN * WIDTH_OUT
    # A sixteenth of the work tells in time: where a dtype is emulated it may be a hundred times slower.
    few, weight = torch.ones(TOKENS // 16, WIDTH_IN, dtype=dtype), torch.ones(WIDTH_OUT, WIDTH_IN, dtype=dtype)
    try:
        trial_s = _median_s(lambda: torch.nn.functional.linear(few, weight), repeats=3)
    except RuntimeError:
        return None
    if trial_s > 0.05:
        return flops / 16 / trial_s
    x = torch.ones(TOKENS, WIDTH_IN, dtype=dtype)
    return flops / _median_s(lambda: torch.nn.functional.linear(x, weight), repeats=5)


# --------------------------------------------------------------------------------------------------------------- CUDA


def _cuda(say: _Progress) -> _Rates:
    """[Note: CUDA unproven]"""
    rates = _Rates()
    free_before, total = torch.cuda.mem_get_info()
    # What the driver counts as used beyond torch's own pool is the context (and other processes, if there are any).
    rates.context = max(0, total - free_before - torch.cuda.memory_reserved())
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue
        name = str(dtype).removeprefix("torch.")
        say(f"matrix products in {name}")
        x = torch.ones(CUDA_TOKENS, CUDA_WIDTH_IN, dtype=dtype, device="cuda")
        weight = torch.ones(CUDA_WIDTH_OUT, CUDA_WIDTH_IN, dtype=dtype, device="cuda")
        flops = 2 * CUDA_TOKENS * CUDA_WIDTH_IN * CUDA_WIDTH_OUT
        rates.matmul[name] = flops / _median_cuda_s(partial(torch.nn.functional.linear, x, weight))
    say("memory")
    a = torch.ones(COPY_BYTES, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    rates.memory = 2 * a.nbytes / _median_cuda_s(lambda: torch.mul(a, 2.0, out=b))
    say("link")
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    rates.to_device = COPY_BYTES / _median_cuda_s(lambda: there.copy_(pinned, non_blocking=True))
    rates.to_host = COPY_BYTES / _median_cuda_s(lambda: pinned.copy_(there, non_blocking=True))
    say("launches")
    small, out = torch.ones(8, device="cuda"), torch.empty(8, device="cuda")
    rates.launch = _median_cuda_s(lambda: [torch.add(small, small, out=out) for _ in range(1000)]) / 1000
    few, few_there = pinned[:512], there[:512]
    rates.latency = _median_cuda_s(lambda: [few_there.copy_(few, non_blocking=True) for _ in range(200)]) / 200
    return rates


def _median_cuda_s(work: Callable[[], object], repeats: int = 7) -> float:
    """Return the median time between two events around ``work``, in seconds, two warm-ups before."""
    times: list[float] = []
    for turn in range(repeats + 2):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        work()
        end.record()
        end.synchronize()
        if turn >= 2:
            times.append(start.elapsed_time(end) / 1e3)
    return max(statistics.median(times), 1e-9)


# ----------------------------------------------------------------------------------------------------------- the disk


def _disk_bytes_per_s(folder: Path) -> float:
    """Return the rate at which a few threads read a cold file. Raises HardwareError where none can be made."""
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
        return DISK_BYTES / statistics.median(_read_s(path) for _ in range(3))
    except OSError as error:
        raise HardwareError(
            f"{folder} cannot hold a file of {DISK_BYTES // MIB} MiB ({error.strerror}): give another folder"
        ) from error
    finally:
        path.unlink(missing_ok=True)


def _read_s(path: Path) -> float:
    descriptor = _open_direct(path)
    try:
        offsets = range(0, DISK_BYTES, PIECE_BYTES)
        # Anonymous maps start at a page, as O_DIRECT wants it. One a thread would do; one a piece is simplest, and they
        # are touched first, so that no page fault is timed.
        buffers = [mmap.mmap(-1, PIECE_BYTES) for _ in offsets]
        for buffer in buffers:
            np.frombuffer(buffer, np.uint8)[:: mmap.PAGESIZE] = 0
        with ThreadPoolExecutor(DISK_THREADS) as pool:
            list(pool.map(int, range(DISK_THREADS)))  # the threads are there before the clock starts
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


# ---------------------------------------------------------------------------------------------------------- the clock


def _median_s(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of ``work`` in seconds, one warm-up before."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(statistics.median(times), 1e-9)


def _silent(_: str) -> None:
    return None
