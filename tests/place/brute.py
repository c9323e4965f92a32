"""Every choice of what is held between uses, whole blocks in a byte pool: the optimum of the same timeline, tried one
by one.

A pool has no addresses: bytes are bytes wherever they are free. So no plan with addresses has a shorter pass.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from memplan.program.timeline import Load, simulate


def optimum(
    times: Sequence[float],
    reads: Sequence[Sequence[int]],
    sizes: Sequence[int],
    rooms: Sequence[int],
    rate: float,
    below: float = float("inf"),
    saves: tuple[Sequence[Load], Sequence[Load]] = ((), ()),
) -> float | None:
    """Return the shortest pass below ``below``; None where there is none. ``rooms``: at each access. ``saves``: stores
    of activations on a channel of their own, and their loads among those of the blocks.
    """
    length = len(times)
    gaps: list[tuple[int, int, int]] = []  # block, use, next use
    for block in range(len(sizes)):
        uses = [k for k in range(length) if block in reads[k]]
        gaps += [(block, use, after) for use, after in zip(uses, [*uses[1:], uses[0] + length], strict=True)]
    best = below
    stores, back = saves
    total_s, back_s = sum(times), sum(load.time_s for load in back)
    for held in itertools.product((True, False), repeat=len(gaps)):
        dropped = [gap for gap, stays in zip(gaps, held, strict=True) if not stays]
        if max(total_s, sum(sizes[block] for block, _, _ in dropped) / rate + back_s) >= best:
            continue
        free = list(rooms)
        for k in range(length):
            free[k] -= sum(sizes[block] for block in set(reads[k]))
        for (block, use, after), stays in zip(gaps, held, strict=True):
            for k in range(use + 1, after) if stays else ():
                free[k % length] -= sizes[block]
        if min(free) < 0:
            continue
        loads = sorted([*_loads(dropped, free, sizes, length, rate), *back], key=lambda load: load.first_use)
        best = min(best, simulate(times, [channel for channel in (stores, loads) if channel]).pass_s)
    return best if best < below else None


def _loads(
    dropped: Sequence[tuple[int, int, int]], free: list[int], sizes: Sequence[int], length: int, rate: float
) -> Iterator[Load]:
    """Yield the loads, the earliest deadline first, each as soon as there is room for it until it is used.

    Three passes in a row, of which the last is what comes again and again.
    """
    order = sorted((after % length, block, use + (0 if after < length else -length)) for block, use, after in dropped)
    left = [free[k % length] for k in range(4 * length)]
    last_start = -length
    for turn in range(1, 4):
        for first_use, block, use in order:
            deadline, begins = first_use + turn * length, use + turn * length
            start = max(begins, last_start)
            for k in range(deadline - 1, start, -1):
                if left[k] < sizes[block]:
                    start = k
                    break
            for k in range(max(start + 1, 0), deadline):
                left[k] -= sizes[block]
            last_start = start
            if turn == 3:
                yield Load(start - turn * length, first_use, sizes[block] / rate, None)
