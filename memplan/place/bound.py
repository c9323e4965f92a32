"""The window bound: no plan of these blocks in this vram that reads the same tiers has a shorter pass.

On the unrolled cycle, with V(p) the bytes of room for weights at access p and B the rate of the links together:

    start(q) - end(p) >= [bytes of distinct items needed in p+1 … q - V(p) + p's own if not among them] / B   for p < q
    end(k) >= start(k) + t(k)

since at end(p) at most V(p) bytes are there, p's own among them, and the rest crosses the links before start(q). What
neither vram nor ram can hold at end(p) comes from the disk, at the disk's rate. The bound is the longest cycle of these
over one period. Latencies and slots are left out, V(p) may be used up at each access, and the link is at its best: from
page-locked RAM, as if nothing went the other way. It stays a bound.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memplan.device_kinds import is_apart
from memplan.place.problem import Bytes, Problem

_MOST_STARTS = 192
"""Accesses from which cycles are followed at most; each alone gives a bound, so fewer only make it weaker."""

Seconds = NDArray[np.float64]


def window_bound(problem: Problem, times_s: Sequence[float], nonweight_bytes: Bytes, disk_used: bool) -> float:
    """Return the least pass time in seconds for the activations whose times and bytes are given.

    ``nonweight_bytes``: device bytes at each access apart from frozen weights. ``disk_used``: whether the plan reads
    the disk beside the host; then bytes come from both at once on the CPU, as the timeline has it.
    """
    windows = _windows(problem, (problem.budgets.vram_bytes - nonweight_bytes).tolist(), disk_used)
    length = problem.length
    times = np.asarray(times_s, dtype=np.float64)
    starts = np.arange(0, length, -(-length // _MOST_STARTS))
    # ends[p, j]: longest path from the end of access p to the end of access p + j
    ends = np.zeros((len(starts), length + 1))
    for ahead in range(1, length + 1):
        between = np.arange(ahead)
        waited = ends[:, :ahead] + windows[(starts[:, None] + between) % length, ahead - between]
        begin = np.maximum(ends[:, ahead - 1], waited.max(axis=1))
        ends[:, ahead] = begin + times[(starts + ahead) % length]
    return float(ends[:, length].max())


def _windows(problem: Problem, room_bytes: list[int], disk_used: bool) -> Seconds:
    """Return the least time from the end of access p (row) to the start of access p + span (column)."""
    table, length = problem.table, problem.length
    disk = table.disk_bytes_per_s
    beside = disk_used and not is_apart(table.device)  # else the disk's bytes cross the same link
    together = table.host_to_device_bytes_per_s + (disk if beside else 0.0)
    ram_bytes = max(problem.ram_bytes - table.ranks.node_bytes(0, problem.staging_bytes), 0)
    sizes = [block.size_bytes for block in table.blocks]
    # Rows may be read where they lie: they need no room.
    reads = [tuple(b for b in dict.fromkeys(a.blocks) if not a.reads_rows_of(b)) for a in table.accesses]
    windows = np.zeros((length, length + 1))
    for p in range(length):
        needed: set[int] = set()
        own = set(reads[p])
        short = sum(sizes[block] for block in own) - room_bytes[p]
        for span in range(1, length + 1):
            for block in reads[(p + span) % length]:
                if block not in needed:
                    needed.add(block)
                    if block not in own:
                        short += sizes[block]
            if short > 0:
                wait_s = short / together
                if disk_used:
                    wait_s = max(wait_s, (short - ram_bytes) / disk)
                windows[p, span] = wait_s
    return windows
