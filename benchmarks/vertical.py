"""Steps of several micro-batches over a slow link: each loads for itself, or a group of them shares each load.

    python -m benchmarks.vertical [--rounds 6] [--keep]

One budget of vram for all, a layer more than the least for the largest group. As in ``benchmarks.link`` transfers are
throttled to a rate, at which the loads of a micro-batch that loads for itself take three times its compute. Steps of a
whole model, of one that streams for each micro-batch, and of ones whose groups share loads are timed in turn; the floor
of a grouped step is the whole one. What lanes cost is measured apart, where layers compute next to nothing. A table for
people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

import memplan
from benchmarks import overhead
from benchmarks.about import about, keep
from benchmarks.link import DEPTH, WIDTH, Throttled, build, loss_of, profile
from memplan.errors import DoesNotFitError

ACCUMULATION, LINK_SHARE, ROWS = 8, 3.0, 48
GROUPS = (2, 4, 8)
OF_WHOLE, FASTER, OF_PREDICTED, LANE_US = 1.10, 2.4, 1.05, 60.0


def step(model: nn.Module, batches: list[torch.Tensor], handle: memplan.Handle | None = None) -> float:
    """Return the seconds of a step's micro-batches."""

    def run(batch: torch.Tensor) -> None:
        loss_of(model(batch)).backward()

    began = time.perf_counter()
    if handle is None:
        for batch in batches:
            run(batch)
    else:
        handle.accumulate(run, batches)
    took = time.perf_counter() - began
    model.zero_grad()
    return took


def least_vram_bytes(model: nn.Module, shape: dict[str, torch.Tensor], options: dict[str, object]) -> int:
    """Return the least for the largest group."""
    try:
        memplan.plan(model, shape, hardware=profile(1.0, 1.0), vram=1, group=ACCUMULATION, **options)
    except DoesNotFitError as error:
        return error.least_vram_bytes or 0
    raise AssertionError("a byte is enough")


def in_turn(steps: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each, timed in turn, forwards and backwards, after a round that is not kept."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for turn in range(rounds + 1):
        for name in list(steps)[:: 1 if turn % 2 else -1]:
            took = steps[name]()
            if turn:
                times[name].append(took)
    return times


def compare(rounds: int) -> dict[str, dict[str, float]]:
    """Time whole, streamed and grouped steps, with the predictions beside."""
    batches = [torch.randn(ROWS, WIDTH) for _ in range(ACCUMULATION)]
    whole = build()
    options = {
        "ram": "4GiB", "loss": loss_of, "accumulation": ACCUMULATION, "activations": "keep",
        "pins": {str(i): "host" for i in range(DEPTH)},
    }  # fmt: skip
    shape = {"input": batches[0]}
    options["vram"] = least_vram_bytes(whole, shape, options) + sum(p.nbytes for p in whole[0].parameters())
    step(whole, batches)
    compute_s = statistics.median(step(whole, batches) for _ in range(3)) / ACCUMULATION
    unit = memplan.plan(whole, shape, hardware=profile(1.0, 1.0), **options)
    Throttled.bytes_per_s = unit.prediction.loaded_bytes_per_pass / (LINK_SHARE * compute_s)
    hardware = profile(unit.prediction.compute_s / compute_s, Throttled.bytes_per_s)
    steps: dict[str, Callable[[], float]] = {"whole": lambda: step(whole, batches)}
    handles, predicted = [], {"whole": compute_s * ACCUMULATION}
    for group in (1, *GROUPS):
        model, name = build(), f"groups of {group}" if group > 1 else "streamed"
        plan = memplan.plan(model, shape, hardware=hardware, group=group, **options)
        with mock.patch("memplan.run.modules.install.CpuTransfers", Throttled):
            handle = memplan.attach(model, plan)
        handles.append(handle)
        predicted[name] = plan.prediction.step_s
        steps[name] = lambda model=model, handle=handle: step(model, batches, handle)  # type: ignore[misc]
    times = in_turn(steps, rounds)
    loads = [handle.record.loads / (rounds + 1) for handle in handles]
    for handle in handles:
        handle.detach()
    drift = statistics.median(times["whole"]) / predicted["whole"]
    return {
        name: {
            "step_s": statistics.median(taken),
            "predicted_s": predicted[name],
            "loads": count,
            "of_whole": statistics.median(a / b for a, b in zip(taken, times["whole"], strict=True)),
            "faster": statistics.median(a / b for a, b in zip(times["streamed"], taken, strict=True)),
            "of_predicted": statistics.median(taken) / predicted[name],
            "drift": drift,
        }
        for (name, taken), count in zip(times.items(), [0.0, *loads], strict=True)
    }


def lanes_us(rounds: int) -> float:
    """Return what a lane costs beyond the triggers: microseconds a block, lane and sweep, of all threads."""
    model = overhead.build()
    batches = [torch.randn(overhead.ROWS, overhead.WIDTH) for _ in range(ACCUMULATION)]
    pins = {str(i): "host" for i in range(overhead.DEPTH)}
    options = {"vram": "4GiB", "ram": "4GiB", "loss": loss_of, "accumulation": ACCUMULATION, "activations": "keep"}
    plans = {
        group: memplan.plan(
            model, {"input": batches[0]}, hardware=profile(1e11, 1e12), group=group, pins=pins, **options
        )
        for group in (1, ACCUMULATION)
    }
    times: dict[int, list[float]] = {group: [] for group in plans}
    for turn in range(rounds + 1):
        for group, plan in plans.items():
            with memplan.attach(model, plan) as handle:
                step(model, batches, handle)
                began = time.process_time()
                step(model, batches, handle)
                if turn:
                    times[group].append(time.process_time() - began)
    sweeps = 2 * overhead.DEPTH * ACCUMULATION
    return (min(times[ACCUMULATION]) - min(times[1])) / sweeps * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = compare(options.rounds)
    lane_us = lanes_us(options.rounds)
    result = {
        "benchmark": "vertical",
        "accumulation": ACCUMULATION,
        "link_share": LINK_SHARE,
        "rows": rows,
        "lane_us": lane_us,
        "limits": {"of_whole": OF_WHOLE, "faster": FASTER, "of_predicted": OF_PREDICTED, "lane_us": LANE_US},
        "rounds": options.rounds,
    }
    table = Table(title=f"A step of {ACCUMULATION} micro-batches, loads {LINK_SHARE:g} times as long as compute")
    for column in ("", "step", "predicted", "loads", "of whole", "faster than streamed", "of predicted"):
        table.add_column(column, justify="right")
    for name, row in rows.items():
        table.add_row(
            name,
            *(f"{row[key]:.3f} s" for key in ("step_s", "predicted_s")),
            f"{row['loads']:.0f}",
            *(f"{row[key]:.3f}" for key in ("of_whole", "faster", "of_predicted")),
        )
    Console().print(table)
    print(f"a lane costs {lane_us:.0f} us a block and sweep")
    if options.keep:
        print(keep(result, "vertical"))
    print(json.dumps({**about(), **result}))
    best = rows[f"groups of {ACCUMULATION}"]
    good = best["of_whole"] <= OF_WHOLE and best["faster"] >= FASTER and best["of_predicted"] <= OF_PREDICTED
    return 0 if good and lane_us <= LANE_US else 1


if __name__ == "__main__":
    raise SystemExit(main())
