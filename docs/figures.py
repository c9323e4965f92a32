"""Draws the figures of these documents with memplan's own solver and timeline:  python docs/figures.py

Their numbers are those of plans, no measurements. Needs the ``docs`` extra.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

from memplan.analyze.graph import Block, Tensor
from memplan.cost.table import AccessRow, CostTable
from memplan.errors import DoesNotFitError
from memplan.place.baselines import WAYS
from memplan.place.solve import place, place_as
from memplan.program.schema import Budgets, Plan, Workload
from memplan.program.timeline import timeline_of

FOLDER = Path(__file__).parent / "figures"
MIB = 1 << 20
SAID: dict[str, Any] = {
    "model": "equal blocks",
    "fingerprint": "",
    "hardware": "none",
    "workload": Workload(batch={}, tokens=1, accumulation=1, optimizer="none", adapter=""),
}


def equal_blocks(count: int, load_s: float, forward_s: float = 1.0, backward_s: float = 1.0) -> CostTable:
    """Return rows of equal blocks of 1 MiB, each loaded in ``load_s``."""
    blocks = tuple(
        Block(
            id=index, name=f"layers.{index}", kind="layer", stack="layers", size_bytes=MIB, pinned_because="",
            tensors=(Tensor(name=f"layers.{index}.w", shape=(MIB,), dtype="int8", offset_bytes=0, size_bytes=MIB),),
        )
        for index in range(count)
    )  # fmt: skip
    accesses = [
        AccessRow(
            index=index, kind="forward" if index < count else "backward", module=f"layers.{block}", forward=block,
            blocks=(block,), time_s=forward_s if index < count else backward_s, recompute_s=0.0, transient_bytes=0,
            transient_recompute_bytes=0,
        )
        for index, block in enumerate([*range(count), *reversed(range(count))])
    ]  # fmt: skip
    return CostTable(
        blocks=blocks, accesses=tuple(accesses), lifetimes=(), fixed=(), recomputable=(), device="cuda",
        host_to_device_bytes_per_s=MIB / load_s, device_to_host_bytes_per_s=MIB / load_s, disk_bytes_per_s=MIB,
        load_latency_s=0.0,
    )  # fmt: skip


def budgets(room_blocks: int) -> Budgets:
    """Return room for so many blocks."""
    return Budgets(vram_bytes=room_blocks * MIB, ram_bytes=1 << 40, disk_bytes=0)


def against_room(count: int = 32, load_s: float = 1.5) -> None:
    """The pass of each way of placing against the room, and the bound."""
    table = equal_blocks(count, load_s)
    compute_s = sum(row.time_s for row in table.accesses)
    rooms = range(1, count + 1)
    figure, axes = plt.subplots(figsize=(7.2, 4.0))

    def curve(label: str, plans: list[Plan | None], **style: Any) -> None:
        points = [(r / count, p.prediction.pass_s / compute_s) for r, p in zip(rooms, plans, strict=True) if p]
        axes.plot(*zip(*points, strict=True), label=label, **style)

    def best(room: int) -> Plan | None:
        try:
            return place(table, budgets(room), **SAID)
        except DoesNotFitError:
            return None

    for way, mark in zip(WAYS, "ov^s", strict=True):
        curve(way, [place_as(way, table, budgets(room), **SAID) for room in rooms], marker=mark, markersize=3, lw=0.8)
    plans = [best(room) for room in rooms]
    curve("memplan", plans, color="black", lw=2)
    bounds = [(r / count, p.prediction.bound_s / compute_s) for r, p in zip(rooms, plans, strict=True) if p]
    axes.plot(*zip(*bounds, strict=True), label="the window bound", color="tab:red", lw=1, ls="--")
    axes.set(xlabel="room, as a share of all blocks", ylabel="time of a pass, in units of its compute", ylim=(0.9, 3))
    axes.legend(frameon=False, fontsize=8)
    axes.grid(alpha=0.3)
    keep(figure, "room.svg")


def one_pass(count: int = 8, room: int = 4, load_s: float = 1.2) -> None:
    """What computes and what loads when, in the pass of a plan."""
    plan = place(equal_blocks(count, load_s), budgets(room), **SAID)
    timeline = timeline_of(plan)
    figure, axes = plt.subplots(figsize=(7.2, 1.9))
    colours = plt.get_cmap("tab20")

    def bar(lane: int, begin_s: float, end_s: float, block: int) -> None:
        axes.barh(lane, end_s - begin_s, left=begin_s, color=colours(block % 20), edgecolor="white", height=0.8)
        axes.text((begin_s + end_s) / 2, lane, str(block), ha="center", va="center", fontsize=8)

    for row, begin_s, end_s in zip(plan.table.accesses, timeline.access_start_s, timeline.access_end_s, strict=True):
        bar(1, begin_s, end_s, row.blocks[0])
    for load in timeline.loads:
        bar(0, load.start_s, load.end_s, plan.items[plan.residences[load.residence].item].block)
    axes.set_yticks([0, 1], ["link", "compute"])
    axes.set(xlabel="s from the beginning of a pass")
    axes.axvline(0, color="black", lw=0.6)
    axes.axvline(timeline.pass_s, color="black", lw=0.6)
    keep(figure, "pass.svg")


def keep(figure: Any, name: str) -> None:
    """Write a figure; the same plans give the same bytes."""
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / name, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "memplan", "svg.fonttype": "none", "font.family": "sans-serif"})
    against_room()
    one_pass()


if __name__ == "__main__":
    main()
