"""The times of a plan: its accesses and loads replayed on one compute stream and its channels, until a pass repeats."""

from __future__ import annotations

import operator
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from memplan.analyze.graph import Activations
from memplan.cost.table import AccessRow, CostTable
from memplan.device_kinds import is_apart
from memplan.errors import PlanCheckError
from memplan.program.duplex import BothWays, Pair, Start
from memplan.program.page_lock import pageable_items
from memplan.program.schema import Channel, Item, Plan, Residence

_CYCLES = 64
"""Passes replayed at most. Nearly every plan repeats by its third."""

_PERIODS = (1, 2, 3, 4)
"""A steady state may alternate between a few passes (channels of unequal turns); then their mean is the pass."""

_SAME = 1e-9
"""Share of a pass by which two equal passes may differ in floating point."""


class TimedLoad(NamedTuple):
    """One load of the steady pass, in seconds from the pass's beginning (negative: begun in the pass before)."""

    residence: int
    channel: Channel
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeline:
    """One pass in the steady state. Times are seconds from the beginning of the pass: the end of the one before."""

    pass_s: float
    """Of one pass; the mean where a few different passes alternate (the rows below are then of the last of them)."""
    compute_s: float
    access_start_s: tuple[float, ...]
    access_end_s: tuple[float, ...]
    stall_s: tuple[float, ...]
    """By access: how long the compute waited before it."""
    loads: tuple[TimedLoad, ...]

    @property
    def total_stall_s(self) -> float:
        """Time of the pass in which the compute waits."""
        return sum(self.stall_s)


# ---- on plain numbers: what a solver calls thousands of times -------------------------------------------------------


class Load(NamedTuple):
    """One load of a channel's cycle."""

    load_after: int
    first_use: int
    time_s: float
    source: tuple[int, int] | None
    """Channel and position of the load that brings its source; None where the source is there always."""


class Passes(NamedTuple):
    """Every pass that was replayed, from a cold start; times count from its beginning."""

    pass_s: float
    begins_s: float
    """Beginning of the last pass, the steady one."""
    starts_s: list[float]
    """Of accesses, pass after pass."""
    ends_s: list[float]
    loads_s: list[list[tuple[float, float]]]
    """By channel: start and end of its loads, pass after pass."""


