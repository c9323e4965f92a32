"""Draws the figures of these documents with memplan's own solver and timeline:  python docs/figures.py

Their numbers are those of plans, no measurements. Needs the ``docs`` extra; ``pictures.py`` takes those of reports.
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
from memplan.program.schema import STAGING_BYTES, Budgets, Plan, Workload
from memplan.program.timeline import timeline_of

FOLDER = Path(__file__).parent / "figures"
MIB = 1 << 20
SAID: dict[str, Any] = {
    "model": "equal blocks",
    "fingerprint": "",
    "hardware": "none",
    "workload": Workload(batch={}, tokens=1, accumulation=1, optimizer="none", adapter=""),
}


def equal_blocks(
    count: int, load_s: float, forward_s: float = 1.0, backward_s: float = 1.0, size_bytes: int = MIB
) -> CostTable:
    """Return rows of equal blocks, each loaded in ``load_s``."""
    blocks = tuple(
        Block(
            id=index, name=f"layers.{index}", kind="layer", stack="layers", size_bytes=size_bytes, pinned_because="",
            tensors=(
                Tensor(name="w", shape=(size_bytes,), dtype="int8", offset_bytes=0, size_bytes=size_bytes),
            ),
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
        host_to_device_bytes_per_s=size_bytes / load_s, device_to_host_bytes_per_s=size_bytes / load_s,
        disk_bytes_per_s=size_bytes, load_latency_s=0.0,
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


def way_of_a_block(count: int = 12, room: int = 5, in_ram: int = 5) -> None:
    """Where a plan has the blocks of a model, and the way of those that are streamed."""
    size_bytes = STAGING_BYTES
    limits = Budgets(vram_bytes=room * size_bytes, ram_bytes=(in_ram + 1) * size_bytes, disk_bytes=1 << 40)
    plan = place(equal_blocks(count, 0.8, size_bytes=size_bytes), limits, **SAID)
    (arena,) = [arena.id for arena in plan.arenas if arena.tier == "device"]
    blocks: dict[str, list[int]] = {"disk": [], "host": [], "device": []}
    for item in plan.items:
        blocks[item.home].append(item.block)
    streamed = {a.offset_bytes for a in plan.addresses if a.arena == arena and plan.items[a.item].home != "device"}
    figure, axes = plt.subplots(figsize=(7.2, 2.3))
    axes.set(xlim=(0, 7.2), ylim=(-0.1, 2.2))
    axes.axis("off")
    colours = plt.get_cmap("tab20")

    def box(left: float, width: float, title: str, below: str, bottom: float = 0.35, height: float = 1.5) -> None:
        axes.add_patch(plt.Rectangle((left, bottom), width, height, facecolor="#f4f4f4", edgecolor="#666666", lw=1))
        axes.text(left + width / 2, bottom + height + 0.07, title, ha="center", va="bottom", fontsize=10, weight="bold")
        axes.text(left + width / 2, bottom - 0.07, below, ha="center", va="top", fontsize=7.5, color="#333333")

    def squares(left: float, bottom: float, labels: list[str], faces: list[Any]) -> None:
        for index, (label, face) in enumerate(zip(labels, faces, strict=True)):
            x, y = left + index % 3 * 0.4, bottom - index // 3 * 0.42
            axes.add_patch(plt.Rectangle((x, y), 0.35, 0.36, facecolor=face, edgecolor="#666666", lw=0.6))
            axes.text(x + 0.175, y + 0.18, label, ha="center", va="center", fontsize=8)

    def arrow(left: float, right: float, label: str) -> None:
        axes.annotate("", (right, 1.1), (left, 1.1), arrowprops={"arrowstyle": "-|>", "color": "#333333", "lw": 1.6})
        axes.text((left + right) / 2, 1.2, label, ha="center", va="bottom", fontsize=7.5)

    box(0.05, 1.4, "disk", "the checkpoint's own files")
    box(2.05, 1.4, "RAM", "where most weights stay")
    box(4.4, 2.75, "GPU", "weights that stay   +   streaming buffer")
    for left, tier in ((0.18, "disk"), (2.18, "host"), (4.52, "device")):
        squares(left, 1.4, [str(b) for b in blocks[tier]], [colours(b % 20) for b in blocks[tier]])
    squares(5.93, 1.4, [""] * len(streamed), ["white"] * len(streamed))
    arrow(1.47, 2.03, "")
    arrow(3.47, 4.38, "just ahead\nof its use")
    axes.text(
        3.6, -0.1, "frozen weights are only read: nothing is written back", ha="center", va="bottom", fontsize=7.5
    )
    keep(figure, "block.svg")


def keep(figure: Any, name: str) -> None:
    """Write a figure; the same plans give the same bytes."""
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(FOLDER / name, metadata={"Date": None}, bbox_inches="tight")
    plt.close(figure)


def main() -> None:
    plt.rcParams.update({"svg.hashsalt": "memplan", "svg.fonttype": "none", "font.family": "sans-serif"})
    against_room()
    one_pass()
    way_of_a_block()


if __name__ == "__main__":
    main()
