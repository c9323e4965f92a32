"""The window bound: no plan of these blocks in this vram has a shorter pass.

On the unrolled cycle, with V(p) the bytes of room for weights at access p and B the rate of the links together:

    start(q) - end(p) >= [bytes of distinct items needed in p+1 … q - V(p) + p's own if not among them] / B   for p < q
    end(k) >= start(k) + t(k)

since at end(p) at most V(p) bytes are there, p's own among them, and the rest crosses the links before start(q).
The bound is the longest cycle of these over one period. Latencies are left out, which keeps it a bound.
"""

from __future__ import annotations

import numpy as np

from memplan.place.problem import Bytes, Problem


def window_bound(problem: Problem, times_s: list[float], nonweight_bytes: Bytes, disk_used: bool) -> float:
    """Return the least pass time in seconds for the activations whose times and bytes are given.

    ``nonweight_bytes``: device bytes at each access apart from frozen weights. ``disk_used``: whether the plan reads
    the disk; then both links bring bytes on the CPU, where they are apart.
    """
    table, length = problem.table, problem.length
    room = problem.budgets.vram_bytes - nonweight_bytes
    ram = problem.budgets.ram_bytes
    link, disk = table.host_to_device_bytes_per_s, table.disk_bytes_per_s
    if ram <= problem.staging_bytes and disk_used:
        together = disk
    else:
        together = link + (disk if disk_used and table.device == "cpu" else 0.0)
    sizes = [block.size_bytes for block in table.blocks]
    windows = np.zeros((length, length + 1))
    for p in range(length):
        needed: set[int] = set()
        total = 0
        own = table.accesses[p].blocks
        missing = sum(sizes[block] for block in own)
        for span in range(1, length + 1):
            for block in table.accesses[(p + span) % length].blocks:
                if block not in needed:
                    needed.add(block)
                    total += sizes[block]
                    if block in own:
                        missing -= sizes[block]
            short = total + missing - int(room[p])
            if short > 0:
                windows[p, span] = short / together
                if disk_used:
                    windows[p, span] = max(windows[p, span], (short - ram) / disk)
    longest = 0.0
    for p in range(length):
        longest = max(longest, _longest(windows, times_s, p))
    return longest


def _longest(windows: np.ndarray[tuple[int, int], np.dtype[np.float64]], times_s: list[float], p: int) -> float:
    """Return the longest path from the end of access ``p`` to its end in the next pass."""
    length = len(times_s)
    ends = np.zeros(length + 1)
    offsets = np.arange(length + 1)
    rows = (p + offsets) % length
    for ahead in range(1, length + 1):
        waiting = ends[:ahead] + windows[rows[:ahead], ahead - offsets[:ahead]]
        start = max(ends[ahead - 1], float(waiting.max()))
        ends[ahead] = start + times_s[(p + ahead) % length]
    return float(ends[length])
