"""What stands on the page, section by section: plain values, all of them from the plan, the record and the profile."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

from memplan import __version__
from memplan.program.memory_timeline import timeline
from memplan.program.record import RunRecord
from memplan.program.results import Point
from memplan.program.schema import RAM_KINDS, VRAM_KINDS, Plan
from memplan.program.timeline import timeline_of
from memplan.show import sentences as words
from memplan.show import summary as said
from memplan.show.glyphs import RICH
from memplan.show.html import blocks, memory, times
from memplan.show.html.frontier import Frontier, frontier
from memplan.show.html.tables import NONE, Row, Table, size, time
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
        verdict=f"{words.speed(known)}; {words.binds(plan, RICH)}.",
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
        waits=times.stalled(known.blocks, waits, record),
        strip=blocks.strip(layers),
        homes=blocks.homes(known.blocks),
        layers=blocks.runs(layers),
        blocks=blocks.table(plan, known.blocks, layers),
        frontier=frontier(plan, points) if points else None,
        run="" if record is None else words.run(record, RICH),
        run_remark="" if record is None else f"{words.counts(record)}.",
        sources=_sources(plan, record, machine),
        figures=_figures(plan, machine),
        notes=words.notes(plan, record),
        version=__version__,
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
        found.append(("pass, measured", time(seen.pass_s), beside))
    if known.bound_gap is not None:
        found.append(("above the bound", words.gap_up(known.bound_gap), f"of {time(prediction.bound_s)} a pass"))
    return tuple(found)


def _remarks(plan: Plan, known: Facts) -> tuple[str, ...]:
    if known.run_s is None:
        return ()
    return (f"About {time(known.run_s)} for {words.whole_run(plan.workload)}.",)


def _budget(plan: Plan, known: Facts, seen: Measured | None, machine: Machine | None) -> Table:
    """Return bytes by tier and kind: the budget is what is used and what is free, a device's all that and others'."""
    prediction, budgets, peaks = plan.prediction, plan.budgets, plan.prediction.peaks
    rows = []
    for kind in dict.fromkeys((*VRAM_KINDS, *RAM_KINDS, *prediction.vram_parts, *prediction.ram_parts)):
        parts = (
            prediction.vram_parts.get(kind, 0),
            prediction.ram_parts.get(kind, 0),
            peaks.disk_bytes if kind == "weights" else 0,
        )
        if any(parts):
            rows.append(Row(name=kind, cells=tuple(size(part or None) for part in parts)))
        if kind == "activations" and known.weight_copy_bytes:
            rows.append(Row(name="of it copies", cells=(size(known.weight_copy_bytes), NONE, NONE), style="part"))
    tops = (peaks.vram_bytes, peaks.ram_bytes, peaks.disk_bytes)
    limits = (budgets.vram_bytes, budgets.ram_bytes, budgets.disk_bytes)
    free = (None if limit is None else limit - top for top, limit in zip(tops, limits, strict=True))
    rows.append(Row(name="peak, predicted", cells=tuple(map(size, tops)), style="sum"))
    for name, part in words.ram_by_lock(plan, known):
        rows.append(Row(name=f"of it {name}", cells=(NONE, size(part), NONE), style="part"))
    rows.append(Row(name="free", cells=tuple(map(size, free))))
    rows.append(Row(name="budget", cells=tuple(map(size, limits)), style="sum"))
    if machine is not None:
        others = machine.device_bytes - budgets.vram_bytes
        name = "left to others" if others >= 0 else "more than there is"
        rows.append(Row(name=name, cells=(size(abs(others)), NONE, NONE)))
        rows.append(Row(name="memory of the device", cells=(size(machine.device_bytes), NONE, NONE), style="sum"))
    if seen is not None:
        rows.append(Row(name="peak, measured", cells=(size(seen.vram_bytes), size(seen.ram_bytes), NONE), style="sum"))
        extra = (seen.unaccounted_vram_bytes, seen.unaccounted_ram_bytes)
        rows.append(Row(name="unaccounted", cells=(*(size(part, signed=True) for part in extra), NONE)))
    return Table(id="budget", caption="Bytes by tier and kind", head=("kind", "vram", "ram", "disk"), rows=tuple(rows))


def _time(plan: Plan, known: Facts, seen: Measured | None) -> Table:
    prediction = plan.prediction
    beside = {} if seen is None else asdict(seen)
    rows = []

    def row(name: str, value: float, form: Callable[..., str], key: str = "", style: str = "") -> None:
        cells = [form(value)]
        if seen is not None:
            there, error = beside.get(key), seen.errors.get(key)
            cells += [NONE if there is None else form(there), NONE if error is None else words.percent(error, "+")]
        rows.append(Row(name=name, cells=tuple(cells), style=style))

    row("compute", prediction.compute_s, time)
    if known.recompute_s > 0:
        row("of it recompute", known.recompute_s, time, style="part")
    row("stall", prediction.stall_s, time, "stall_s")
    row("pass", prediction.pass_s, time, "pass_s", "sum")
    row("bound of a pass", prediction.bound_s, time)
    row("step", prediction.step_s, time, style="sum")
    if known.tokens_per_s is not None:
        row("tokens/s", known.tokens_per_s, words.rate, "tokens_per_s")
    row("loads a pass", prediction.loads_per_pass, words.number, "loads_per_pass")
    row("loaded a pass", prediction.loaded_bytes_per_pass, format_bytes, "loaded_bytes_per_pass")
    if prediction.offloaded_bytes_per_pass:
        row("offloaded a pass", prediction.offloaded_bytes_per_pass, format_bytes)
    if prediction.rows_bytes_per_pass:
        row("rows a pass", prediction.rows_bytes_per_pass, format_bytes)
    if seen is not None:
        for name, key, value in (
            ("vram peak", "vram_bytes", prediction.peaks.vram_bytes),
            ("ram peak", "ram_bytes", prediction.peaks.ram_bytes),
        ):
            row(name, value, format_bytes, key)
    head = ("what", "predicted", *(("measured", "error") if seen is not None else ()))
    return Table(id="time", caption="Times and traffic of a pass", head=head, rows=tuple(rows))


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
        found.append(("measured", f"In a run on {record.device}: the medians of its passes, its greatest bytes."))
        found.append(("error", "Predicted against measured: above 0 where more was predicted."))
    found.append(("bound", "No plan of these blocks within this vram has a shorter pass."))
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
