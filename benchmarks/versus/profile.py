"""Where a step's time goes, by torch's profiler: what the host did, what the device did, and when neither worked.

For rows that are farther from their bound than they should be. Of CUDA unproven: no GPU has run it.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.versus.training import Training

STEPS = 2
MOST = 8


def account(training: Training) -> dict[str, Any]:
    """Profile some steps; return seconds a step, the dearest operators, and on CUDA gaps, copies and the host's
    calls.
    """
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if training.setting.device == "cuda" else [])]
    with profile(activities=kinds, acc_events=True) as profiled:
        began = time.perf_counter()
        training.train(STEPS)
        wall_s = (time.perf_counter() - began) / STEPS
    events = list(profiled.events())
    on_host = [e for e in events if e.device_type == torch.autograd.DeviceType.CPU]
    # Of a range that the host names (an optimizer's step) the device has one too, around its kernels: it is none.
    on_device = [e for e in events if e.device_type == torch.autograd.DeviceType.CUDA and not e.is_user_annotation]
    in_operators_s = _covered_us(on_host) * 1e-6 / STEPS
    self_us: dict[str, float] = defaultdict(float)
    for event in on_host:
        self_us[event.name] += event.self_cpu_time_total
    dearest = sorted(self_us, key=lambda name: -self_us[name])[:MOST]
    blocks = len(training.plan.table.blocks) if training.plan is not None else 0
    outside_s = max(0.0, wall_s - in_operators_s)
    found: dict[str, Any] = {
        "step_s": wall_s,
        "in_operators_s": in_operators_s,
        "outside_operators_s": outside_s,
        "outside_operators_s_per_block_and_sweep": outside_s / (2 * blocks) if blocks else None,
        "operators": len(on_host) / STEPS,
        "dearest_self_s": {name: self_us[name] * 1e-6 / STEPS for name in dearest},
    }
    if on_device:
        copies = [e for e in on_device if "Memcpy HtoD" in e.name]
        kernels = [e for e in on_device if "Memcpy" not in e.name and "Memset" not in e.name]
        busy_us = _covered_us(kernels)
        span_us = max(e.time_range.end for e in kernels) - min(e.time_range.start for e in kernels) if kernels else 0
        copy_s = sum(e.time_range.elapsed_us() for e in copies) * 1e-6 / STEPS
        moved = training.plan.prediction.loaded_bytes_per_pass if training.plan is not None else 0
        found |= {
            "kernels": len(kernels) / STEPS,
            "kernels_busy_s": busy_us * 1e-6 / STEPS,
            "gaps_between_kernels_s": (span_us - busy_us) * 1e-6 / STEPS,
            "copies_to_device": len(copies) / STEPS,
            "copying_s": copy_s,
            "copy_bytes_per_s": moved / copy_s if copy_s and moved else None,
            "event_calls": sum("cudaEvent" in e.name or "cudaStreamWaitEvent" in e.name for e in on_host) / STEPS,
            "synchronizing_s": sum(e.cpu_time_total for e in on_host if "Synchronize" in e.name) * 1e-6 / STEPS,
        }
    return found


def _covered_us(events: Iterable[Any]) -> float:
    """Return how long at least one of the events was under way, in microseconds."""
    total, until = 0.0, float("-inf")
    for start, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
