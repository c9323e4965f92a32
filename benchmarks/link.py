"""Whether a pass takes what the plan's timeline says, over a link of a known rate, and nothing where compute hides it.

    python -m benchmarks.link [--pairs 8] [--keep]

There is no link on a CPU: transfers here are throttled to a rate (a copy, then sleep until its time is over), so that
the floor is known; bare copies of as many bytes beside a whole pass tell what sharing the memory costs this machine.
The profile's compute rate is the whole run's, measured first; then the link is set so slow that it binds, and so fast
that it hides, and passes of both models are timed in turn. One thread computes; a core is left for the copies.
Everything is in RAM, nothing is read from disk. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from contextlib import nullcontext
from unittest import mock

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import memplan
from benchmarks.about import about, keep
from memplan.hardware.profile import Figure, HardwareProfile
from memplan.run.transfer.transfer import CpuTransfers

DEPTH, WIDTH, ROWS = 16, 640, 192
LINK_LIMIT, COMPUTE_LIMIT = 1.05, 1.03


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False).requires_grad_(False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False).requires_grad_(False)
        self.adapter = nn.Linear(WIDTH, 8, bias=False)
        self.back = nn.Linear(8, WIDTH, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + 0.1 * self.down(torch.relu(self.up(x))) + self.back(self.adapter(x))


class Throttled(CpuTransfers):
    """A channel that moves ``bytes_per_s``, whatever the memory could."""

    bytes_per_s = 1e9

    @classmethod
    def _fill(cls, source, destination) -> None:  # type: ignore[no-untyped-def, override]
        ends = time.perf_counter() + destination.nbytes / cls.bytes_per_s
        CpuTransfers._fill(source, destination)
        time.sleep(max(0.0, ends - time.perf_counter()))


def build() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(Layer() for _ in range(DEPTH)))


def loss_of(y: torch.Tensor) -> torch.Tensor:
    return y.square().mean()


def one_pass(model: nn.Module, batch: torch.Tensor) -> float:
    began = time.perf_counter()
    loss_of(model(batch)).backward()
    took = time.perf_counter() - began
    model.zero_grad()
    return took


class Copier:
    """Bare copies of as many bytes at the same rate beside a whole pass: what a machine of shared memory takes for
    them.
    """

    def __init__(self, size_bytes: int, loads: int, bytes_per_s: float) -> None:
        self._source, self._slots = np.ones(size_bytes, np.uint8), np.ones((2, size_bytes), np.uint8)
        self._loads, self._bytes_per_s = loads, bytes_per_s

    def _copy(self) -> None:
        for load in range(self._loads):
            ends = time.perf_counter() + self._source.nbytes / self._bytes_per_s
            np.copyto(self._slots[load % 2], self._source)
            time.sleep(max(0.0, ends - time.perf_counter()))

    def __enter__(self) -> None:
        self._thread = threading.Thread(target=self._copy)
        self._thread.start()

    def __exit__(self, *error: object) -> None:
        self._thread.join()


def profile(flops_per_s: float, bytes_per_s: float) -> HardwareProfile:
    def figure(value: float) -> Figure:
        return Figure(value=value, kind="measured", source="benchmarks.link", date="2026-11-24")

    many = figure(1e15)
    return HardwareProfile(
        schema_version=1, name="throttled", description="compute as measured, a link of a set rate", device="cpu",
        device_bytes=figure(2**34), host_bytes=figure(2**34), matmul_flops_per_s={"float32": figure(flops_per_s)},
        memory_bytes_per_s=many, host_to_device_bytes_per_s=figure(bytes_per_s),
        device_to_host_bytes_per_s=figure(bytes_per_s), disk_bytes_per_s=many, launch_s=figure(0.0),
        load_latency_s=figure(0.0), context_bytes=figure(0.0),
    )  # fmt: skip


def compare(batch: torch.Tensor, share: float, pairs: int) -> dict[str, float]:
    """Time passes with a link on which a layer takes ``share`` of a layer's sweep of compute."""
    whole, planned = build(), build()
    options = {"vram": "80MiB", "ram": "4GiB", "loss": loss_of, "pins": {str(i): "host" for i in range(DEPTH)}}
    unit = memplan.plan(planned, {"input": batch}, hardware=profile(1.0, 1.0), **options)
    compute_s = statistics.median(one_pass(whole, batch) for _ in range(6))
    layer_bytes = unit.table.blocks[0].size_bytes
    Throttled.bytes_per_s = layer_bytes / (share * compute_s / (2 * DEPTH))
    flops_per_s = unit.prediction.compute_s / compute_s
    plan = memplan.plan(planned, {"input": batch}, hardware=profile(flops_per_s, Throttled.bytes_per_s), **options)
    times: dict[str, list[float]] = {"whole": [], "beside copies": [], "planned": []}
    copier = Copier(layer_bytes, plan.prediction.loads_per_pass, Throttled.bytes_per_s)
    with mock.patch("memplan.run.modules.install.CpuTransfers", Throttled):
        handle = memplan.attach(planned, plan)
    for pair in range(pairs + 1):
        for name in list(times)[:: 1 if pair % 2 else -1]:
            with copier if name == "beside copies" else nullcontext():
                took = one_pass(planned if name == "planned" else whole, batch)
            if pair:
                times[name].append(took)
    record = handle.record
    handle.detach()
    whole_s, planned_s = statistics.median(times["whole"]), statistics.median(times["planned"])
    beside = times["beside copies"]
    drift = whole_s / compute_s
    return {
        "share": share,
        "whole_s": whole_s,
        "planned_s": planned_s,
        "predicted_s": plan.prediction.pass_s,
        "bound_s": plan.prediction.bound_s,
        "link_s": plan.prediction.loaded_bytes_per_pass / Throttled.bytes_per_s,
        "of_whole": statistics.median(p / w for p, w in zip(times["planned"], times["whole"], strict=True)),
        "of_beside_copies": statistics.median(p / w for p, w in zip(times["planned"], beside, strict=True)),
        "beside_copies_s": statistics.median(beside),
        "of_predicted": planned_s / plan.prediction.pass_s,
        "drift": drift,
        "stall_s": record.stall_s,
        "loads_per_pass": record.loads / max(1, record.passes),
    }


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=8)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    batch = torch.randn(ROWS, WIDTH)
    link, compute = compare(batch, 2.0, options.pairs), compare(batch, 0.5, options.pairs)
    result = {
        "benchmark": "link",
        "link_bound": link,
        "compute_bound": compute,
        "limits": {"of_predicted": LINK_LIMIT, "of_whole": COMPUTE_LIMIT},
        "pairs": options.pairs,
    }
    table = Table(title=f"{DEPTH} layers streamed over a throttled link")
    columns = (
        "compute",
        "beside copies",
        "link",
        "predicted",
        "planned",
        "of predicted",
        "of whole",
        "of beside copies",
    )
    for column in ("", *columns):
        table.add_column(column, justify="right")
    for name, row in (("link binds", link), ("compute binds", compute)):
        table.add_row(
            name,
            *(f"{row[key]:.3f} s" for key in ("whole_s", "beside_copies_s", "link_s", "predicted_s", "planned_s")),
            *(f"{row[key]:.3f}" for key in ("of_predicted", "of_whole", "of_beside_copies")),
        )
    Console().print(table)
    if options.keep:
        print(keep(result, "link"))
    print(json.dumps({**about(), **result}))
    return 0 if link["of_predicted"] <= LINK_LIMIT and compute["of_whole"] <= COMPUTE_LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
