"""The steady pass in time: what computes, what moves, and what the compute waits for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from memplan.program.record import RunRecord
from memplan.program.schema import Plan
from memplan.program.timeline import Timeline
from memplan.show import sentences as words
from memplan.show.html.axes import Tick, time_ticks
from memplan.show.html.blocks import layer_of
from memplan.show.html.memory import WIDTH, short
from memplan.show.html.tables import NONE, Row, Table, numbers, time
from memplan.show.summary import BlockFact

_CHANNELS = {"h2d": "RAM to device", "d2h": "device to RAM", "disk": "disk to device"}
_LEAST_S = 1e-9
"""A wait below this is what rounding leaves of none."""
_LEAST = 0.4
"""Width below which a bar is not seen; what is nearer to its neighbour is drawn as one with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bars:
    """One lane. ``marks``: paths with their class and title."""

    name: str
    busy_s: float
    busy: str
    """The same for people, with its share of the pass."""
    marks: tuple[tuple[str, str, str], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lanes:
    """The drawing of a pass; all its lanes share one axis, of ``end_s``."""

    title: str
    description: str
    lanes: tuple[Bars, ...]
    end_s: float
    phases: tuple[tuple[str, float], ...]
    """Name and share of the axis."""
    ticks: tuple[Tick, ...]
    wraps: bool
    """Whether a load begins in the pass before: its beginning is drawn where the next pass's lies, at the end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Wait:
    """One stall: which access waited, for which block of weights, and where that came from."""

    access: int
    stall_s: float
    block: int | None
    """None where it waits for no weights: activations, or an order of stores."""
    channel: str


def lanes(plan: Plan, line: Timeline) -> Lanes:
    """Return the drawing of the steady pass."""
    rows = plan.table.accesses
    end_s = max(line.pass_s, max(line.access_end_s, default=0.0))
    forward: list[tuple[float, float]] = []
    backward: list[tuple[float, float]] = []
    stalls: list[tuple[float, float]] = []
    for row, start, end, stall in zip(rows, line.access_start_s, line.access_end_s, line.stall_s, strict=True):
        (backward if row.kind == "backward" else forward).append((start, end))
        if stall >= _LEAST_S:
            stalls.append((start - stall, start))
    stall_s = line.total_stall_s
    compute = Bars(
        name="compute",
        busy_s=line.compute_s,
        busy=_busy(plan, line.compute_s, end_s),
        marks=tuple(
            (look, path, title)
            for look, path, title in (
                ("forward", _bars(forward, end_s), f"forward and loss: {time(_sum(forward))}"),
                ("backward", _bars(backward, end_s), f"backward: {time(_sum(backward))}"),
                ("stall", _bars(stalls, end_s), f"waiting: {time(stall_s)}"),
            )
            if path
        ),
    )
    found = [compute]
    for channel, name in _CHANNELS.items():
        spans = [(load.start_s, load.end_s) for load in line.loads if load.channel == channel]
        if spans:
            busy = _sum(spans)
            title = f"{len(spans):,} loads: {time(busy)}"
            path = _bars(_within(spans, line.pass_s), end_s)
            found.append(Bars(name=name, busy_s=busy, busy=_busy(plan, busy, end_s), marks=(("moves", path, title),)))
    first = next((row.index for row in rows if row.kind in ("loss", "backward")), len(rows))
    begun = line.access_start_s[first] if first < len(rows) else end_s
    share = begun / end_s if end_s else 0.0
    return Lanes(
        title=f"One {words.cycle(plan)} in the steady state",
        description=f"{time(line.pass_s)} long, of it {time(stall_s)} of waiting.",
        lanes=tuple(found),
        end_s=end_s,
        phases=(("forward", share), ("loss and backward", 1 - share)),
        ticks=time_ticks(end_s),
        wraps=any(load.start_s < 0 for load in line.loads),
    )


def waits(plan: Plan, line: Timeline) -> tuple[Wait, ...]:
    """Return the stalls of the steady pass, each with the load that arrived last of those that the access needs."""
    last: dict[int, tuple[float, int, str]] = {}
    stays = {stay.id: stay for stay in plan.residences}
    for load in line.loads:
        stay = stays[load.residence]
        last[stay.first_use] = max(last.get(stay.first_use, (-1.0, -1, "")), (load.end_s, stay.item, load.channel))
    found = []
    for index, stall in enumerate(line.stall_s):
        if stall >= _LEAST_S:
            _, item, channel = last.get(index, (0.0, -1, ""))
            weights = item >= 0 and plan.items[item].kind == "weights"
            block = plan.items[item].block if weights else None
            found.append(Wait(access=index, stall_s=stall, block=block, channel=_CHANNELS.get(channel, NONE)))
    return tuple(found)


def table(plan: Plan, line: Timeline, found: Sequence[Wait]) -> Table:
    """Return every access of the steady pass: when it begins, how long it computes, what it waited for."""
    held = {wait.access: wait for wait in found}
    return Table(
        id="accesses",
        caption=f"The {words.cycle(plan)}, access by access",
        head=("access", "phase", "module", "begins", "computes", "waited", "for"),
        rows=tuple(
            Row(
                name=str(row.index),
                cells=(
                    row.kind,
                    row.module or NONE,
                    time(start),
                    time(end - start),
                    time(stall if stall >= _LEAST_S else None),
                    _waited(plan, held.get(row.index)),
                ),
            )
            for row, start, end, stall in zip(
                plan.table.accesses, line.access_start_s, line.access_end_s, line.stall_s, strict=True
            )
        ),
        texts=frozenset({1, 2, 6}),
        long=True,
    )


def stalled(plan: Plan, blocks: Sequence[BlockFact], found: Sequence[Wait], record: RunRecord | None) -> Table | None:
    """Return what was waited for by layer, the longest first: predicted, and as it was measured. None where nothing
    was.
    """
    said: dict[str, float] = {}
    causes: dict[str, set[str]] = {}
    for wait in found:
        name = NONE if wait.block is None else layer_of(blocks[wait.block])
        said[name] = said.get(name, 0.0) + wait.stall_s
        causes.setdefault(name, set()).add(wait.channel)
    seen: dict[str, tuple[float, int, int]] = {}
    for row in record.blocks if record is not None else ():
        name = layer_of(blocks[row.block])
        stall, loads, misses = seen.get(name, (0.0, 0, 0))
        if row.stall_s or row.misses:
            seen[name] = (stall + row.stall_s, loads + row.loads, misses + row.misses)
            causes.setdefault(name, set()).add(_CHANNELS["disk" if blocks[row.block].home == "disk" else "h2d"])
    if not said and not seen:
        return None
    passes = (max(1, record.passes) if record is not None else 1) / plan.group
    head: tuple[str, ...] = ("layer", "load", "predicted", "share")
    if record is not None:
        head += ("measured", "loads of the run", "misses")
    names = sorted({*said, *seen}, key=lambda name: (-seen.get(name, (0.0,))[0], -said.get(name, 0.0), name))
    return Table(
        id="waits",
        caption=f"What the compute waits for in a {words.cycle(plan)}, by layer",
        head=head,
        rows=tuple(_stalled_row(name, said, seen, causes, passes, record is not None) for name in names),
        texts=frozenset({1}),
        long=len(names) > 10,
    )


def _stalled_row(
    name: str,
    said: Mapping[str, float],
    seen: Mapping[str, tuple[float, int, int]],
    causes: Mapping[str, Iterable[str]],
    passes: float,
    measured: bool,
) -> Row:
    total = sum(said.values())
    stall = said.get(name)
    cells: tuple[str, ...] = (
        ", ".join(sorted(causes[name])),
        time(stall),
        NONE if stall is None else words.percent(stall / total),
    )
    if measured:
        waited, loads, misses = seen.get(name, (0.0, 0, 0))
        cells += (time(waited / passes), *numbers((loads, misses)))
    return Row(name=name, cells=cells)


def _waited(plan: Plan, wait: Wait | None) -> str:
    if wait is None:
        return NONE
    return wait.channel if wait.block is None else f"{plan.table.blocks[wait.block].name} ({wait.channel})"


def _busy(plan: Plan, busy_s: float, end_s: float) -> str:
    share = f", {words.percent(busy_s / end_s)} of the {words.cycle(plan)}" if end_s else ""
    return f"{time(busy_s)}{share}"


def _sum(spans: Iterable[tuple[float, float]]) -> float:
    return sum(end - start for start, end in spans)


def _within(spans: Iterable[tuple[float, float]], pass_s: float) -> list[tuple[float, float]]:
    """Return the spans within the pass: what lies before its beginning stands at its end, of the next pass's loads."""
    found = []
    for start, end in spans:
        if end > 0:
            found.append((max(start, 0.0), end))
        if start < 0:
            found.append((start + pass_s, min(end, 0.0) + pass_s))
    return sorted(found)


def _bars(spans: Iterable[tuple[float, float]], end_s: float) -> str:
    """Return bars as one path; the axis is ``end_s`` long, a lane ten high. What touches is one bar."""
    drawn: list[list[float]] = []
    for start, end in sorted(spans):
        left, right = WIDTH * start / end_s if end_s else 0.0, WIDTH * end / end_s if end_s else 0.0
        if right <= left:
            continue
        if drawn and left - drawn[-1][1] < _LEAST:
            drawn[-1][1] = max(drawn[-1][1], right)
        else:
            drawn.append([left, right])
    return "".join(
        f"M{short(left)} 0h{short(max(right - left, _LEAST))}v10h-{short(max(right - left, _LEAST))}z"
        for left, right in drawn
    )
