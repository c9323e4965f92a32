"""Plans of real models beside the bound: how far each is from what any plan could do, and how long it takes to find it.

    python -m benchmarks.place [--only TEXT] [--graphs FOLDER] [--elastic] [--keep]

Models (from shapes alone) x dtypes x cards x tokens x budgets from the least feasible to all. ``bound``: the window bound at
the plan's granularity, room as it is at each access. ``--graphs``: where analyses are kept from one run to the next.
``one arena``: the same bound where the room is that of the
access with the least. ``all kept``, ``all recomputed``: the same solver without that choice.
A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep
from memplan import hardware
from memplan.analyze.graph import LayerGraph
from memplan.cost.build import cost_table
from memplan.cost.table import CostTable
from memplan.errors import DoesNotFitError
from memplan.place.bound import window_bound
from memplan.place.problem import Memory, make_problem
from memplan.place.solve import place
from memplan.program.schema import Budgets, Plan, Workload
from memplan.program.timeline import durations

MODELS = {
    "llama-3.1-8b": ("", "nf4"),
    "qwen3-14b": ("", "nf4"),
    "llama-3.1-70b": ("", "nf4"),
    "llama-3.1-405b": ("", "nf4"),
    "mixtral-8x7b": ("", "nf4"),
    "flan-t5-xxl": ("",),
    "flux": ("",),
}
"""Names, and their quantizations; the others' weights are bfloat16."""
CARDS = ("rtx-4060-ti-16gb", "rtx-4090", "h100-80gb")
SHAPES = ((1, 2048), (4, 2048))
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Budgets: from the least that works to what holds everything."""
RAM_BYTES = 2 << 40


def graph_of(name: str, quantization: str, shape: tuple[int, int], folder: Path | None) -> LayerGraph:
    """Return the analysis of a model, from ``folder`` where it lies there."""
    path = None if folder is None else folder / f"{name}-{quantization or 'bf16'}-{shape[0]}x{shape[1]}.json"
    if path is not None and path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=LayerGraph)
    from memplan.analyze.adapters import prepare
    from memplan.analyze.extend import NotPeriodicError
    from memplan.analyze.trace import analyze

    lora = {"rank": 16, "targets": "all-linear"}
    if name == "flux":
        model, batch = flux(shape[0])
        prepared = prepare(model, adapter=lora)
        graph = analyze(prepared.model, batch, name="flux", loss=lambda out: out[0].float().pow(2).mean())
    else:
        given = {"adapter": lora, "dtype": "bfloat16", "quantization": quantization or None}
        prepared = prepare(name, **given, short=True)
        try:
            graph = analyze(prepared.model, shape, runs=prepared.runs, name=name, short=prepared.short)
        except NotPeriodicError:  # T5's first layer is not like the others
            graph = analyze(prepare(name, **given).model, shape, name=name)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(msgspec.json.encode(graph))
    return graph


def flux(rows: int) -> tuple[Any, dict[str, Any]]:
    """Return a transformer of FLUX.1's shape on ``meta``, and a batch of images of 1024 x 1024."""
    import torch
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
            joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
        ).to(torch.bfloat16)  # fmt: skip
    kind = {"dtype": torch.bfloat16}
    return model, {
        "hidden_states": torch.zeros(rows, 4096, 64, **kind),
        "encoder_hidden_states": torch.zeros(rows, 512, 4096, **kind),
        "pooled_projections": torch.zeros(rows, 768, **kind),
        "timestep": torch.zeros(rows, **kind),
        "guidance": torch.zeros(rows, **kind),
        "img_ids": torch.zeros(4096, 3, **kind),
        "txt_ids": torch.zeros(512, 3, **kind),
    }


