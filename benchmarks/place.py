"""Plans of real models beside the bound: how far each is from what any plan could do, and how long it takes to find it.

    python -m benchmarks.place [--only TEXT] [--tokens N] [--graphs FOLDER] [--elastic] [--tight [--parts]] [--keep]
    python -m benchmarks.place --ablate FILE [--every N] [--only TEXT] [--graphs FOLDER] [--keep]

Models (from shapes alone) x dtypes x cards x tokens x budgets from the least feasible to all. ``bound``: the window
bound at the plan's granularity, room as it is at each access. ``--graphs``: where analyses are kept from one run to the
next. ``one arena``: the same bound where the room is that of the access with the least. ``all kept``, ``all
recomputed``: the same solver without that choice. Cases in which the bound is within 2% of the compute ("compute
hides") are counted apart from the others ("the link binds"): of the former nearly any plan is near the bound.
``--tight``: the budgets of ``TIGHT`` alone, in which little fits; ``--parts``: with layers in parts. ``joint``: the
same solver with the choice of offloading too; for it there are budgets besides from where both of those fit to all, and
two at and above the least that works with it where nothing else fits. A table for people; the last line is JSON.
``--ablate``: see ``benchmarks/ablation.py``.
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
from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep
from memplan.analyze.graph import Activations, LayerGraph
from memplan.cost.build import cost_table
from memplan.cost.table import CostTable
from memplan.errors import DoesNotFitError
from memplan.hardware import profile as profiles
from memplan.place.bound import window_bound
from memplan.place.min_vram import least_vram_bytes
from memplan.place.problem import Memory, make_problem
from memplan.place.solve import place
from memplan.program.schema import Budgets, Plan, Prediction, Workload
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
LONG = {"llama-3.1-8b": (1, 8192), "qwen3-14b": (1, 8192)}
"""A sequence besides in which activations matter more."""
SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
"""Budgets: from the least that works to what holds everything."""
TIGHT = {
    "llama-3.1-8b": (6, 9),
    "llama-3.1-70b": (16, 24, 40, 60, 80),
    "mixtral-8x7b": (12, 24, 40, 60),
    "llama-3.1-405b": (22,),
}
"""Budgets in GiB besides, for bfloat16 weights: mostly the link binds there."""
TIGHT_SHAPES = ((1, 1024), (1, 2048))
HIDDEN = 1.02
"""Up to this bound beside the compute, compute hides the link."""
BOTH_SHARES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)
"""Budgets for the joint choice: from the least in which all kept and all recomputed both fit to what holds everything.
"""
ALONE: tuple[Activations, ...] = ("keep", "recompute")
RAM_BYTES = 2 << 40


def graph_of(
    name: str, quantization: str, shape: tuple[int, int], folder: Path | None, *, parts: bool = False
) -> LayerGraph:
    """Return the analysis of a model, from ``folder`` where it lies there. ``parts``: with its layers in parts."""
    path = (
        None
        if folder is None
        else folder / f"{'parts-' * parts}{name}-{quantization or 'bf16'}-{shape[0]}x{shape[1]}.json"
    )
    if path is not None and path.is_file():
        return msgspec.json.decode(path.read_bytes(), type=LayerGraph)
    from memplan.analyze.inputs.prepare import prepare
    from memplan.analyze.repeat.unroll import NotPeriodicError
    from memplan.analyze.trace.trace import analyze

    lora = {"rank": 16, "targets": "all-linear"}
    if name == "flux":
        model, batch = flux(shape[0])
        prepared = prepare(model, adapter=lora)
        graph = analyze(
            prepared.model, batch, name="flux", offload="try", loss=lambda out: out[0].float().pow(2).mean()
        )
    else:
        given = {"adapter": lora, "dtype": "bfloat16", "quantization": quantization or None}
        prepared = prepare(name, **given, short_for=shape)
        try:
            graph = analyze(
                prepared.model, shape, runs=prepared.runs, name=name, short=prepared.short, offload="try", parts=parts
            )
        except NotPeriodicError:  # T5's first layer is not like the others
            graph = analyze(prepare(name, **given).model, shape, name=name, offload="try", parts=parts)
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


def least_and_whole(table: CostTable) -> tuple[int, int]:
    """Return the least vram that works, and the least that holds everything with all activations kept."""
    least = least_vram_bytes(table, Budgets(vram_bytes=1, ram_bytes=RAM_BYTES, disk_bytes=0)) or 0
    peak = max(table.device_bytes_at(access.index, {}) for access in table.accesses)
    return least, peak + sum(-(-block.size_bytes // 512) * 512 for block in table.blocks)


def without_offload(table: CostTable) -> CostTable:
    """Return the table as of a look that did not ask what offloading would move."""
    return replace(table, accesses=tuple(replace(access, offload_bytes=0) for access in table.accesses))


def one_arena_bound_s(plan: Plan) -> float:
    """Return the window bound in s of plans whose arena is as large all along the pass as it can be where room is
    least.
    """
    policies = plan.policies()
    problem = make_problem(plan.table, plan.budgets, 0, {}, policies)
    nonweight = Memory(plan.table).at(policies) + problem.saves.device_bytes
    times = durations(plan.table, policies)
    found = window_bound(problem, times, np.full_like(nonweight, nonweight.max()), disk_used=False)
    return max(found, sum(times))


def pass_s(
    table: CostTable, vram_bytes: int, names: dict[str, Any], how: Activations | None = None
) -> Prediction | None:
    """Return what a pass takes with the activations of all layers as ``how``, or as is fastest; None where it does not
    fit.
    """
    asked = {} if how is None else dict.fromkeys(table.recomputable, how)
    within = Budgets(vram_bytes=vram_bytes, ram_bytes=RAM_BYTES, disk_bytes=0)
    try:
        return place(table, within, activations=asked, **names).prediction
    except DoesNotFitError:
        return None


def joint_budgets(table: CostTable, plain: CostTable, whole: int) -> list[int]:
    """Return the budgets of vram in bytes at which the joint choice is looked at. ``plain``: the table without
    offloading.
    """
    within = Budgets(vram_bytes=0, ram_bytes=RAM_BYTES, disk_bytes=0)

    def least(of: CostTable, how: Activations | None = None) -> int:
        asked = {} if how is None else dict.fromkeys(of.recomputable, how)
        return least_vram_bytes(of, within, activations=asked) or whole

    kept, recomputed, joint = least(plain, "keep"), least(plain, "recompute"), least(table)
    both, either = max(kept, recomputed), min(kept, recomputed)
    beyond = [joint, (joint + either) // 2] if joint < either else []
    return beyond + [int(both + share * (whole - both)) for share in BOTH_SHARES]


def joint_rows(table: CostTable, plain: CostTable, whole: int, names: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a pass of the joint choice at each of its budgets, and of what it is held against."""
    rows = []
    for vram in joint_budgets(table, plain, whole):
        began = time.perf_counter()
        joint = pass_s(table, vram, names)
        took = time.perf_counter() - began
        others = {how: pass_s(plain, vram, names, how) for how in ALONE}
        either = pass_s(plain, vram, names)
        rows.append(
            {
                "vram_bytes": vram, "solved_s": took, "joint_s": joint and joint.pass_s,
                "loads": joint.loads_per_pass if joint else 0,
                "stores_bytes": joint.offloaded_bytes_per_pass if joint else 0,
                "without_offload_s": either and either.pass_s,
                "streams": any(said and said.loads_per_pass for said in (joint, either, *others.values())),
                "all_kept_s": others["keep"] and others["keep"].pass_s,
                "all_recomputed_s": others["recompute"] and others["recompute"].pass_s,
            }
        )  # fmt: skip
    return rows


