"""What the page says, section by section: plain values, all of them from the plan, the record and the profile."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memplan import __version__
from memplan.program.memory_timeline import timeline
from memplan.program.record import RunRecord
from memplan.program.results import Point
from memplan.program.schema import Plan
from memplan.program.timeline import timeline_of
from memplan.show import sentences as words
from memplan.show import summary as said
from memplan.show.glyphs import RICH
from memplan.show.html import blocks, memory, times
from memplan.show.html.frontier import Frontier, frontier
from memplan.show.html.tables import NONE, Row, Table, size, time
from memplan.show.rows import memory_rows, time_rows
from memplan.show.summary import Facts, Measured
from memplan.units import format_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The profile that a plan was timed with."""

    figures: Sequence[tuple[str, str, str]]
    """What it is, its value, where it comes from."""
    device_bytes: int
    """All memory of the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """The page."""

    title: str
    how: str
    subject: str
    verdict: str
    key_figures: tuple[tuple[str, str, str], ...]
    """What it is, the figure, what else to know of it."""
    remarks: tuple[str, ...]
    alarm: str
    budget: Table
    budget_remarks: tuple[str, ...]
    time: Table
    time_remarks: tuple[str, ...]
    charts: tuple[memory.Chart, ...]
    bytes_tables: tuple[Table, ...]
    phases: tuple[tuple[str, float], ...]
    """Of the charts' axis: name and share."""
    lanes: times.Lanes
    accesses: Table
    waits: Table | None
    strip: tuple[blocks.Line, ...]
    homes: Table
    layers: Table
    blocks: Table
    frontier: Frontier | None
    run: str
    run_remark: str
    sources: tuple[tuple[str, str], ...]
    figures: Table
    notes: tuple[str, ...]
    version: str
    cycle: str
    """What is repeated: a micro-batch, or a group of them."""


def page(plan: Plan, record: RunRecord | None, points: Sequence[Point], machine: Machine | None) -> Page:
    """Return the page of a plan. Raises PlanMismatchError where ``record`` is of another plan."""
    known = said.facts(plan)
    seen = None if record is None else said.measured(plan, record)
    moments, line = timeline(plan), timeline_of(plan)
    charts = memory.charts(plan, moments)
    waits = times.waits(plan, line)
    layers = blocks.layers(plan, known.blocks)
    return Page(
        title=plan.model,
        how=", ".join(part for part in (plan.workload.adapter, plan.workload.optimizer) if part),
        subject=words.subject(plan, RICH),
        verdict=words.step(plan, known, RICH),
        key_figures=_key_figures(plan, known, seen),
        remarks=_remarks(plan, known),
        alarm=words.over_budget(plan, seen),
        budget=_budget(plan, known, seen, machine),
        budget_remarks=(
            f"VRAM peaks in {words.place(plan, plan.prediction.vram_peak_at, RICH)}.",
            *words.page_locks(plan, known),
        ),
        time=_time(plan, known, seen),
        time_remarks=tuple(
            filter(None, (words.bound(plan, known, RICH), words.why_slower(known), *words.gains(plan, RICH)))
        ),
        charts=charts,
        bytes_tables=tuple(memory.table(chart, moments) for chart in charts if not chart.level),
        phases=_phases(plan),
        lanes=times.lanes(plan, line),
        accesses=times.table(plan, line, waits),
        waits=times.stalled(plan, known.blocks, waits, record),
        strip=blocks.strip(plan, layers),
        homes=blocks.homes(known.blocks),
        layers=blocks.runs(plan, layers),
        blocks=blocks.table(plan, known.blocks, layers),
        frontier=frontier(plan, points, None if machine is None else machine.device_bytes) if points else None,
        run="" if record is None else words.run(record, RICH),
        run_remark="" if record is None else f"{words.counts(record)}.",
        sources=_sources(plan, record, machine),
        figures=_figures(plan, machine),
        notes=words.notes(plan, record),
        version=__version__,
        cycle=words.cycle(plan),
    )


def _key_figures(plan: Plan, known: Facts, seen: Measured | None) -> tuple[tuple[str, str, str], ...]:
    prediction, budgets = plan.prediction, plan.budgets
    peaks = prediction.peaks
    found = [("vram", size(peaks.vram_bytes), f"of {size(budgets.vram_bytes)}")]
    if peaks.ram_bytes:
        found.append(("ram", size(peaks.ram_bytes), f"of {size(budgets.ram_bytes)}"))
    if peaks.disk_bytes:
        limit = "of the checkpoint's own files" if budgets.disk_bytes is None else f"of {size(budgets.disk_bytes)}"
        found.append(("disk", size(peaks.disk_bytes), limit))
    found.append(("step", time(prediction.step_s), words.binds(plan, RICH)))
    if seen is not None and seen.pass_s is not None:
        error = seen.errors.get("pass_s")
        beside = "" if error is None else f"prediction {words.percent(error, '+')}"
        found.append((f"{words.cycle(plan)}, measured", time(seen.pass_s), beside))
    if known.bound_gap is not None:
        least = f"of {time(prediction.bound_s)} per {words.cycle(plan)}"
        found.append(("above the lower bound", words.gap_up(known.bound_gap), least))
    return tuple(found)