def least_and_whole(table: CostTable, **names: Any) -> tuple[int, int]:
    """Return the least vram that works, and the least that holds everything with all activations kept."""
    try:
        place(table, Budgets(vram_bytes=1, ram_bytes=RAM_BYTES, disk_bytes=0), **names)
    except DoesNotFitError as error:
        least = error.least_vram_bytes or 0
    peak = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    return least, peak + sum(-(-block.size_bytes // 512) * 512 for block in table.blocks)


def one_arena_bound_s(plan: Plan) -> float:
    """Return the window bound in s of plans whose arena is as large all along the pass as it can be where room is least."""
    policies = plan.policies()
    problem = make_problem(plan.table, plan.budgets, 0, {}, policies)
    nonweight = Memory(plan.table).at(policies) + problem.saves.device_bytes
    times = durations(plan.table, policies)
    found = window_bound(problem, times, np.full_like(nonweight, nonweight.max()), disk_used=False)
    return max(found, sum(times))


def alone_s(table: CostTable, budgets: Budgets, how: str, names: dict[str, Any]) -> float | None:
    """Return the pass in s with all activations kept, or all recomputed; None where that does not fit."""
    try:
        return place(table, budgets, activations=dict.fromkeys(table.recomputable, how), **names).prediction.pass_s
    except DoesNotFitError:
        return None


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="models whose name holds this")
    options.add_argument("--graphs", type=Path, help="folder in which analyses are kept")
    options.add_argument(
        "--elastic", action="store_true", help="plans whose device arena gives bytes back for part of a pass"
    )
    options.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    rows: list[dict[str, Any]] = []
    shown = Table(
        "model", "dtype", "card", "tokens", "vram GiB", "pass s", "gap", "one arena", "solved s", "blocks", box=None
    )
    for name, kinds in MODELS.items():
        for quantization in kinds:
            for shape in SHAPES:
                case = f"{name} {quantization or 'bf16'} {shape[0] * shape[1]}"
                if given.only not in case:
                    continue
                graph = graph_of(name, quantization, shape, given.graphs)
                workload = Workload(
                    batch={"input_ids": shape}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="LoRA"
                )
                for card in CARDS:
                    table = cost_table(graph, hardware.load(card))
                    names = {"model": name, "fingerprint": graph.fingerprint, "workload": workload, "hardware": card}
                    least, whole = least_and_whole(table, **names)
                    for share in SHARES:
                        vram = int(least + share * (whole - least))
                        budgets = Budgets(vram_bytes=vram, ram_bytes=RAM_BYTES, disk_bytes=0)
                        began = time.perf_counter()
                        plan = place(table, budgets, elastic=given.elastic, **names)
                        took = time.perf_counter() - began
                        said = plan.prediction
                        gap = said.pass_s / said.bound_s - 1
                        flat_s = one_arena_bound_s(plan)
                        alone = {how: alone_s(table, budgets, how, names) for how in ("keep", "recompute")}
                        rows.append(
                            {
                                "model": name, "dtype": quantization or "bf16", "card": card, "tokens": graph.tokens,
                                "share": share, "vram_bytes": vram, "pass_s": said.pass_s, "bound_s": said.bound_s,
                                "compute_s": said.compute_s, "gap": gap, "solved_s": took,
                                "one_arena_bound_s": flat_s, "loads": said.loads_per_pass,
                                "all_kept_s": alone["keep"], "all_recomputed_s": alone["recompute"],
                                "layers": sum(block.kind == "layer" for block in table.blocks),
                                "blocks": len(plan.table.blocks),
                                "recomputed": sum(p.activations == "recompute" for p in plan.activations),
                                "offloaded": sum(p.activations == "offload" for p in plan.activations),
                            }
                        )  # fmt: skip
                        cells = [name, quantization or "bf16", card, str(graph.tokens), f"{vram / 2**30:.1f}",
                                 f"{said.pass_s:.3f}", f"{gap:.2%}", f"{said.pass_s / flat_s - 1:.2%}", f"{took:.2f}", str(len(plan.table.blocks)),
                                 str(rows[-1]["recomputed"])]  # fmt: skip
                        shown.add_row(*cells[:-1])
                        print(*cells, file=sys.stderr, flush=True)
    Console().print(shown)
    gaps = [row["gap"] for row in rows]
    flat = [row["pass_s"] / row["one_arena_bound_s"] - 1 for row in rows]
    both = [
        min(row["all_kept_s"], row["all_recomputed_s"]) / row["pass_s"] - 1
        for row in rows
        if row["loads"] and row["all_kept_s"] and row["all_recomputed_s"]
    ]
    neither = sum(row["all_kept_s"] is None and row["all_recomputed_s"] is None for row in rows)
    result = {
        "benchmark": "place", "elastic": given.elastic, "cases": len(rows), "median": statistics.median(gaps), "worst": max(gaps),
        "slowest_s": max(row["solved_s"] for row in rows),
        "one_arena_median": statistics.median(flat), "one_arena_worst": max(flat),
        "joint_cases": len(both), "joint_gain_median": statistics.median(both) if both else None,
        "only_joint_fits": neither,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, "rows": rows,
    }  # fmt: skip
    print(
        f"one arena: median {result['one_arena_median']:.2%}, worst {result['one_arena_worst']:.2%}; chosen together against the "
        f"better of all kept and all recomputed, in {len(both)} cases: {result['joint_gain_median'] or 0:.1%} in the median"
    )
    print(f"gap: median {result['median']:.2%}, worst {result['worst']:.2%}; slowest {result['slowest_s']:.2f} s")
    if given.keep:
        print(keep(result, "place"))
    print(json.dumps({**about(), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
