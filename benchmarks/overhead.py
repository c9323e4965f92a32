"""What memplan's own Python costs: seconds a block and sweep, where there is next to nothing to compute or to move.

    python -m benchmarks.overhead [--pairs 30] [--keep]

A deep stack of small layers, each streamed from RAM through two slots, against the same model held whole: steps in
turn. What a step takes longer, over its blocks and their two sweeps, is hooks, bookkeeping, pointing, and the hand-over
to the thread that copies. The floor is zero; 150 µs is the most that is accepted. Beside it what others' work on
the machine changes less: the time of the computing thread alone, and how many calls memplan's own code makes. A table
for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from types import FrameType

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import memplan
from benchmarks.about import about, keep

DEPTH, WIDTH, ROWS = 64, 96, 8
LIMIT_US = 150.0


class Layer(nn.Module):
    """Nine frozen tensors, as a decoder layer has, and a trained one."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(9))
        self.adapter = nn.Linear(WIDTH, WIDTH, bias=False)
        self.parts.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for part in self.parts:
            y = part(y)
        return x + y + self.adapter(x)


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(DEPTH)))


def step(model: nn.Module, batch: torch.Tensor) -> tuple[float, float]:
    """Return the seconds that forward and backward took, and those of this thread."""
    began, of_thread = time.perf_counter(), time.thread_time()
    model(batch).square().mean().backward()
    took = time.perf_counter() - began, time.thread_time() - of_thread
    model.zero_grad()
    return took


def planned(model: nn.Module, batch: torch.Tensor) -> memplan.Plan:
    """Return the plan that has every layer in RAM."""
    pins = {str(index): "host" for index in range(DEPTH)}
    return memplan.plan(model, {"input": batch}, vram="1GiB", ram="1GiB", pins=pins, loss=lambda y: y.square().mean())


def calls_of(model: nn.Module, batch: torch.Tensor) -> Counter[str]:
    """Return how many functions memplan's code calls in a step, by ``call`` (those of Python) and ``c_call``."""
    package, found = memplan.__file__.removesuffix("__init__.py"), Counter[str]()

    def count(frame: FrameType, event: str, _: object) -> None:
        if frame.f_code.co_filename.startswith(package):
            found[event] += 1

    sys.setprofile(count)
    try:
        model(batch).square().mean().backward()
    finally:
        sys.setprofile(None)
    model.zero_grad()
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = torch.randn(ROWS, WIDTH)
    whole, streaming = build(), build()
    plan = planned(streaming, batch)
    streamed = sum(item.home == "host" for item in plan.items)
    tensors = sum(len(block.tensors) for block in plan.table.blocks)
    handle = memplan.attach(streaming, plan)
    times: dict[str, list[float]] = {"whole": [], "planned": []}
    of_thread: dict[str, list[float]] = {"whole": [], "planned": []}
    for pair in range(options.pairs + 3):
        for name, model in (("whole", whole), ("planned", streaming))[:: 1 if pair % 2 else -1]:
            took, thread = step(model, batch)
            if pair >= 3:
                times[name].append(took)
                of_thread[name].append(thread)
    record = handle.record
    calls = calls_of(streaming, batch)
    handle.detach()
    extra = [p - w for p, w in zip(times["planned"], times["whole"], strict=True)]
    each_us = [1e6 * e / (2 * streamed) for e in extra]
    least = {name: statistics.quantiles(found, n=20)[0] for name, found in of_thread.items()}
    result = {
        "benchmark": "overhead",
        "blocks": streamed,
        "tensors": tensors,
        "pairs": options.pairs,
        "whole_s": statistics.median(times["whole"]),
        "planned_s": statistics.median(times["planned"]),
        "us_a_block_and_sweep": statistics.median(each_us),
        "thread_us_a_block_and_sweep": 1e6 * (least["planned"] - least["whole"]) / (2 * streamed),
        "python_calls_a_block_and_sweep": calls["call"] / (2 * streamed),
        "c_calls_a_block_and_sweep": calls["c_call"] / (2 * streamed),
        "limit_us": LIMIT_US,
        "misses": record.misses,
    }
    table = Table("", "median", title=f"{streamed} blocks of {tensors // streamed} tensors, two sweeps")
    table.add_row("whole step", f"{1e3 * result['whole_s']:.2f} ms")
    table.add_row("planned step", f"{1e3 * result['planned_s']:.2f} ms")
    table.add_row("a block and sweep", f"{result['us_a_block_and_sweep']:.0f} µs (at most {LIMIT_US:.0f})")
    table.add_row("of it this thread's, least", f"{result['thread_us_a_block_and_sweep']:.0f} µs")
    table.add_row(
        "calls in Python, in C", f"{calls['call'] / (2 * streamed):.0f}, {calls['c_call'] / (2 * streamed):.0f}"
    )
    Console().print(table)
    if options.keep:
        print(keep(result, "overhead"))
    print(json.dumps({**about(), **result}))
    return 0 if result["us_a_block_and_sweep"] <= LIMIT_US else 1


if __name__ == "__main__":
    raise SystemExit(main())
