"""One micro-batch by torch's profiler: copies beside compute, the share that overlaps, and gaps on the device.

    python -m benchmarks.gpu.timeline

Then steps with loads in pieces of several sizes, and what a copy of 4 KiB takes meanwhile, as a trainer's batch does.
memplan on the case and the emulated card that it meets first. On a CPU there are no device events: only the host's
operators are counted.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch

from benchmarks.gpu.visit import CARDS_GIB, DRY, DRY_SHARES, LENGTHS, checkpoint_of, model_of, plan_name, setting_of
from benchmarks.versus.contenders import limit_card, planned
from benchmarks.versus.planning import priced

WARM_STEPS = 3
MOST = 10
"""Of the dearest kernels and the longest gaps."""

Spans = list[tuple[float, float]]


def merged(spans: Iterable[tuple[float, float]]) -> Spans:
    """Return the spans that at least one of these covers, in order, none touching another."""
    found: Spans = []
    for start, end in sorted(spans):
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(found[-1][1], end))
        else:
            found.append((start, end))
    return found


def common(a: Spans, b: Spans) -> Spans:
    """Return where both are; each as :func:`merged` returns it."""
    found, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        start, end = max(a[i][0], b[j][0]), min(a[i][1], b[j][1])
        if start < end:
            found.append((start, end))
        if a[i][1] < b[j][1]:
            i += 1
        else:
            j += 1
    return found


def length(spans: Spans) -> float:
    return sum(end - start for start, end in spans)


def gaps(spans: Spans) -> list[float]:
    """Return how long each pause between merged spans is."""
    return [after[0] - before[1] for before, after in itertools.pairwise(spans)]


def account(kernels: Spans, copies: Spans) -> dict[str, Any]:
    """Return the figures of a micro-batch from its spans in microseconds.

    ``overlap_share``: of the time in which something is copied, that in which a kernel runs too. ``waiting_s``: only a
    copy runs. ``idle_s``: nothing runs on the device, which is the host's doing.
    """
    compute, moving = merged(kernels), merged(copies)
    busy = merged((*compute, *moving))
    overlap_us = length(common(compute, moving))
    idle = sorted(gaps(busy), reverse=True)
    return {
        "device_span_s": (busy[-1][1] - busy[0][0]) * 1e-6 if busy else 0.0,
        "compute_s": length(compute) * 1e-6,
        "copying_s": length(moving) * 1e-6,
        "overlap_s": overlap_us * 1e-6,
        "overlap_share": overlap_us / length(moving) if moving else None,
        "waiting_s": (length(moving) - overlap_us) * 1e-6,
        "idle_s": sum(idle) * 1e-6,
        "idle_gaps": len(idle),
        "longest_idle_us": idle[:MOST],
    }


def look(training: Any) -> dict[str, Any]:
    """Profile one step of a training that is warm."""
    from torch.profiler import ProfilerActivity, profile

    kinds = [ProfilerActivity.CPU, *([] if DRY else [ProfilerActivity.CUDA])]
    with profile(activities=kinds, acc_events=True) as profiled:
        began = time.perf_counter()
        training.train(1)
        step_s = time.perf_counter() - began
    on_device, on_host = [], []
    for event in profiled.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            if not event.is_user_annotation:  # a range that the host names is no work
                on_device.append(event)
        else:
            on_host.append(event)
    kernels, copies, named_s = [], [], defaultdict(float)
    directions: dict[str, dict[str, float]] = {}
    for event in on_device:
        span = (event.time_range.start, event.time_range.end)
        if "HtoD" in event.name or "DtoH" in event.name:
            copies.append(span)
            way = directions.setdefault("to_device" if "HtoD" in event.name else "to_host", {"copies": 0, "s": 0.0})
            way["copies"] += 1
            way["s"] += (span[1] - span[0]) * 1e-6
        else:
            kernels.append(span)
            named_s[event.name[:80]] += (span[1] - span[0]) * 1e-6
    record, plan = training.handle.record, training.plan
    return {
        "step_s": step_s,
        "kernels": len(kernels),
        **account(kernels, copies),
        "directions": directions,
        "planned_bytes_per_pass": plan.prediction.loaded_bytes_per_pass,
        "planned_bytes_per_s": plan.table.host_to_device_bytes_per_s,
        "recorded_stall_share": record.stall_s / record.pass_s if record.pass_s else 0.0,
        "host_events": len(on_host),
        "host_waits": sum("Synchronize" in event.name for event in on_host),
        "host_waiting_s": sum(event.cpu_time_total for event in on_host if "Synchronize" in event.name) * 1e-6,
        "launches": sum("LaunchKernel" in event.name for event in on_host),
        "dearest_kernels_s": dict(sorted(named_s.items(), key=lambda item: -item[1])[:MOST]),
    }


def by_piece(training: Any, steps: int = 3) -> dict[str, dict[str, float]]:
    """Return seconds a step, and median and greatest seconds of a small copy in each access, by MiB of a load's
    piece.
    """
    if DRY:
        return {}
    transfers = training.handle._runtime.conductor._transfers
    small, there = torch.zeros(4096, dtype=torch.uint8).pin_memory(), torch.empty(4096, dtype=torch.uint8).cuda()
    side, taken = torch.cuda.Stream(), []

    def copies(*args: object) -> None:
        began = time.perf_counter()
        with torch.cuda.stream(side):
            there.copy_(small, non_blocking=True)
        side.synchronize()
        taken.append(time.perf_counter() - began)

    layers = [m for name, m in training.handle.model.named_modules() if name.rpartition(".")[2].isdigit()]
    found = {}
    for mib in (4, 16, 32, 64, 1024):
        transfers.PIECE_BYTES = mib << 20
        transfers._loads.clear()
        training.train(1)
        step_s = min(training.train(1) for _ in range(steps))
        hooks = [layer.register_forward_hook(copies) for layer in layers]
        taken.clear()
        training.train(1)
        for hook in hooks:
            hook.remove()
        found[str(mib)] = {"step_s": step_s, "copy_s": sorted(taken)[len(taken) // 2], "longest_copy_s": max(taken)}
    return found


def main() -> int:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    warnings.simplefilter("ignore")
    model, tokens, gib = model_of("bf16"), LENGTHS[0], CARDS_GIB[0]
    checkpoint_of(model)
    name = plan_name(model, tokens, gib)
    setting = setting_of(model, tokens, "timeline", None if DRY else gib << 30)
    if not (setting.plans / f"{name}.json").is_file():
        case, _ = priced(setting)
        size = int(case.whole_vram_bytes() * DRY_SHARES[gib]) if DRY else gib << 30
        case.place(vram_bytes=size).save(setting.plans / f"{name}.json")
    if not DRY:
        limit_card(gib << 30)
    training = planned(setting, name)
    training.train(WARM_STEPS)
    unprofiled_s = min(training.train(2))
    result = {"dry": DRY, "model": model.name, "tokens": tokens, "card_gib": gib, "unprofiled_step_s": unprofiled_s}
    result |= look(training)
    print(json.dumps({**result, "by_piece_mib": by_piece(training)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
