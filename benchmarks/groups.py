"""Steps in which micro-batches share each load, beside those in which each loads for itself, from shapes alone.

    python -m benchmarks.groups [--only TEXT] [--keep]

Nothing is loaded or trained: plans of memplan's own, by the rates of a profile. ``compute_s`` is a step without any
waiting: of each plan its own, recomputes included. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

import memplan
from benchmarks.about import about, keep
from memplan.program.schema import Plan

HARDWARE, RAM, RANK = "rtx-4090", "200GiB", 16


class Case(NamedTuple):
    """A model in bfloat16 with LoRA on all linear layers."""

    model: str
    batch: tuple[int, int]
    vram: str
    accumulation: int


CASES = (Case("llama-3.1-8b", (1, 512), "6GiB", 16), Case("llama-3.1-70b", (1, 1024), "22GiB", 16))


def planned(case: Case, group: int | str) -> Plan:
    """Return the plan with groups of so many micro-batches, or of as many as make a step shortest."""
    return memplan.plan(
        case.model,
        case.batch,
        vram=case.vram,
        ram=RAM,
        hardware=HARDWARE,
        dtype="bf16",
        adapter={"rank": RANK, "targets": "all-linear"},
        accumulation=case.accumulation,
        group=group,
        gains=False,
    )


def figures(plan: Plan) -> dict[str, Any]:
    """Return what is said of a step."""
    said, policies = plan.prediction, plan.policies()
    compute_s = said.compute_s / plan.group * plan.workload.accumulation
    return {
        "group": plan.group,
        "step_s": said.step_s,
        "compute_s": compute_s,
        "of_compute": said.step_s / compute_s,
        "bound_s": said.bound_s / plan.group * plan.workload.accumulation,
        "recomputed": list(policies.values()).count("recompute"),
        "vram_bytes": said.peaks.vram_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--keep", action="store_true", help="write the result to benchmarks/results")
    given = parser.parse_args()
    table = Table("model", "vram", "tokens", "group", "step", "compute", "of it", "alone", "solved in")
    rows = []
    for case in CASES:
        if given.only not in case.model:
            continue
        alone = figures(planned(case, 1))
        began = time.perf_counter()
        shared = figures(planned(case, "auto"))
        took = time.perf_counter() - began
        rows.append({**case._asdict(), "alone": alone, "shared": shared, "planned_in_s": took})
        table.add_row(
            case.model, case.vram, f"{case.batch[1]} x {case.accumulation}", str(shared["group"]),
            f"{shared['step_s']:.2f} s", f"{shared['compute_s']:.2f} s", f"{shared['of_compute']:.3f}",
            f"{alone['step_s']:.2f} s", f"{took:.1f} s",
        )  # fmt: skip
    Console(file=sys.stderr).print(table)
    result = {"hardware": HARDWARE, "ram": RAM, "rank": RANK, "rows": rows}
    if given.keep:
        keep(result, "groups")
    print(json.dumps({**about(), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
