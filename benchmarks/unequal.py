"""Random unequal lists: memplan's plan, pieces allowed, beside the best that whole blocks can do in a pool of bytes.

    python -m benchmarks.unequal [--count N] [--seed N] [--keep]

Each list has 8 to 14 blocks of 4 to 7 projections, sizes and times over a factor of 8 (backward twice that), a link
that brings all of them twice in a quarter of the compute to twice the compute, and room from the largest block to all.
The opponent has no addresses: bytes are bytes wherever they are free. What it holds from one use of a block to the next
is chosen by a local search of several starts (``whole_blocks_s``), judged by the same timeline; on lists small enough
to try every choice it is compared with the optimum (tests/place/test_unequal.py). ``bound``: the window bound. The
figure is of the lists in which the opponent is over 5% above the bound: there whole blocks leave something. A table for
people; the last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.about import about, keep
from memplan.analyze.graph import Block, Tensor
from memplan.cost.table import AccessRow, CostTable
from memplan.place.bound import window_bound
from memplan.place.problem import make_problem
from memplan.place.solve import place
from memplan.program.schema import Budgets, Workload
from memplan.program.timeline import Load, durations, simulate
from memplan.units import MIB

PARTS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RAM_BYTES = 1 << 40
MUCH = 0.05
"""Above the bound: from here on whole blocks leave something to pieces."""
STARTS = 12
"""Of the local search."""
NAMES: dict[str, Any] = {
    "model": "random", "fingerprint": "0" * 64, "hardware": "made",
    "workload": Workload(batch={"x": (1, 1)}, tokens=1, accumulation=1, optimizer="adamw", adapter=""),
}  # fmt: skip


def random_list(rng: random.Random, fewest: int = 8, most: int = 14) -> tuple[CostTable, int]:
    """Return a table without activations, and a vram from what the largest block takes to what all do, in bytes."""
    blocks: list[Block] = []
    for index in range(rng.randint(fewest, most)):
        parts = PARTS[: rng.randint(4, 7)]
        wanted, tensors, top = rng.randint(8, 64) * MIB, [], 0
        shares = [rng.uniform(1, 4) for _ in parts]
        for part, share in zip(parts, shares, strict=True):
            size = max(1, round(wanted * share / sum(shares) / MIB)) * MIB
            name = f"layers.{index}.{part}.weight"
            tensors.append(Tensor(name=name, shape=(size,), dtype="int8", offset_bytes=top, size_bytes=size))
            top += size
        blocks.append(
            Block(id=index, name=f"layers.{index}", kind="layer", stack="layers", tensors=tuple(tensors),
                  size_bytes=top, pinned_because="")
        )  # fmt: skip
    count, sizes = len(blocks), [block.size_bytes for block in blocks]
    rows = [_row(k, "forward", k, rng.uniform(1, 8)) for k in range(count)]
    rows += [_row(count + k, "backward", count - 1 - k, 2 * rng.uniform(1, 8)) for k in range(count)]
    link = 2 * sum(sizes) / sum(row.time_s for row in rows) * 2 ** rng.uniform(-1, 2)
    table = CostTable(
        blocks=tuple(blocks), accesses=tuple(rows), lifetimes=(), fixed=(), recomputable=(), device="cuda",
        host_to_device_bytes_per_s=link, device_to_host_bytes_per_s=link, disk_bytes_per_s=link, load_latency_s=0.0,
    )  # fmt: skip
    return table, max(sizes) + int((sum(sizes) - max(sizes)) * rng.random()) // 512 * 512


def _row(index: int, kind: Any, block: int, time_s: float) -> AccessRow:
    return AccessRow(
        index=index, kind=kind, module=f"layers.{block}", forward=block, blocks=(block,), time_s=time_s,
        recompute_s=0.0, transient_bytes=0, transient_recompute_bytes=0,
    )  # fmt: skip


# ---- whole blocks in a pool of bytes ---------------------------------------------------------------------------------


class Pool:
    """What is held from each use of a block to its next, whole blocks, without addresses; every other use is a load."""

    def __init__(self, table: CostTable, room_bytes: int) -> None:
        self._times, self._rate = durations(table, {}), table.host_to_device_bytes_per_s
        self._room, self._length = room_bytes, len(table.accesses)
        self._sizes = [block.size_bytes for block in table.blocks]
        self._read = [self._sizes[access.blocks[0]] for access in table.accesses]
        self.gaps: list[tuple[int, int, int]] = []
        """Block, use, next use."""
        for block in range(len(self._sizes)):
            uses = [access.index for access in table.accesses if block in access.blocks]
            wrapped = [*uses[1:], uses[0] + self._length]
            self.gaps += [(block, use, after) for use, after in zip(uses, wrapped, strict=True)]
        self._known: dict[int, float] = {}

    def pass_s(self, held: int) -> float:
        """Return the pass where the gaps are held whose bits are set; infinity where that has no room."""
        if held not in self._known:
            self._known[held] = self._time(held)
        return self._known[held]

    def _time(self, held: int) -> float:
        free = [self._room - size for size in self._read]
        dropped = []
        for bit, gap in enumerate(self.gaps):
            if not held >> bit & 1:
                dropped.append(gap)
                continue
            for k in range(gap[1] + 1, gap[2]):
                free[k % self._length] -= self._sizes[gap[0]]
        if min(free) < 0:
            return float("inf")
        return simulate(self._times, [self._loads(dropped, free)] if dropped else []).pass_s

    def _loads(self, dropped: Sequence[tuple[int, int, int]], free: Sequence[int]) -> list[Load]:
        """Return the loads, the earliest deadline first, each as soon as there is room for it until its use.

        Three passes in a row, of which the last is what comes again and again.
        """
        length, found = self._length, []
        order = sorted(
            (after % length, block, use - (0 if after < length else length)) for block, use, after in dropped
        )
        left = [free[k % length] for k in range(4 * length)]
        last = -length
        for turn in range(1, 4):
            for first_use, block, use in order:
                deadline, start = first_use + turn * length, max(use + turn * length, last)
                size = self._sizes[block]
                blocked = (k for k in range(deadline - 1, start, -1) if left[k] < size)
                start = next(blocked, start)
                for k in range(max(start + 1, 0), deadline):
                    left[k] -= size
                last = start
                if turn == 3:
                    found.append(Load(start - turn * length, first_use, size / self._rate, None))
        return found

    def filled(self, order: Sequence[int], held: int = 0) -> int:
        """Return ``held`` with each gap of ``order`` that there is room for beside the ones before it."""
        free = [self._room - size for size in self._read]
        for bit in [*(b for b in range(len(self.gaps)) if held >> b & 1), *(b for b in order if not held >> b & 1)]:
            block, use, after = self.gaps[bit]
            inner = [k % self._length for k in range(use + 1, after)]
            if all(free[k] >= self._sizes[block] for k in inner):
                held |= 1 << bit
                for k in inner:
                    free[k] -= self._sizes[block]
            else:
                held &= ~(1 << bit)
        return held


def whole_blocks_s(table: CostTable, room_bytes: int, seed: int = 0) -> float:
    """Return the shortest pass in s that was found for whole blocks in a pool of bytes.

    Starts: gaps held by their length, by their bytes, by bytes per byte and access, both ways round, and in random
    orders. Each climbs: a gap is held or dropped, or two change at once, and what room is then left is filled (or is
    not: more room lets loads begin earlier), as long as the pass becomes shorter.
    """
    pool, rng = Pool(table, room_bytes), random.Random(seed)
    sizes, bits = [block.size_bytes for block in table.blocks], range(len(pool.gaps))
    lengths = [after - use for _, use, after in pool.gaps]
    of = [sizes[block] for block, _, _ in pool.gaps]
    keys = [lengths, of, [size / length for size, length in zip(of, lengths, strict=True)]]
    orders = [sorted(bits, key=lambda bit: sign * key[bit]) for key in keys for sign in (1, -1)]
    orders += [rng.sample(list(bits), len(bits)) for _ in range(STARTS - len(orders))]
    best = min(pool.pass_s(0), *(_climbed(pool, pool.filled(order), order) for order in orders))
    return min(best, _climbed(pool, 0, orders[0]))


def _climbed(pool: Pool, held: int, order: Sequence[int]) -> float:
    now, bits = pool.pass_s(held), len(pool.gaps)
    pairs = [(1 << one) | (1 << other) for one in range(bits) for other in range(one)]
    moved = True
    while moved:
        moved = False
        for change in [*(1 << bit for bit in range(bits)), *pairs]:
            changed = held ^ change
            for tried in (changed, pool.filled(order, changed)) if pool.pass_s(changed) < float("inf") else ():
                if pool.pass_s(tried) < now * (1 - 1e-9):
                    held, now, moved = tried, pool.pass_s(tried), True
            if moved:
                break
    return now


# ---- both, side by side ----------------------------------------------------------------------------------------------


def compared(table: CostTable, vram_bytes: int) -> dict[str, Any]:
    """Return the passes of both in s, the bound, and how long each took to find."""
    budgets = Budgets(vram_bytes=vram_bytes, ram_bytes=RAM_BYTES, disk_bytes=0)
    began = time.perf_counter()
    plan = place(table, budgets, **NAMES)
    between = time.perf_counter()
    whole_s = whole_blocks_s(table, vram_bytes)
    ended = time.perf_counter()
    times = durations(table, {})
    zeros = np.zeros(len(times), dtype=np.int64)
    bound_s = max(window_bound(make_problem(table, budgets, 0, {}), times, zeros, disk_used=False), sum(times))
    alone = place(table, budgets, pieces=False, **NAMES).prediction.pass_s
    return {
        "blocks": len(table.blocks), "pieces": len(plan.table.blocks), "vram_bytes": vram_bytes,
        "pass_s": plan.prediction.pass_s, "whole_plan_s": alone, "whole_pool_s": whole_s, "bound_s": bound_s,
        "gain": whole_s / plan.prediction.pass_s - 1, "solved_s": between - began, "searched_s": ended - between,
    }  # fmt: skip


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--count", type=int, default=200, help="lists")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--keep", action="store_true", help="keep the result in benchmarks/results")
    given = options.parse_args()
    rng = random.Random(given.seed)
    rows = [compared(*random_list(rng)) for _ in range(given.count)]
    hard = [row for row in rows if row["whole_pool_s"] > row["bound_s"] * (1 + MUCH)]
    shown = Table(
        "lists", "count", "faster, median", "least", "most", "plan above bound, median", "whole above bound", box=None
    )
    for name, chosen in (("all", rows), (f"whole over {MUCH:.0%} above the bound", hard)):
        if chosen:
            gains = [row["gain"] for row in chosen]
            gaps = (
                statistics.median(row[what] / row["bound_s"] - 1 for row in chosen)
                for what in ("pass_s", "whole_pool_s")
            )
            cells = (statistics.median(gains), min(gains), max(gains), *gaps)
            shown.add_row(name, str(len(chosen)), *(f"{cell:.1%}" for cell in cells))
    Console().print(shown)
    result = {
        "benchmark": "unequal", "seed": given.seed, "lists": len(rows), "hard": len(hard),
        "gain_median": statistics.median(row["gain"] for row in hard) if hard else None,
        "slower": sum(row["gain"] < -1e-9 for row in rows),
        "slowest_s": max(row["solved_s"] for row in rows), "rows": rows,
    }  # fmt: skip
    if given.keep:
        print(keep(result, "unequal"))
    print(json.dumps({**about(), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