def _remarks(plan: Plan, known: Facts) -> tuple[str, ...]:
    if known.run_s is None:
        return ()
    return (f"About {time(known.run_s)} for {words.whole_run(plan.workload)}.",)


def _budget(plan: Plan, known: Facts, seen: Measured | None, machine: Machine | None) -> Table:
    device_bytes = None if machine is None else machine.device_bytes
    rows = tuple(
        Row(name=row.label, cells=tuple(size(cell, signed=row.is_difference) for cell in row.cells), style=row.rank)
        for row in memory_rows(plan, known, seen, device_bytes)
    )
    return Table(id="budget", caption="Bytes by tier and kind", head=("kind", "vram", "ram", "disk"), rows=rows)


def _time(plan: Plan, known: Facts, seen: Measured | None) -> Table:
    rows = []
    for row in time_rows(plan, known, seen):
        show = row.show or time
        cells = [show(row.predicted)]
        if seen is not None:
            cells.append(NONE if row.measured is None else show(row.measured))
            cells.append(NONE if row.error is None else words.percent(row.error, "+"))
        rows.append(Row(name=row.label, cells=tuple(cells), style=row.rank))
    if seen is not None:
        peaks = plan.prediction.peaks
        for kind, predicted, there in (
            ("vram", peaks.vram_bytes, seen.vram_bytes),
            ("ram", peaks.ram_bytes, seen.ram_bytes),
        ):
            error = seen.errors.get(f"{kind}_bytes")
            shown = NONE if error is None else words.percent(error, "+")
            rows.append(Row(name=f"{kind} peak", cells=(format_bytes(predicted), size(there), shown)))
    head = ("what", "predicted", *(("measured", "error") if seen is not None else ()))
    return Table(id="time", caption=f"Times and traffic of a {words.cycle(plan)}", head=head, rows=tuple(rows))


def _phases(plan: Plan) -> tuple[tuple[str, float], ...]:
    rows = plan.table.accesses
    first = next((row.index for row in rows if row.kind in ("loss", "backward")), len(rows))
    return (("forward", first / len(rows)), ("loss and backward", 1 - first / len(rows)))


def _sources(plan: Plan, record: RunRecord | None, machine: Machine | None) -> tuple[tuple[str, str], ...]:
    found = [
        ("predicted", "Bytes are counted on the model's own shapes. Times follow from its operators and the figures "
                      "below, or from times that were measured where a note says so."),
    ]  # fmt: skip
    if record is not None:
        found.append(
            ("measured", f"In a run on {record.device}: the medians of its micro-batches, its greatest bytes.")
        )
        found.append(("error", "Predicted against measured: above 0 where more was predicted."))
    found.append(("lower bound", f"No plan of these blocks within this vram has a shorter {words.cycle(plan)}."))
    if machine is None:
        found.append(
            ("figures", f"The profile {plan.hardware} is not at hand as it was: these are the rates in the plan.")
        )
    else:
        found.append(("figures", f"Of the profile {plan.hardware}, each with its kind, date and source."))
    return tuple(found)


def _figures(plan: Plan, machine: Machine | None) -> Table:
    if machine is not None:
        rows = [Row(name=name, cells=(value, source)) for name, value, source in machine.figures]
    else:
        rates = (
            ("host to device", plan.table.host_to_device_bytes_per_s),
            ("device to host", plan.table.device_to_host_bytes_per_s),
            ("disk", plan.table.disk_bytes_per_s),
        )
        rows = [Row(name=name, cells=(f"{format_bytes(int(rate))}/s", "the plan")) for name, rate in rates]
        if plan.table.pageable_bytes_per_s is not None:
            rate = f"{format_bytes(int(plan.table.pageable_bytes_per_s))}/s"
            rows.append(Row(name="pageable ram", cells=(rate, "the plan")))
        rows.append(Row(name="load latency", cells=(time(plan.table.load_latency_s), "the plan")))
    return Table(
        id="figures",
        caption="Figures that times were predicted from",
        head=("figure", "value", "where from"),
        rows=tuple(rows),
        texts=frozenset({2}),
    )
