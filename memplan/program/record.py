"""RunRecord: what a run under a plan did, to be laid beside what the plan said."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from msgspec import Struct

from memplan.program import codec
from memplan.units import format_bytes, format_seconds


class BlockRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One streamed block over the whole run."""

    block: int
    loads: int
    loaded_bytes: int
    stall_s: float
    """Time that the compute waited for it."""
    misses: int
    """Loads that no prefetch had begun when they were needed."""


Lane = Literal["compute", "wait", "h2d", "d2h", "disk"]
"""An access, the wait for what it reads, or a load on a channel."""


class Span(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What took place in one micro-batch, and when: seconds from its beginning."""

    lane: Lane
    name: str
    start_s: float
    end_s: float


class RunRecord(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was measured. Counts are of the whole run; times are wall-clock."""

    schema_version: int
    fingerprint: str
    device: str
    passes: int
    """Forward-and-backward passes completed."""
    wall_s: float
    """From the first access to the last seen."""
    pass_s: float
    """Median time of a micro-batch in steady state (from one first access to the next with backward between), 0 if
    unknown."""
    stall_s: float
    """Median time that a micro-batch waits for blocks."""
    loads: int
    loaded_bytes: int
    misses: int
    out_of_order: int
    """Accesses that did not follow the plan's order (evaluation, generation, …); each was served on demand."""
    learned: int = 0
    """Times that accesses had left the sequence for good and the one that they then followed was learned."""
    offloaded_bytes: int
    """Saved activations that went to the host."""
    offload_skipped: int
    """Forwards whose activations stayed on the device against the plan: their place was taken, or too small."""
    recoveries: int
    """Micro-batches that ran out of device memory and were repeated under a smaller plan."""
    vram_peak_bytes: int
    """Greatest live device bytes as torch counts them (without the context), 0 where nobody measured them."""
    ram_peak_bytes: int
    """Host arena and staging."""
    blocks: tuple[BlockRecord, ...]
    vram_reserved_bytes: int = 0
    """The most device memory that torch had in reserve, allocated or cached; 0 on the CPU."""
    weight_copy_bytes: int = 0
    """Copies of weights that the first pass saved for backward beyond what the plan has (not looked for in the checked
    mode)."""
    direct_reads: int = 0
    """Streamed weights that were read outside of their module's forward and backward (a loss that looks at them, a
    callback); each was brought on demand."""
    direct_read_bytes: int = 0
    direct_writes: int = 0
    """Writes to streamed weights that were taken to their homes."""
    spans: tuple[Span, ...] = ()
    """Of the last whole pass, where it was traced."""

    def __repr__(self) -> str:
        """Say what it is in a line: ``report(plan, record)`` shows it beside its plan."""
        passes = "1 micro-batch" if self.passes == 1 else f"{self.passes:,} micro-batches"
        took = f" of {format_seconds(self.pass_s)}" if self.pass_s > 0 else ""
        peak = f", at most {format_bytes(self.vram_peak_bytes)} vram" if self.vram_peak_bytes else ""
        return f"<RunRecord of {passes}{took} on {self.device}: {self.loads:,} loads, {self.misses:,} misses{peak}>"

    def save(self, path: str | Path) -> None:
        """Write the record as JSON, whole or not at all; ``-`` is standard output. Raises PlanFormatError."""
        codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> RunRecord:
        """Read a record. Raises PlanFormatError."""
        return codec.load(cls, path)
