"""The best there is, by linear programming: bytes that flow over one link, any part of a block at any time.

What each block keeps from one use to the next, and what of it comes in each slot (from the end of one access to the end
of the next), such that at the end of each access no more is there than there is room. The least sum of stalls.
"""

from __future__ import annotations

from collections.abc import Sequence

import highspy
import numpy as np


def optimum(
    times: Sequence[float], reads: Sequence[Sequence[int]], sizes: Sequence[float], rooms: Sequence[float], rate: float
) -> float | None:
    """Return the least time of a cycle; None where nothing works. ``rooms``: at each access."""
    length = len(times)
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    infinity = highspy.kHighsInf
    columns = 0

    def variable(upper: float, cost: float) -> int:
        nonlocal columns
        solver.addCol(cost, 0.0, upper, 0, [], [])
        columns += 1
        return columns - 1

    stalls = [variable(infinity, 1.0) for _ in range(length)]
    own: list[dict[int, float]] = [{} for _ in range(length)]  # what must have come before the access begins
    all_of: list[dict[int, float]] = [{} for _ in range(length)]
    there: list[dict[int, float]] = [{} for _ in range(length)]
    fixed = np.zeros(length)

    def row(low: float, high: float, terms: dict[int, float]) -> None:
        solver.addRow(low, high, len(terms), np.array(list(terms), dtype=np.int32), np.array(list(terms.values())))

    for block, size in enumerate(sizes):
        uses = [k for k in range(length) if block in reads[k]]
        for k in uses:
            fixed[k] += size
        for use, following in zip(uses, [*uses[1:], uses[0] + length], strict=True):
            kept = variable(size, 0.0)
            terms = {kept: 1.0}
            for k in range(use + 1, following + 1):
                came = variable(size, 0.0)
                terms[came] = 1.0
                all_of[k % length][came] = 1.0
                if k == following:
                    own[k % length][came] = 1.0
                else:
                    for term in terms:
                        there[k % length][term] = 1.0
            row(size, size, terms)
    for k in range(length):
        row(-infinity, 0.0, {**own[k], stalls[k]: -rate})
        row(-infinity, rate * times[k], {**all_of[k], stalls[k]: -rate})
        if fixed[k] > rooms[k] + 1e-9:
            return None
        row(-infinity, rooms[k] - fixed[k], there[k])
    solver.run()
    if solver.getModelStatus() != highspy.HighsModelStatus.kOptimal:
        return None
    return float(solver.getObjectiveValue()) + sum(times)
