"""A pass for chrome://tracing and Perfetto: what was planned and what was measured, side by side in one file.

The format is Chrome's JSON trace: complete events (``ph: X``) with times in microseconds, one process for the plan and
one for the run, one thread for the compute and one for each channel. What the plan has in memory are counters
(``ph: C``) in bytes: vram and ram by kind, and what each comes to.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from memplan.atomic_write import write
from memplan.errors import InputError
from memplan.program.memory_timeline import timeline
from memplan.program.timeline import timeline_of
from memplan.show.summary import check_pair

if TYPE_CHECKING:
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan

LANES = ("compute", "wait", "h2d", "d2h", "disk")
"""Threads of a process, in the order in which they are shown."""
_LANE_NAMES = {
    "compute": "compute",
    "wait": "compute waits",
    "h2d": "from the host",
    "d2h": "to the host",
    "disk": "from the disk",
}
_US = 1e6
_LEAST_S = 1e-9
"""A wait below this is what rounding leaves of none."""


def chrome_trace(plan: Plan, record: RunRecord | None = None) -> dict[str, Any]:
    """Return one steady pass as Chrome's trace object; a load that began in the pass before begins below 0.

    Raises PlanMismatchError where ``record`` is of another plan, InputError where no pass of it was traced.
    """
    events = [*_process(1, f"planned: {plan.model}"), *_planned(plan), *_memory(plan)]
    if record is not None:
        check_pair(plan, record)
        if not record.spans:
            raise InputError(
                "the record has no times of single accesses: train with memplan run --trace FILE, which writes them "
                "beside the planned pass, or with memplan.attach(..., traced=True) and save the handle's record; "
                "without the record the planned pass alone is written"
            )
        events += [*_process(2, f"measured: {record.device}"), *_measured(record)]
    return {"displayTimeUnit": "ms", "traceEvents": events}


def write_trace(path: Path, plan: Plan, record: RunRecord | None = None) -> None:
    """Write :func:`chrome_trace` to a file. Raises as it does, and InputError where it cannot be written."""
    text = json.dumps(chrome_trace(plan, record), allow_nan=False)
    write(path, text.encode())


def _planned(plan: Plan) -> Iterator[dict[str, Any]]:
    timeline, table = timeline_of(plan), plan.table
    for row, start_s, end_s, stall_s in zip(
        table.accesses, timeline.access_start_s, timeline.access_end_s, timeline.stall_s, strict=True
    ):
        name = row.module or row.kind
        if stall_s >= _LEAST_S:
            yield _event(1, "wait", name, start_s - stall_s, start_s, access=row.index)
        if row.kind != "optimizer":  # once a step, not in a pass
            blocks = [table.blocks[block].name for block in row.blocks]
            yield _event(1, "compute", f"{row.kind} {name}", start_s, end_s, access=row.index, blocks=blocks)
    for load in timeline.loads:
        item = plan.items[plan.residences[load.residence].item]
        name = table.blocks[item.block].name if item.kind == "weights" else f"activations of {item.module}"
        yield _event(1, load.channel, name, load.start_s, load.end_s, bytes=item.size_bytes, residence=load.residence)


def _memory(plan: Plan) -> Iterator[dict[str, Any]]:
    """Yield the bytes of each access at its peak, from its beginning on: in a counter, those of all accesses."""
    line, moments = timeline_of(plan), timeline(plan)
    starts_s = [*line.access_start_s, max(line.access_end_s)]
    for tier, rows in (("vram", [moment.vram for moment in moments]), ("ram", [moment.ram for moment in moments])):
        kinds = [kind for kind in rows[0] if any(row[kind] for row in rows)]
        if not kinds:
            continue
        for start_s, row in zip(starts_s, [*rows, rows[-1]], strict=True):  # the last one lasts to the pass's end
            yield _counter(f"{tier} by kind (bytes)", start_s, {kind: row[kind] for kind in kinds})
            yield _counter(f"{tier} (bytes)", start_s, {"all kinds": sum(row.values())})


def _measured(record: RunRecord) -> Iterator[dict[str, Any]]:
    for span in record.spans:
        yield _event(2, span.lane, span.name, span.start_s, span.end_s)


def _process(number: int, name: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "name": "process_name", "pid": number, "tid": 0, "args": {"name": name}}
    yield {"ph": "M", "name": "process_sort_index", "pid": number, "tid": 0, "args": {"sort_index": number}}
    for turn, lane in enumerate(LANES, 1):
        yield {"ph": "M", "name": "thread_name", "pid": number, "tid": turn, "args": {"name": _LANE_NAMES[lane]}}
        yield {"ph": "M", "name": "thread_sort_index", "pid": number, "tid": turn, "args": {"sort_index": turn}}


def _event(process: int, lane: str, name: str, start_s: float, end_s: float, **args: Any) -> dict[str, Any]:
    return {
        "ph": "X",
        "cat": lane,
        "name": name,
        "pid": process,
        "tid": LANES.index(lane) + 1,
        "ts": start_s * _US,
        "dur": (end_s - start_s) * _US,
        "args": args,
    }


def _counter(name: str, start_s: float, values: dict[str, int]) -> dict[str, Any]:
    return {"ph": "C", "name": name, "pid": 1, "tid": 0, "ts": start_s * _US, "args": values}
