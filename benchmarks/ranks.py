"""Whether a step of two ranks takes what the plan predicts, with throttled links and a throttled all-reduce.

    python -m benchmarks.ranks [--rounds 8] [--keep]

Two processes under DDP on gloo, each with a core. Loads are throttled as in ``benchmarks.link``; the all-reduce is
DDP's own, by a hook that lets no bucket be done before its bytes have passed at a set rate, one bucket after another.
Steps under the plan and whole ones take turns. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import memplan
from benchmarks.about import about, keep
from benchmarks.link import DEPTH, WIDTH, Layer, Throttled, loss_of, profile

ROWS, RANK = 96, 512
LIMIT = 0.10
CASES = {"link binds": (2.0, 0.5), "compute binds": (0.5, 1.5)}
"""What a layer's load takes of its sweep of compute, and what the all-reduce takes of a micro-batch's compute."""


class Network:
    """Sums buckets at a set rate, one after another."""

    def __init__(self) -> None:
        self.bytes_per_s = 1e12
        self._asked: queue.SimpleQueue[tuple[torch.Tensor, Any]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, daemon=True).start()

    def sum(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        self._asked.put((bucket.buffer(), future))
        return future

    def _serve(self) -> None:
        while True:
            buffer, future = self._asked.get()
            ends = time.perf_counter() + buffer.nbytes / self.bytes_per_s
            dist.all_reduce(buffer)
            buffer.div_(dist.get_world_size())
            time.sleep(max(0.0, ends - time.perf_counter()))
            future.set_result(buffer)


def build() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [Layer() for _ in range(DEPTH)]
    for layer in layers:
        layer.adapter, layer.back = nn.Linear(WIDTH, RANK, bias=False), nn.Linear(RANK, WIDTH, bias=False)
    return nn.Sequential(*layers)


def step(model: nn.Module, batch: torch.Tensor) -> float:
    dist.barrier()
    began = time.perf_counter()
    loss_of(model(batch)).backward()
    took = time.perf_counter() - began
    model.zero_grad(set_to_none=False)
    return took


def slowest(value: float) -> float:
    found = torch.tensor(value, dtype=torch.float64)
    dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return float(found)


def compare(batch: torch.Tensor, load: float, reduce: float, rounds: int) -> dict[str, Any]:
    """Time steps where a layer's load takes ``load`` of its sweep, and the all-reduce ``reduce`` of the compute."""
    whole, planned = build(), build()
    options: dict[str, Any] = {"ram": "4GiB", "loss": loss_of, "pins": {str(at): "host" for at in range(DEPTH)}}
    unit = memplan.plan(planned, {"input": batch}, hardware=profile(1.0, 1.0), vram="1GiB", **options)
    compute_s = slowest(statistics.median(step(whole, batch) for _ in range(4)))
    Throttled.bytes_per_s = unit.table.blocks[0].size_bytes / (load * compute_s / (2 * DEPTH))
    network, size_bytes = Network(), sum(p.nbytes for p in whole.parameters() if p.requires_grad)
    network.bytes_per_s = size_bytes / (reduce * compute_s)
    machine = profile(unit.prediction.compute_s / compute_s, Throttled.bytes_per_s)
    options |= {"hardware": machine, "nodes": 2, "network": network.bytes_per_s}
    plan = memplan.plan(planned, {"input": batch}, vram="320MiB", **options)
    with mock.patch("memplan.run.modules.install.CpuTransfers", Throttled):
        handle = memplan.attach(planned, plan)
    wrapped = {"whole": DistributedDataParallel(whole), "planned": DistributedDataParallel(planned)}
    for model in wrapped.values():
        model.register_comm_hook(network, lambda network, bucket: network.sum(bucket))
    times: dict[str, list[float]] = {name: [] for name in wrapped}
    for turn in range(rounds + 2):
        for name in list(times)[:: 1 if turn % 2 else -1]:
            took = slowest(step(wrapped[name], batch))
            if turn > 1:  # DDP makes its buckets anew after the first
                times[name].append(took)
    equal = all(torch.equal(a, b) for a, b in zip(_gradients(whole), _gradients(planned), strict=True))
    handle.detach()
    planned_s = statistics.median(times["planned"])
    return {
        "compute_s": compute_s,
        "predicted_s": plan.prediction.step_s,
        "reduce_s": plan.prediction.reduce_s,
        "planned_s": planned_s,
        "whole_s": statistics.median(times["whole"]),
        "of_predicted": planned_s / plan.prediction.step_s,
        "spread": (max(times["planned"]) - min(times["planned"])) / planned_s,
        "equal": equal,
    }


def _gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def of_rank(rank: int, store: str, rounds: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(rank)
    batch = torch.randn(ROWS, WIDTH)
    found = {name: compare(batch, load, reduce, rounds) for name, (load, reduce) in CASES.items()}
    dist.barrier()
    return found


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--keep", action="store_true")
    parser.add_argument("--rank", type=int)
    parser.add_argument("--store")
    options = parser.parse_args()
    if options.rank is not None:
        print(json.dumps(of_rank(options.rank, options.store, options.rounds)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.ranks", "--rounds", str(options.rounds)]
        command += ["--store", str(Path(folder) / "store"), "--rank"]
        running = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
        said = [process.communicate()[0] for process in running]
    if any(process.returncode for process in running):
        return 2
    cases = json.loads(said[0].strip().splitlines()[-1])
    table = Table(title="A step of two ranks over throttled links and a throttled all-reduce")
    keys = ("compute_s", "reduce_s", "predicted_s", "planned_s", "whole_s", "of_predicted", "spread", "equal")
    for column in ("", *keys):
        table.add_column(column.removesuffix("_s").replace("_", " "), justify="right")
    for name, row in cases.items():
        table.add_row(name, *(f"{row[key]:.3f}" if key != "equal" else str(row[key]) for key in keys))
    Console().print(table)
    result = {"benchmark": "ranks", "cases": cases, "limit": LIMIT, "rounds": options.rounds}
    if options.keep:
        print(keep(result, "ranks"))
    print(json.dumps({**about(), **result}))
    return int(any(abs(row["of_predicted"] - 1) > LIMIT or not row["equal"] for row in cases.values()))


if __name__ == "__main__":
    raise SystemExit(main())
