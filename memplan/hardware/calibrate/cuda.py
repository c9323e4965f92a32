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
    torch._C._host_emptyCache()
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
    rates.page_lock, rates.page_lock_refused = tried_page_locks(_lock, available_host_bytes() // 4)
    torch._C._host_emptyCache()  # lest all that were tried stay locked
    pinned = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    rates.to_device = COPY_BYTES / _median_cuda_s(lambda: there.copy_(pinned, non_blocking=True))
    rates.to_host = COPY_BYTES / _median_cuda_s(lambda: pinned.copy_(there, non_blocking=True))
    pageable = torch.empty(COPY_BYTES, dtype=torch.uint8).fill_(1)
    rates.pageable = COPY_BYTES / _median_cuda_s(lambda: there.copy_(pageable))
    rates.duplex = _duplex(pinned, there, max(COPY_BYTES / rates.to_device, COPY_BYTES / rates.to_host))
    say("launches")
    small, out = torch.ones(8, device="cuda"), torch.empty(8, device="cuda")
    rates.launch = _median_cuda_s(lambda: [torch.add(small, small, out=out) for _ in range(1000)]) / 1000
    say("operators of a step")
    rates.operator = operator_s("cuda")
    few, few_there = pinned[:512], there[:512]
    rates.latency = _median_cuda_s(lambda: [few_there.copy_(few, non_blocking=True) for _ in range(200)]) / 200
    return rates


def _duplex(pinned: torch.Tensor, there: torch.Tensor, alone_s: float) -> float:
    """Return the share of its own rate that a copy reaches while one goes the other way. ``alone_s``: of the slower."""
    back, here = torch.empty_like(pinned, pin_memory=True), torch.empty_like(there)
    down, up = torch.cuda.Stream(), torch.cuda.Stream()

    def both() -> None:
        for stream in (down, up):
            stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(down):
            there.copy_(pinned, non_blocking=True)
        with torch.cuda.stream(up):
            back.copy_(here, non_blocking=True)
        for stream in (down, up):
            torch.cuda.current_stream().wait_stream(stream)

    return min(1.0, alone_s / _median_cuda_s(both))


def _lock(size_bytes: int) -> object:
    """Page-lock so many bytes more, a power of two: torch's allocator rounds others up. Raises RuntimeError."""
    return torch.empty(size_bytes, dtype=torch.uint8, pin_memory=True)


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
