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
    # The longest paths from the end of access p (row): ``ends`` to the end of access p + ahead, ``begins`` to the start
    # of each behind it. From each access on to all later ones, so that the windows are read row by row.
    ends = np.zeros(len(starts))
    begins = np.zeros((len(starts), length + 1))
    for ahead in range(length):
        later = begins[:, ahead + 1 :]
        np.maximum(later, ends[:, None] + windows[(starts + ahead) % length, 1 : length - ahead + 1], out=later)
        ends = np.maximum(begins[:, ahead + 1], ends) + times[(starts + ahead + 1) % length]
    return float(ends.max())


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
    before: dict[int, int] = {}
    """By block the last access that read it, from one pass on into the next."""
    found: list[tuple[int, int, int]] = []
    for at in range(2 * length):
        for block in reads[at % length]:
            if at >= length:
                found.append((at - length, at - before[block], sizes[block]))
            before[block] = at
    readings = np.asarray(found, dtype=np.int64).reshape(-1, 3)
    accesses, distances, bytes_read = readings[:, 0], readings[:, 1], readings[:, 2].astype(np.float64)
    windows = np.zeros((length, length + 1))
    for p in range(length):
        spans = (accesses - p - 1) % length + 1
        is_new = distances > spans  # neither p nor any access since reads it: p's own is there
        own = sum(sizes[block] for block in reads[p]) - room_bytes[p]
        short = own + np.bincount(spans[is_new], weights=bytes_read[is_new], minlength=length + 1).cumsum()
        waits_s = short / together
        if disk_used:
            waits_s = np.maximum(waits_s, (short - ram_bytes) / disk)
        windows[p, 1:] = np.where(short > 0, waits_s, 0.0)[1:]
    return windows
