"""The times of a plan: its accesses and loads replayed on one compute stream and its channels, until a pass repeats."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.program.schema import Channel, Item, Plan, Residence

_CYCLES = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedLoad:
    """One load of the steady pass, in seconds from the pass's beginning."""

    residence: int
    channel: Channel
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One pass in the steady state. Times are seconds from the beginning of the pass's first access."""

    pass_s: float
    compute_s: float
    access_start_s: tuple[float, ...]
    access_end_s: tuple[float, ...]
    stall_s: tuple[float, ...]
    """By access: how long the compute waited before it."""
    loads: tuple[TimedLoad, ...]

    @property
    def total_stall_s(self) -> float:
        return sum(self.stall_s)


def durations(table: CostTable, policies: Mapping[str, Activations]) -> list[float]:
    """Return the compute time of each access; the optimizer's is 0, it counts once a step and not once a pass."""
    return [
        0.0
        if row.kind == "optimizer"
        else row.time_s + (row.recompute_s if policies.get(row.module) == "recompute" else 0.0)
        for row in table.accesses
    ]


def replay(
    table: CostTable, items: Sequence[Item], residences: Sequence[Residence], policies: Mapping[str, Activations]
) -> Timeline:
    """Return the steady pass of a plan's residences.

    An access starts when the one before has ended and what first uses it has arrived. A load starts when its channel is
    free, the access ``load_after`` has ended and its source is there; it lasts ``load_latency_s`` + bytes / rate.
    """
    times = durations(table, policies)
    length = len(times)
    rates = {
        "h2d": table.host_to_device_bytes_per_s,
        "disk": table.disk_bytes_per_s,
        "d2h": table.host_to_device_bytes_per_s,
    }
    queues: dict[Channel, list[Residence]] = {}
    for stay in residences:
        if stay.begins == "load" and stay.channel is not None:
            queues.setdefault(stay.channel, []).append(stay)
    for queue in queues.values():
        queue.sort(key=lambda stay: stay.order)
    last = {
        stay.id: table.load_latency_s + items[stay.item].size_bytes / rates[stay.channel or "h2d"]
        for q in queues.values()
        for stay in q
    }
    waits: list[list[int]] = [[] for _ in range(length)]
    for queue in queues.values():
        for stay in queue:
            waits[stay.first_use].append(stay.id)

    end: list[list[float]] = []  # by cycle and access
    start: list[list[float]] = []
    arrived: dict[tuple[int, int], tuple[float, float]] = {}  # by residence and cycle: start and end
    pointer = dict.fromkeys(queues, 0)
    free = dict.fromkeys(queues, 0.0)
    now = 0.0

    def pump(cycle: int, index: int) -> None:
        """Start every load that needs nothing beyond the accesses ended so far."""
        done = cycle * length + index  # accesses below this have ended
        moved = True
        while moved:
            moved = False
            for channel, queue in queues.items():
                while True:
                    turn, at = divmod(pointer[channel], len(queue))
                    stay = queue[at]
                    after = turn * length + stay.load_after
                    if after >= done:
                        break
                    begin = free[channel]
                    if after >= 0:
                        begin = max(begin, end[after // length][after % length])
                    if stay.source.startswith("residence:"):
                        source = arrived.get((int(stay.source[10:]), turn))
                        if source is None:
                            break
                        begin = max(begin, source[1])
                    free[channel] = begin + last[stay.id]
                    arrived[stay.id, turn] = (begin, free[channel])
                    pointer[channel] += 1
                    moved = True

    previous = 0.0
    for cycle in range(_CYCLES):
        start.append([0.0] * length)
        end.append([0.0] * length)
        for index in range(length):
            pump(cycle, index)
            ready = now
            for stay_id in waits[index]:
                ready = max(ready, arrived[stay_id, cycle][1])
            start[cycle][index] = ready
            now = end[cycle][index] = ready + times[index]
        span = now - (end[cycle - 1][-1] if cycle else 0.0)
        if cycle >= 2 and abs(span - previous) <= 1e-9 * max(span, 1e-12):
            break
        previous = span
    base = end[-2][-1]
    stalls = []
    before = base
    for index in range(length):
        stalls.append(start[-1][index] - before)
        before = end[-1][index]
    cycle = len(end) - 1
    loads = tuple(
        TimedLoad(
            residence=stay.id,
            channel=channel,
            start_s=arrived[stay.id, cycle][0] - base,
            end_s=arrived[stay.id, cycle][1] - base,
        )
        for channel, queue in queues.items()
        for stay in queue
        if (stay.id, cycle) in arrived
    )
    return Timeline(
        pass_s=end[-1][-1] - base,
        compute_s=sum(times),
        access_start_s=tuple(value - base for value in start[-1]),
        access_end_s=tuple(value - base for value in end[-1]),
        stall_s=tuple(stalls),
        loads=loads,
    )


def timeline_of(plan: Plan) -> Timeline:
    """Return the steady pass of a plan."""
    return replay(plan.table, plan.items, plan.residences, plan.policies())
