"""Rates of a CUDA device and of the link to it.

[Note: CUDA unproven] No CUDA device has run this yet. Its calls are torch's documented ones, and its figures should be
held against the card's datasheet before a plan rests on them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial

import torch

from memplan.hardware.calibrate.rates import COPY_BYTES, Progress, Rates
from memplan.hardware.calibrate.step import operator_s
from memplan.hardware.machine import available_host_bytes

TOKENS, WIDTH_IN, WIDTH_OUT = 4096, 4096, 11008
"""Shape of the matrix product: a 7B model's up projection over 4,096 tokens."""


def measure(say: Progress) -> Rates:
    """[Note: CUDA unproven]"""
    held_before = torch.cuda.memory_allocated()
    rates = _rates(say)
    torch.cuda.empty_cache()  # what stays reserved is not free to a plan
    free, total = torch.cuda.mem_get_info()
    # Only now: kernels are loaded, and cuBLAS has its workspaces (a forward's and a backward's, in torch's own pool),
    # as in training. What else the driver counts as used is the context (and other processes, if there are any).
    workspaces = torch.cuda.memory_allocated() - held_before
    rates.context = max(0, total - free - torch.cuda.memory_reserved() + workspaces)
    return rates


def _rates(say: Progress) -> Rates:
    rates = Rates()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == torch.bfloat16 and not torch.cuda.is_bf16_supported(including_emulation=False):
            continue
        name = str(dtype).removeprefix("torch.")
        say(f"matrix products in {name}")
        x = torch.ones(TOKENS, WIDTH_IN, dtype=dtype, device="cuda")
        weight = torch.ones(WIDTH_OUT, WIDTH_IN, dtype=dtype, device="cuda")
        flops = 2 * TOKENS * WIDTH_IN * WIDTH_OUT
        rates.matmul[name] = flops / _median_cuda_s(partial(torch.nn.functional.linear, x, weight))
    say("memory")
    a = torch.ones(COPY_BYTES, dtype=torch.float32, device="cuda")
    b = torch.empty_like(a)
    rates.memory = 2 * a.nbytes / _median_cuda_s(lambda: torch.mul(a, 2.0, out=b))
    say("link")
    rates.page_lock, rates.page_lock_refused = tried_page_locks(page_locked, available_host_bytes() // 4)
    measure_link(rates, torch.device("cuda"), _median_cuda_s)
    say("launches")
    small, out = torch.ones(8, device="cuda"), torch.empty(8, device="cuda")
    rates.launch = _median_cuda_s(lambda: [torch.add(small, small, out=out) for _ in range(1000)]) / 1000
    say("operators of a step")
    rates.operator = operator_s("cuda")
    return rates


def page_locked(size_bytes: int) -> torch.Tensor:
    """Return so many page-locked bytes, of the very kind that a run has. Raises RuntimeError."""
    from memplan.run.memory import page_lock

    return page_lock.page_locked(size_bytes)


def measure_link(rates: Rates, device: torch.device, median_s: Callable[[Callable[[], object]], float]) -> None:
    """Measure copies between RAM and a device. ``median_s``: the device's own clock."""
    pinned, there = page_locked(COPY_BYTES), torch.empty(COPY_BYTES, dtype=torch.uint8, device=device)
    rates.to_device = COPY_BYTES / median_s(lambda: there.copy_(pinned, non_blocking=True))
    rates.to_host = COPY_BYTES / median_s(lambda: pinned.copy_(there, non_blocking=True))
    pageable = torch.empty(COPY_BYTES, dtype=torch.uint8).fill_(1)
    rates.pageable = COPY_BYTES / median_s(lambda: there.copy_(pageable))
    few, few_there = pinned[:512], there[:512]
    rates.latency = median_s(lambda: [few_there.copy_(few, non_blocking=True) for _ in range(200)]) / 200
    # The share of its own rate that a copy reaches while one goes the other way.
    back, here = page_locked(COPY_BYTES), torch.empty_like(there)
    down, up = torch.Stream(device), torch.Stream(device)

    def both() -> None:
        compute = torch.accelerator.current_stream()
        for stream in (down, up):
            stream.wait_stream(compute)
        with down:
            there.copy_(pinned, non_blocking=True)
        with up:
            back.copy_(here, non_blocking=True)
        for stream in (down, up):
            compute.wait_stream(stream)

    alone_s = max(COPY_BYTES / rates.to_device, COPY_BYTES / rates.to_host)
    rates.duplex = min(1.0, alone_s / median_s(both))


def tried_page_locks(lock: Callable[[int], object], most_bytes: int) -> tuple[int, int | None]:
    """Return how much RAM was page-locked at once, and the least that was refused; None where no more than
    ``most_bytes`` was tried and nothing was refused.

    What is locked stays so until all was tried: each piece doubles it; once one is refused they are halved, down to
    COPY_BYTES.
    """
    held: list[object] = []
    locked, refused, piece = 0, None, COPY_BYTES
    while piece >= COPY_BYTES and locked + piece <= most_bytes:
        try:
            held.append(lock(piece))
        except RuntimeError:
            refused = locked + piece
            piece //= 2
        else:
            locked += piece
            piece = locked if refused is None else piece // 2
    return locked, refused


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