def simulate(times_s: Sequence[float], channels: Sequence[Sequence[Load]], both_ways: BothWays | None = None) -> Passes:
    """Replay until a pass repeats. ``times_s``: of each access; ``channels``: each one's loads in their order.

    An access starts when the one before has ended and what first uses it has arrived. A load starts when the load
    before it on its channel has ended, access ``load_after`` has ended and its source has arrived. ``both_ways``: two
    channels that slow each other; None where none do.

    Raises PlanCheckError where loads and accesses wait for each other.
    """
    length = len(times_s)
    sizes = [len(loads) for loads in channels]
    needs: list[list[tuple[int, int]]] = [[] for _ in range(length)]
    for channel, loads in enumerate(channels):
        for position, load in enumerate(loads):
            needs[load.first_use].append((channel, position))
    starts: list[float] = []
    ends: list[float] = []
    done: list[list[tuple[float, float]]] = [[] for _ in channels]
    busy = [False] * len(channels)
    coupled: dict[int, int] = {}
    pair: Pair | None = None

    def bring(channel: int, target: int) -> None:
        """Give times to a channel's loads up to number ``target``, counted over all passes."""
        if pair is not None and channel in coupled:
            pair.bring(coupled[channel], target)
            return
        if busy[channel]:
            raise PlanCheckError(("a load waits for a source that its own channel brings later",))
        busy[channel] = True
        loads, finished, size = channels[channel], done[channel], sizes[channel]
        free = finished[-1][1] if finished else 0.0
        for number in range(len(finished), target + 1):
            turn, position = divmod(number, size)
            after, _, time_s, source = loads[position]
            after += turn * length
            begin = free
            if after >= 0:
                if after >= len(ends):
                    raise PlanCheckError((f"a load waits for access {after % length}, which waits for the load",))
                if ends[after] > begin:
                    begin = ends[after]
            if source is not None:
                wanted = turn * sizes[source[0]] + source[1]
                if len(done[source[0]]) <= wanted:
                    bring(source[0], wanted)
                begin = max(begin, done[source[0]][wanted][1])
            free = begin + time_s
            finished.append((begin, free))
        busy[channel] = False

    def start_of(channel: int) -> Start:
        """Return what says of a coupled channel's loads when each may start."""
        loads, size = channels[channel], sizes[channel]

        def start(number: int) -> tuple[float, float] | None:
            turn, position = divmod(number, size)
            after, _, time_s, source = loads[position]
            after += turn * length
            if after >= len(ends):
                return None
            begin = ends[after] if after >= 0 else 0.0
            if source is not None:
                wanted = turn * sizes[source[0]] + source[1]
                if len(done[source[0]]) <= wanted:
                    if source[0] in coupled or not may_all_start(source[0], wanted):
                        return None
                    bring(source[0], wanted)
                begin = max(begin, done[source[0]][wanted][1])
            return begin, time_s

        return start

    def may_all_start(channel: int, target: int) -> bool:
        """Whether the accesses are over that a channel's loads up to number ``target`` wait for."""
        loads, size = channels[channel], sizes[channel]
        waiting = range(len(done[channel]), target + 1)
        return all(loads[number % size].load_after + number // size * length < len(ends) for number in waiting)

    if both_ways is not None:
        one, other = both_ways.channels
        coupled.update({one: 0, other: 1})
        pair = Pair(both_ways.share, (start_of(one), start_of(other)), (done[one], done[other]))
    now = 0.0
    begins = [0.0]
    period = 0
    for cycle in range(_CYCLES):
        for index in range(length):
            ready = now
            for channel, position in needs[index]:
                number = cycle * sizes[channel] + position
                if len(done[channel]) <= number:
                    bring(channel, number)
                if done[channel][number][1] > ready:
                    ready = done[channel][number][1]
            starts.append(ready)
            now = ready + times_s[index]
            ends.append(now)
        begins.append(now)
        period = next((back for back in _PERIODS if _repeats(begins, ends, done, sizes, length, back)), 0)
        if period:
            break
    if not period:
        period = _CYCLES // 2
    for finished, size in zip(done, sizes, strict=True):
        del finished[(len(begins) - 1) * size :]  # coupled channels may be further than the last pass
    return Passes((begins[-1] - begins[-1 - period]) / period, begins[-2], starts, ends, done)


def _repeats(
    begins: list[float],
    ends: list[float],
    done: list[list[tuple[float, float]]],
    sizes: list[int],
    length: int,
    back: int,
) -> bool:
    """Return whether the last pass is the one ``back`` before it, shifted: then so are all that follow.

    An equal pass time alone is not enough: a prefetch that runs ahead less and less hides for many passes.
    """
    last = len(begins) - 2
    if last < back or (back > 1 and last < 3 * back):
        return False
    shift = begins[last + 1] - begins[last + 1 - back]
    near = _SAME * max(shift, 1e-9)
    here, there = last * length, (last - back) * length
    if any(abs(ends[here + k] - ends[there + k] - shift) > near for k in range(length)):
        return False
    for size, loads in zip(sizes, done, strict=True):
        here, there = last * size, (last - back) * size
        for position in range(size):
            one, other = loads[here + position], loads[there + position]
            # A start may come earlier in the first passes only (nothing to wait for); the end is what others see.
            if abs(one[1] - other[1] - shift) > near:
                return False
    return True


# ---- of a plan ------------------------------------------------------------------------------------------------------


def durations(
    table: CostTable,
    policies: Mapping[str, Activations],
    on_host: Container[int] = (),
    pageable: Container[int] = (),
) -> list[float]:
    """Return the compute time of each access in s, all micro-batches of a group together; the optimizer's is 0, it
    counts once a step and not once a pass.

    ``on_host``: blocks whose home is the host. A device of its own reads rows of them over the link, as it computes.
    ``pageable``: those of them that are not page-locked there.
    """
    more = {"recompute": operator.attrgetter("recompute_s"), "offload": operator.attrgetter("offload_s")}
    return [
        0.0
        if row.kind == "optimizer"
        else table.group
        * (
            row.time_s
            + (more[policy](row) if (policy := policies.get(row.module)) in more else 0.0)
            + rows_s(table, row, on_host, pageable)
        )
        for row in table.accesses
    ]


def rows_s(table: CostTable, row: AccessRow, on_host: Container[int], pageable: Container[int]) -> float:
    """Return the time in s in which an access reads rows over the link; on the CPU they lie in its own memory."""
    if not is_apart(table.device):
        return 0.0
    link = table.host_to_device_bytes_per_s
    slow = min(link, table.pageable_bytes_per_s or link)
    return sum(r.size_bytes / (slow if r.block in pageable else link) for r in row.rows if r.block in on_host)


def load_s(table: CostTable, size_bytes: int, channel: Channel, disk_used: bool, pageable: bool = False) -> float:
    """Return the time of one load in s: the latency, and its bytes at the channel's rate.

    ``disk_used``: whether the plan reads the disk. To a device of its own those bytes cross the link too: they take the
    disk's rate of it, half at most, and what comes from the host has the rest. ``pageable``: whether its bytes pass
    through RAM that is not page-locked; those from the disk then are read first and sent after.
    """
    link, back, disk = table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s, table.disk_bytes_per_s
    if is_apart(table.device):
        disk = min(disk, link / 2)
        link -= disk if disk_used else 0.0
    if pageable and table.pageable_bytes_per_s is not None:
        slow = table.pageable_bytes_per_s
        link, back, disk = min(link, slow), min(back, slow), 1 / (1 / disk + 1 / slow)
    rate = {"h2d": link, "d2h": back, "disk": disk}[channel]
    return table.load_latency_s + size_bytes / rate


def slowed(table: CostTable, channels: Sequence[str]) -> BothWays | None:
    """Return which of a plan's channels slow each other; None where it has not both, or the link does both at full
    rate.
    """
    if table.duplex_factor == 1 or not {"h2d", "d2h"} <= set(channels):
        return None
    return BothWays((channels.index("h2d"), channels.index("d2h")), table.duplex_factor)


def replay(
    table: CostTable,
    items: Sequence[Item],
    residences: Sequence[Residence],
    policies: Mapping[str, Activations],
    pageable: Container[int] = (),
) -> Timeline:
    """Return the steady pass of a plan's residences. ``pageable``: items whose bytes pass through RAM that is not
    page-locked. Raises PlanCheckError where they can never be loaded.
    """
    weights = [item for item in items if item.kind == "weights" and item.home == "host"]
    on_host = {item.block for item in weights}
    times_s = durations(table, policies, on_host, {item.block for item in weights if item.id in pageable})
    queues: dict[Channel, list[Residence]] = {}
    for stay in residences:
        if stay.begins == "load" and stay.channel is not None:
            queues.setdefault(stay.channel, []).append(stay)
    for queue in queues.values():
        queue.sort(key=lambda stay: stay.order)
    places = {
        f"residence:{stay.id}": (channel, position)
        for channel, queue in enumerate(queues.values())
        for position, stay in enumerate(queue)
    }
    channels = [
        [
            Load(
                stay.load_after,
                stay.first_use,
                load_s(table, items[stay.item].size_bytes, name, "disk" in queues, stay.item in pageable),
                places.get(stay.source),
            )
            for stay in queue
        ]
        for name, queue in queues.items()
    ]
    passes = simulate(times_s, channels, slowed(table, list(queues)))
    length, base = len(times_s), passes.begins_s
    starts, ends = passes.starts_s[-length:], passes.ends_s[-length:]
    loads = tuple(
        TimedLoad(stay.id, name, begin - base, end - base)
        for (name, queue), timed in zip(queues.items(), passes.loads_s, strict=True)
        for stay, (begin, end) in zip(queue, timed[-len(queue) :], strict=True)
    )
    return Timeline(
        pass_s=passes.pass_s,
        compute_s=sum(times_s),
        access_start_s=tuple(start - base for start in starts),
        access_end_s=tuple(end - base for end in ends),
        stall_s=tuple(start - before for start, before in zip(starts, [base, *ends], strict=False)),
        loads=loads,
    )


def timeline_of(plan: Plan) -> Timeline:
    """Return the steady pass of a plan. Raises PlanCheckError where its loads can never run."""
    return replay(plan.table, plan.items, plan.residences, plan.policies(), pageable_items(plan))