def joint_summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how much longer the better of all kept and all recomputed takes than the joint choice, in the median, over
    the budgets where something streams and both fit; and at how many only the joint choice fits.
    """
    both = [row for row in rows if row["streams"] and row["all_kept_s"] and row["all_recomputed_s"] and row["joint_s"]]
    gains = [min(row["all_kept_s"], row["all_recomputed_s"]) / row["joint_s"] - 1 for row in both]
    return {
        "budgets": len(rows), "cases": len(both), "gain_median": statistics.median(gains) if gains else None,
        "gain_over_5_percent": sum(gain >= 0.05 for gain in gains), "gain_most": max(gains, default=None),
        "gain_least": min(gains, default=None),
        "neither_fits": sum(not row["all_kept_s"] and not row["all_recomputed_s"] for row in rows),
        "only_joint_fits": sum(
            bool(row["joint_s"]) and not row["all_kept_s"] and not row["all_recomputed_s"] for row in rows
        ),
        "only_offload_fits": sum(bool(row["joint_s"]) and not row["without_offload_s"] for row in rows),
    }  # fmt: skip


def by_bound(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how far the plans are above the bound: where compute hides the link, and where the link binds."""
    found = {}
    for label, binds in (("compute_hides", False), ("link_binds", True)):
        of = [row for row in rows if (row["bound_s"] > HIDDEN * row["compute_s"]) == binds]
        gaps = sorted(row["gap"] for row in of)
        found[label] = {
            "cases": len(of),
            "median": statistics.median(gaps) if gaps else None,
            "nine_in_ten": gaps[-(-9 * len(gaps) // 10) - 1] if gaps else None,
            "worst": max(gaps, default=None),
            "slowest_s": max((row["solved_s"] for row in of), default=None),
        }
    return found


def print_by_bound(split: dict[str, dict[str, Any]]) -> None:
    """Print the two columns."""
    shown = Table("gap to the bound", *(label.replace("_", " ") for label in split), box=None)
    for figure in ("cases", "median", "nine_in_ten", "worst", "slowest_s"):
        cells = ["-" if of[figure] is None else f"{of[figure]:{FIGURES.get(figure, '.2%')}}" for of in split.values()]
        shown.add_row(figure.replace("_", " "), *cells)
    Console().print(shown)


FIGURES = {"cases": "d", "slowest_s": ".2f"}
"""How figures that are no shares are written."""


def one_row(
    table: CostTable, share: float | None, vram: int, names: dict[str, Any], labels: dict[str, Any], elastic: bool
) -> dict[str, Any]:
    """Return a plan's figures; where nothing fits in ``vram``, ``gap`` is None."""
    budgets = Budgets(vram_bytes=vram, ram_bytes=RAM_BYTES, disk_bytes=0)
    began = time.perf_counter()
    row = labels | {
        "share": share, "vram_bytes": vram, "gap": None, "blocks": len(table.blocks), "recomputed": 0,
        "layers": sum(block.kind == "layer" for block in table.blocks),
    }  # fmt: skip
    try:
        plan = place(table, budgets, elastic=elastic, **names)
    except DoesNotFitError:
        return row | {"solved_s": time.perf_counter() - began}
    took = time.perf_counter() - began
    said = plan.prediction
    return row | {
        "pass_s": said.pass_s, "bound_s": said.bound_s, "compute_s": said.compute_s,
        "gap": said.pass_s / said.bound_s - 1, "solved_s": took, "one_arena_bound_s": one_arena_bound_s(plan),
        "loads": said.loads_per_pass, "blocks": len(plan.table.blocks),
        "recomputed": sum(p.activations == "recompute" for p in plan.activations),
    }  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--only", default="", help="models whose name holds this")
    options.add_argument("--tokens", type=int, help="passes of so many tokens alone")
    options.add_argument("--graphs", type=Path, help="folder in which analyses are kept")
    options.add_argument(
        "--elastic", action="store_true", help="plans whose device arena gives bytes back for part of a pass"
    )
    options.add_argument("--tight", action="store_true", help="the budgets in which little fits alone")
    options.add_argument("--parts", action="store_true", help="with --tight: layers in parts")
    options.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    options.add_argument("--ablate", type=Path, help="leave out each generator in turn; the file that keeps results")
    options.add_argument("--every", type=int, default=1, help="with --ablate: every so many-th case alone")
    given = options.parse_args()
    if given.parts and not given.tight:
        options.error("--parts is for --tight alone")
    warnings.simplefilter("ignore")
    if given.ablate is not None:
        from benchmarks.ablation import ablate

        ablate(given.graphs, given.only, given.ablate, given.every, kept=given.keep)
        return 0
    rows: list[dict[str, Any]] = []
    joint: list[dict[str, Any]] = []
    shown = Table(
        "model", "dtype", "card", "tokens", "vram GiB", "pass s", "gap", "one arena", "solved s", "blocks", box=None
    )
    for name, kinds in MODELS.items():
        for quantization in kinds:
            usual = () if given.tight else (*SHAPES, *([LONG[name]] if name in LONG else []))
            tight = () if quantization else tuple(gib << 30 for gib in TIGHT.get(name, ()))
            for shape in dict.fromkeys((*usual, *(TIGHT_SHAPES if tight else ()))):
                case = f"{name} {quantization or 'bf16'}"
                if given.only not in case or given.tokens not in (None, shape[0] * shape[1]):
                    continue
                graph = graph_of(name, quantization, shape, given.graphs, parts=given.parts)
                workload = Workload(
                    batch={"input_ids": shape}, tokens=graph.tokens, accumulation=1, optimizer="adamw", adapter="LoRA"
                )
                for card in CARDS:
                    with_offload = cost_table(graph, profiles.load(card))
                    table = without_offload(with_offload)
                    names = {"model": name, "fingerprint": graph.fingerprint, "workload": workload, "hardware": card}
                    least, whole = least_and_whole(table)
                    labels = {
                        "model": name,
                        "dtype": quantization or "bf16",
                        "card": card,
                        "tokens": graph.tokens,
                        "rows": shape[0],
                        "least_vram_bytes": least,
                    }
                    asked: list[tuple[float | None, int]] = []
                    if shape in usual:
                        joint += [labels | row for row in joint_rows(with_offload, table, whole, names)]
                        asked += [(share, int(least + share * (whole - least))) for share in SHARES]
                    if shape in TIGHT_SHAPES:
                        asked += [(None, vram) for vram in tight]
                    for share, vram in asked:
                        rows.append(one_row(table, share, vram, names, labels, given.elastic))
                        row = rows[-1]
                        cells = [
                            name,
                            quantization or "bf16",
                            card,
                            str(graph.tokens),
                            f"{vram / 2**30:.1f}",
                            "-" if row["gap"] is None else f"{row['pass_s']:.3f}",
                            "does not fit" if row["gap"] is None else f"{row['gap']:.2%}",
                            "-" if row["gap"] is None else f"{row['pass_s'] / row['one_arena_bound_s'] - 1:.2%}",
                            f"{row['solved_s']:.2f}",
                            str(row["blocks"]),
                            str(row["recomputed"]),
                            f"least {least / 2**30:.2f} GiB",
                        ]
                        shown.add_row(*cells[:-2])
                        print(*cells, file=sys.stderr, flush=True)
    Console().print(shown)
    fitting = [row for row in rows if row["gap"] is not None]
    gaps = [row["gap"] for row in fitting]
    flat = [row["pass_s"] / row["one_arena_bound_s"] - 1 for row in fitting]
    split = by_bound(fitting)
    kinds_of = sorted({(row["rows"], row["tokens"] // row["rows"]) for row in joint})
    by_shape = {
        f"{count}x{length}": joint_summary(
            [r for r in joint if (r["rows"], r["tokens"] // r["rows"]) == (count, length)]
        )
        for count, length in kinds_of
    }
    result = {
        "benchmark": "place",
        "elastic": given.elastic,
        "parts": given.parts,
        "cases": len(fitting),
        "does_not_fit": len(rows) - len(fitting),
        **split,
        "median": statistics.median(gaps),
        "worst": max(gaps),
        "slowest_s": max(row["solved_s"] for row in rows),
        "one_arena_median": statistics.median(flat),
        "one_arena_worst": max(flat),
        "joint": joint_summary(joint),
        "joint_by_shape": by_shape,
        "joint_rows": joint,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "rows": rows,
    }
    print(f"one arena: median {result['one_arena_median']:.2%}, worst {result['one_arena_worst']:.2%}")
    for shape, found in {**by_shape, "all": joint_summary(joint)}.items():
        gain = "-" if found["gain_median"] is None else f"{found['gain_median']:.1%}"
        print(
            f"kept, recomputed and offloaded together, {shape}: the better of all kept and all recomputed takes "
            f"{gain} longer in the median of {found['cases']} cases; of {found['neither_fits']} budgets in which "
            f"neither fits there is a plan for {found['only_joint_fits']}, for {found['only_offload_fits']} by "
            "offloading alone"
        )
    print(f"gap: median {result['median']:.2%}, worst {result['worst']:.2%}; slowest {result['slowest_s']:.2f} s")
    print_by_bound(split)
    if given.keep:
        print(keep(result, "place" + "-tight" * given.tight + "-parts" * given.parts + "-elastic" * given.elastic))
    print(json.dumps({**about(), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
