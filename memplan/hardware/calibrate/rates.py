"""What both kinds of device are asked for, and the clock."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

from memplan.units import MIB

COPY_BYTES = 128 * MIB
"""More than any processor's cache, so that the copy is from RAM to RAM."""

Progress = Callable[[str], None]


class Rates:
    """Bytes and FLOPs per second, and seconds; None where it was not measured."""

    def __init__(self) -> None:
        self.matmul: dict[str, float] = {}
        self.memory = self.to_device = self.to_host = self.launch = self.operator = self.latency = self.context = 0.0
        self.pageable: float | None = None
        self.duplex: float | None = None
        self.page_lock: float | None = None
        self.page_lock_refused: float | None = None


def median_s(work: Callable[[], object], repeats: int) -> float:
    """Return the median time of ``work`` in seconds, one warm-up before."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return max(statistics.median(times), 1e-9)
