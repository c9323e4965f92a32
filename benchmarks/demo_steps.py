"""Step time under the demo's plan against the whole model's: interleaved pairs in one process.

    python -m benchmarks.demo_steps [--pairs 16] [--keep]

Both models are trained side by side, one step each in turn, so that a machine whose speed drifts slows both. The floor
is written first: the whole model's compute, and what the plan's loads take at the profile's rates. A table for people;
the last line is JSON, kept in ``benchmarks/results/`` with ``--keep``. Exits with 1 where the adapters differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from peft import get_peft_model
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import memplan
from benchmarks.about import about, keep
from memplan import demo
from memplan.hardware import machine


def build(checkpoint: Path) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    demo.align(model)
    torch.manual_seed(demo.SEED)
    return get_peft_model(model, demo.lora()).train()


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, batch: dict[str, torch.Tensor]) -> float:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return time.perf_counter()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=16)
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    pairs = options.pairs
    checkpoint = demo.make_checkpoint(machine.cache_folder() / "demo")
    plan = demo.make_plan(checkpoint, None)
    samples = demo.Samples(checkpoint, demo.BATCH)
    batch = {name: torch.stack([samples[i][name] for i in range(demo.BATCH)]) for name in samples[0]}

    models = {"whole": build(checkpoint), "planned": build(checkpoint)}
    handle = memplan.attach(models["planned"], plan)
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad]) for name, model in models.items()
    }
    times: dict[str, list[float]] = {"whole": [], "planned": []}
    for pair in range(pairs + 2):
        for name in ("whole", "planned") if pair % 2 else ("planned", "whole"):
            torch.manual_seed(pair)  # the same dropout for both
            began = time.perf_counter()
            ended = step(models[name], optimizers[name], batch)
            if pair >= 2:
                times[name].append(ended - began)
    record = handle.record
    ratio = statistics.median(b / a for a, b in zip(times["whole"], times["planned"], strict=True))
    loads = dict.fromkeys(("h2d", "disk"), 0)
    for stay in plan.residences:
        if stay.begins == "load" and stay.channel in loads:
            loads[stay.channel] += plan.items[stay.item].size_bytes
    whole_s = statistics.median(times["whole"])
    link_s = loads["h2d"] / plan.table.host_to_device_bytes_per_s
    disk_s = loads["disk"] / plan.table.disk_bytes_per_s
    table = Table(
        title=f"demo: {pairs} interleaved pairs, torch {torch.__version__}, {torch.get_num_threads()} threads"
    )
    for column in ("what", "seconds"):
        table.add_column(column, justify="right")
    table.add_row("floor: whole step", f"{whole_s:.3f}")
    table.add_row("floor: link", f"{link_s:.3f}")
    table.add_row("floor: disk", f"{disk_s:.3f}")
    table.add_row("planned step", f"{statistics.median(times['planned']):.3f}")
    table.add_row("of it stall", f"{record.stall_s:.3f}")
    table.add_row("ratio (median of pairs)", f"{ratio:.3f}")
    Console().print(table)
    equal = all(
        torch.equal(a, b)
        for a, b in zip(models["whole"].parameters(), models["planned"].parameters(), strict=True)
        if a.requires_grad
    )
    result = {
        "benchmark": "demo_steps",
        "ratio": ratio,
        "whole_s": whole_s,
        "planned_s": statistics.median(times["planned"]),
        "predicted_s": plan.prediction.step_s,
        "link_s": link_s,
        "disk_s": disk_s,
        "stall_s": record.stall_s,
        "misses": record.misses,
        "adapters_equal": equal,
        "pairs": pairs,
    }
    if options.keep:
        print(keep(result, "demo-steps"))
    print(json.dumps({**about(), **result}))
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
