"""Where each limit binds as ranks grow: plans of one base for 1 to 1,024 GPUs. Predicted, nothing is run.

    python -m benchmarks.scale [--models llama-3.1-8b …] [--keep]

A micro-batch of 2,048 tokens on RTX 4090s (22 GiB of vram; 405B: L40S, 44 GiB). What these do not hold is in RAM,
and on disk where a node's RAM does not hold it. 8 cards a node, each with its own PCIe 4.0 ×16, two behind one, or with
NVLink beside it; 25 to 400 Gbit/s between nodes. What a row with NVLink has besides is a model of what is not built:
each of a node's ranks loads its part and gathers the rest. A table for people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace as with_fields
from typing import Any

from msgspec.structs import replace
from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep
from memplan.case import case_of
from memplan.cost.data_parallel import with_ranks
from memplan.cost.ranks import Ranks
from memplan.hardware.profile import Figure, HardwareProfile, load
from memplan.program.schema import Plan
from memplan.request import Request
from memplan.units import GIB

MODELS = {
    "llama-3.1-8b": ("rtx-4090", 22 * GIB, 64 * GIB),
    "llama-3.1-70b": ("rtx-4090", 22 * GIB, 256 * GIB),
    "llama-3.1-405b": ("l40s", 44 * GIB, 512 * GIB),
}
"""Each with its cards, their vram, and the RAM of a node."""
TOKENS = 2048
GPUS = (1, 2, 4, 8, 16, 64, 256, 1024)
PER_NODE = 8
NETWORKS_GBIT = (25, 100, 400)
TOPOLOGIES = {"own root": 1, "root for two": 2, "NVLink": 1}
"""Cards that share one link to RAM."""
NVLINK_BYTES_PER_S = 200e9
"""Assumed, in one direction: of an NVLink 3 to 4 less what protocols take."""
HOST_MEMORY_BYTES_PER_S = 240e9
"""Assumed: eight channels of DDR4-3200 in two sockets at 60%."""


def machine(card: HardwareProfile, gpus: int, sharing: int) -> HardwareProfile:
    """Return a node's profile, the link's rate with so many cards loading put in."""
    link = card.host_to_device_bytes_per_s

    def figure(value: float) -> Figure:
        return Figure(value=value, kind="assumed", source="benchmarks.scale", date="2026-12-01")

    each = min(link.value / min(sharing, gpus), HOST_MEMORY_BYTES_PER_S / gpus)
    many = {} if gpus == 1 else {str(gpus): figure(each)}
    return replace(card, host_memory_bytes_per_s=figure(HOST_MEMORY_BYTES_PER_S), host_to_device_of_ranks=many)


def limit(plan: Plan, link: float, sharing: int) -> str:
    """Return what a step waits for most."""
    said = plan.prediction
    waits = {
        "network" if plan.ranks.nodes > 1 else "link": said.reduce_s,
        said.binds: plan.workload.accumulation * said.stall_s,
    }
    binds, wait_s = max(waits.items(), key=lambda item: item[1])
    if wait_s < 0.02 * said.step_s or binds == "compute":
        return "compute"
    if binds == "link" and plan.ranks.per_node > 1:
        host = HOST_MEMORY_BYTES_PER_S / plan.ranks.per_node
        return "host memory" if host < link / min(sharing, plan.ranks.per_node) else "link"
    return binds


def gathered_s(plan: Plan, link: float) -> float:
    """Return a micro-batch in s if each of a node's ranks loaded a part and gathered the rest: the longest of the
    compute, what the disk reads, its part over the link (all parts from the RAM), and the gather.
    """
    each, said = plan.ranks.per_node, plan.prediction
    rate = min(link, HOST_MEMORY_BYTES_PER_S / each)
    moved = said.loaded_bytes_per_pass
    disk = sum(plan.items[stay.item].size_bytes for stay in plan.residences if stay.channel == "disk")
    disk_s = disk / plan.table.disk_bytes_per_s  # a node reads as much, however its ranks part it
    return max(said.compute_s, disk_s, moved / each / rate, moved * (each - 1) / each / NVLINK_BYTES_PER_S)


def rows_of(model: str, card: str, vram_bytes: int, ram_bytes: int) -> list[dict[str, Any]]:
    """Return plans of one model, a row each."""
    adapter = {"rank": 16, "targets": "all-linear"}
    options = {
        "hardware": card,
        "vram": vram_bytes,
        "ram": ram_bytes,
        "disk": 1 << 40,
        "adapter": adapter,
        "gains": False,
    }
    case = case_of(Request.of(model, (1, TOKENS), options))
    link, found = case.table.host_to_device_bytes_per_s, []
    plans: dict[object, Plan] = {}
    for topology, sharing in TOPOLOGIES.items():
        for gpus in GPUS:
            ranks = Ranks(nodes=-(-gpus // PER_NODE), per_node=min(gpus, PER_NODE))
            for gbit in NETWORKS_GBIT if ranks.nodes > 1 else (0,):
                table, _ = with_ranks(
                    case.table, machine(load(card), ranks.per_node, sharing), ranks, gbit * 1e9 / 8 or None
                )
                # All nodes place alike: what differs is the all-reduce, whose rows the same placement is given.
                key = (table.host_to_device_bytes_per_s, ranks.per_node, ranks.count > 1)
                if key not in plans:
                    plans[key] = with_fields(case, table=table).place(pieces=False)
                plan = again(plans[key], table.ranks)
                is_gathered = topology == "NVLink" and ranks.per_node > 1
                found.append(
                    {
                        "model": model, "topology": topology, "gpus": gpus, "gbit_per_s": gbit or None,
                        "step_s": plan.prediction.step_s, "compute_s": plan.prediction.compute_s,
                        "reduce_s": plan.prediction.reduce_s, "loaded_bytes": plan.prediction.loaded_bytes_per_pass,
                        "tokens_per_s": gpus * TOKENS / plan.prediction.step_s, "binds": limit(plan, link, sharing),
                        "modelled_gather_s": gathered_s(plan, link) if is_gathered else None,
                    }
                )  # fmt: skip
    return found


def again(plan: Plan, ranks: Ranks) -> Plan:
    """Return a plan with the all-reduce of other nodes."""
    from memplan.program.timeline import timeline_of

    said, reduce_s = plan.prediction, ranks.unhidden_s(timeline_of(plan).access_end_s)
    said = replace(said, reduce_s=reduce_s, step_s=said.step_s - said.reduce_s + reduce_s)
    return replace(plan, table=replace(plan.table, ranks=ranks), prediction=said).judged()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--keep", action="store_true")
    options = parser.parse_args()
    rows = [row for model in options.models for row in rows_of(model, *MODELS[model])]
    table = Table(title=f"Micro-batches of {TOKENS:,} tokens, {PER_NODE} cards a node")
    for column in (
        "model",
        "cards",
        "GPUs",
        "Gbit/s",
        "step",
        "all-reduce",
        "tokens/s",
        "binds",
        "1/R loads (modelled)",
    ):
        table.add_column(column, justify="left" if column in ("model", "cards", "binds") else "right")
    for row in rows:
        modelled = row["modelled_gather_s"]
        table.add_row(
            row["model"], row["topology"], f"{row['gpus']:,}", str(row["gbit_per_s"] or ""), f"{row['step_s']:.2f} s",
            f"{row['reduce_s']:.3f} s", f"{row['tokens_per_s']:,.0f}", row["binds"],
            "" if modelled is None else f"{modelled:.2f} s",
        )  # fmt: skip
    Console(width=120).print(table)
    result = {"benchmark": "scale", "rows": rows}
    if options.keep:
        print(keep(result, "scale"))
    print(json.dumps({**about(), **result}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
