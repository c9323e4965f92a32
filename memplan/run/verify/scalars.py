"""Figures of a run for whatever a trainer logs to: what changed since they were last taken."""

from __future__ import annotations

from typing import NamedTuple

from memplan.program.record import RunRecord
from memplan.units import GIB


class _Counted(NamedTuple):
    passes: int = 0
    wall_s: float = 0.0
    stall_s: float = 0.0
    loaded_bytes: int = 0


class Scalars:
    """Takes the difference of two records."""

    def __init__(self) -> None:
        self._before = _Counted()

    def take(self, record: RunRecord) -> dict[str, float]:
        """Return figures by name: seconds a pass and the share of it in which the compute waited, GiB loaded a second,
        both since the last call; and the greatest device memory so far in GiB, allocated and reserved, where they are
        measured.
        """
        now = _Counted(record.passes, record.wall_s, sum(b.stall_s for b in record.blocks), record.loaded_bytes)
        before = self._before
        if now.passes < before.passes or now.wall_s < before.wall_s:
            before = _Counted()  # another plan is at work: its record begins anew
        self._before = now
        wall_s = now.wall_s - before.wall_s
        found = {
            "memplan/pass_s": wall_s / max(now.passes - before.passes, 1),
            "memplan/stall_share": (now.stall_s - before.stall_s) / wall_s if wall_s else 0.0,
            "memplan/loaded_gib_per_s": (now.loaded_bytes - before.loaded_bytes) / GIB / wall_s if wall_s else 0.0,
        }
        if record.vram_peak_bytes:
            found["memplan/vram_peak_gib"] = record.vram_peak_bytes / GIB
        if record.vram_reserved_bytes:
            found["memplan/vram_reserved_gib"] = record.vram_reserved_bytes / GIB
        return found
