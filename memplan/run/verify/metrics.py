"""What a run is measured by: its passes and their times, and what was not as the plan has it."""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterable

from memplan.program.record import BlockRecord, RunRecord
from memplan.program.schema import SCHEMA_VERSION, Plan
from memplan.run.access.direct_access import DirectAccess
from memplan.run.modules.offloaded_activations import Offloads
from memplan.run.schedule.streamed import Streamed

_MOST_TIMES = 4096
"""Passes of which the times are kept: the last ones."""


def blocks_of(streamed: Iterable[Streamed]) -> tuple[BlockRecord, ...]:
    """Return what became of each streamed block so far."""
    return tuple(
        BlockRecord(
            block=s.block,
            loads=s.loads,
            loaded_bytes=s.loads * s.part.numel(),
            stall_s=s.stall_s,
            misses=s.misses,
        )
        for s in streamed
    )


class Measured:
    """Counts, and times of passes in the steady state: from a cycle's first access to the next one's, with a backward
    between.
    """

    def __init__(self) -> None:
        self.passes = 0
        self.out_of_order = 0
        self.learned = 0
        self.stalled_s = 0.0
        """Of the pass that is under way."""
        self.has_begun = False
        """There was an access."""
        self._first = 0.0
        self._last = 0.0
        self._began: float | None = None
        self._complete = False
        self._times_s: deque[float] = deque(maxlen=_MOST_TIMES)
        self._stalls_s: deque[float] = deque(maxlen=_MOST_TIMES)

    def cycle_begins(self, passes: int) -> None:
        """The first access of a cycle begins. ``passes``: how many the one before had."""
        now = time.perf_counter()
        if self._began is not None and self._complete:
            self._times_s.append((now - self._began) / passes)
            self._stalls_s.append(self.stalled_s / passes)
        self._began, self._complete, self.stalled_s = now, False, 0.0
        if not self.has_begun:
            self.has_begun, self._first = True, now
        self._last = now

    def backward_ends(self, passes: int) -> None:
        """An outermost backward is over, and with it so many passes; 0 where more is to come of this one."""
        self.passes += passes
        self._complete = self._complete or passes > 0
        self._last = time.perf_counter()

    def sequence_begins_anew(self, is_new: bool) -> None:
        """The cycle that is under way is none. ``is_new``: another sequence begins than was followed."""
        self.learned += is_new
        self._began = None

    def record(
        self,
        plan: Plan,
        blocks: tuple[BlockRecord, ...],
        offloads: Offloads,
        *,
        vram_peak_bytes: int,
        ram_peak_bytes: int,
        recoveries: int,
        weight_copy_bytes: int,
        direct: DirectAccess,
    ) -> RunRecord:
        """Return what was measured so far."""
        times_s, stalls_s = list(self._times_s), list(self._stalls_s)
        return RunRecord(
            schema_version=SCHEMA_VERSION,
            fingerprint=plan.fingerprint,
            device=plan.table.device,
            passes=self.passes,
            wall_s=self._last - self._first,
            pass_s=statistics.median(times_s[1:] or times_s or [0.0]),
            stall_s=statistics.median(stalls_s[1:] or stalls_s or [0.0]),
            loads=sum(b.loads for b in blocks),
            loaded_bytes=sum(b.loaded_bytes for b in blocks),
            misses=sum(b.misses for b in blocks),
            out_of_order=self.out_of_order,
            learned=self.learned,
            offloaded_bytes=offloads.stored_bytes,
            offload_skipped=offloads.offload_skipped,
            recoveries=recoveries,
            weight_copy_bytes=weight_copy_bytes,
            direct_reads=direct.reads,
            direct_read_bytes=direct.read_bytes,
            direct_writes=direct.written.count,
            vram_peak_bytes=vram_peak_bytes,
            ram_peak_bytes=ram_peak_bytes,
            blocks=blocks,
        )
