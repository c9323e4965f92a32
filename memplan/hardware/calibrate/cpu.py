"""Rates of the CPU as a compute device."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from memplan.hardware.calibrate.rates import COPY_BYTES, Progress, Rates, median_s
from memplan.hardware.calibrate.step import operator_s

TOKENS, WIDTH_IN, WIDTH_OUT = 1024, 1024, 2816
"""Shape of the matrix product: a small model's up projection over 1,024 tokens."""


def measure(say: Progress) -> Rates:
    rates = Rates()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        say(f"matrix products in {name}")
        if (rate := _matmul(dtype)) is not None:
            rates.matmul[name] = rate
    say("memory")
    # Written, then read, by all threads: y = x * 2 moves each byte of x in and of y out.
    x = torch.ones(COPY_BYTES // 4)
    y = torch.empty_like(x)
    rates.memory = 2 * COPY_BYTES / median_s(lambda: torch.mul(x, 2.0, out=y), repeats=5)
    # A load is one thread's copy: that is what a CPU's "link" is.
    source, target = x.numpy(), y.numpy()
    rates.to_device = rates.to_host = COPY_BYTES / median_s(lambda: np.copyto(target, source), repeats=5)
    say("launches")
    a, b = torch.ones(8), torch.ones(8)
    out = torch.empty(8)
    rates.launch = median_s(lambda: [torch.add(a, b, out=out) for _ in range(1000)], repeats=5) / 1000
    say("operators of a step")
    rates.operator = operator_s("cpu")
    # A load is handed to a worker thread and waited for.
    with ThreadPoolExecutor(1) as pool:
        rates.latency = median_s(lambda: [pool.submit(int).result() for _ in range(200)], repeats=5) / 200
    return rates


def _matmul(dtype: torch.dtype) -> float | None:
    """Return FLOP/s; None where torch has no such product here."""
    flops = 2 * TOKENS * WIDTH_IN * WIDTH_OUT
    # A sixteenth of the work tells in time: where a dtype is emulated it may be a hundred times slower.
    few, weight = torch.ones(TOKENS // 16, WIDTH_IN, dtype=dtype), torch.ones(WIDTH_OUT, WIDTH_IN, dtype=dtype)
    try:
        trial_s = median_s(lambda: torch.nn.functional.linear(few, weight), repeats=3)
    except RuntimeError:
        return None
    if trial_s > 0.05:
        return flops / 16 / trial_s
    x = torch.ones(TOKENS, WIDTH_IN, dtype=dtype)
    return flops / median_s(lambda: torch.nn.functional.linear(x, weight), repeats=5)
