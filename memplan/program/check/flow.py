"""Whether a plan can run at all, and takes the time that it says: the residences played pass after pass.

Written for the judge alone: the solvers have their timeline elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from memplan.analyze.graph import Activations
from memplan.cost.table import AccessRow
from memplan.device_kinds import is_apart
from memplan.program.check.page_locks import slow_items
from memplan.program.check.ranks import unhidden_s
from memplan.program.schema import Plan, Residence

_MOST_PASSES = 64
"""Nearly every plan comes again and again from its third pass on."""

_NOTHING = 1e-12
"""Share of the time that has gone by that is rounding of it."""

_SAME = 1e-6
"""Share by which the time that is said and the one that is found may differ."""


def flow_faults(plan: Plan) -> Iterator[str]:
    """Yield what can never move, and times that are not those of the rows."""
    said = plan.prediction
    one_s = _durations(plan)
    full, rest = divmod(plan.workload.accumulation, plan.group)
    every = [time_s * plan.group for time_s in one_s]
    ends: list[float] = []
    yield from _pass_faults(plan, every, said.pass_s, "a micro-batch" if plan.group == 1 else "a group", ends)
    if rest:
        yield from _pass_faults(plan, [time_s * rest for time_s in one_s], said.last_pass_s, "the last group", [])
    for what, stated, found in (
        ("compute", said.compute_s, sum(every)),
        ("stall", said.stall_s, max(said.pass_s - sum(every), 0.0)),
        ("the last group", said.last_pass_s, said.last_pass_s if rest else 0.0),
        ("all-reduce", said.reduce_s, min(unhidden_s(plan, ends), key=lambda s: abs(s - said.reduce_s), default=0.0)),
        ("step", said.step_s, full * said.pass_s + said.last_pass_s + said.reduce_s + _optimizer_s(plan)),
    ):
        if abs(stated - found) > _SAME * max(said.pass_s, found):
            yield f"the prediction says {stated:.6g} s of {what}, the rows say {found:.6g} s"


def _pass_faults(plan: Plan, durations: Sequence[float], stated: float, what: str, ends: list[float]) -> Iterator[str]:
    """Yield why a pass whose accesses take ``durations`` in s can never end, or takes another time than is said.

    ``ends``: where the accesses' ends go, pass after pass.
    """
    length = len(plan.table.accesses)
    queues = _queues(plan)
    places = {stay.id: (channel, turn) for channel, queue in queues.items() for turn, stay in enumerate(queue)}
    needed: list[list[Residence]] = [[] for _ in range(length)]
    for queue in queues.values():
        for stay in queue:
            if 0 <= stay.first_use < length:
                needed[stay.first_use].append(stay)
    slow = slow_items(plan)
    alone = {
        stay.id: _load_s(plan, stay, reads_disk="disk" in queues, slow=stay.item in slow)
        for queue in queues.values()
        for stay in queue
    }
    ended: dict[str, list[float]] = {channel: [] for channel in queues}  # loads, pass after pass
    turns = {"": length, **{channel: len(queue) for channel, queue in queues.items()}}

    def is_brought(stay: Residence, turn: int) -> bool:
        channel, at = places[stay.id]
        return turn * len(queues[channel]) + at < len(ended[channel])

    def next_load(channel: str) -> float | None:
        """Return what the next load of a channel takes alone, if what it waits for has happened."""
        turn, at = divmod(len(ended[channel]), len(queues[channel]))
        stay = queues[channel][at]
        source = stay.source.removeprefix("residence:")
        if turn * length + stay.load_after >= len(ends):
            return None
        if source != stay.source and int(source) in places and not is_brought(plan.residences[int(source)], turn):
            return None
        return alone[stay.id]

    def next_access() -> float | None:
        turn, index = divmod(len(ends), length)
        return durations[index] if all(is_brought(stay, turn) for stay in needed[index]) else None

    now = 0.0
    # What each still takes, alone: of a channel, and under an empty name of the compute.
    under_way: dict[str, float] = {}
    while len(ends) < _MOST_PASSES * length:
        for name in turns:
            takes = None if name in under_way else next_load(name) if name else next_access()
            if takes is not None:
                under_way[name] = takes
        if not under_way:
            turn, index = divmod(len(ends), length)
            stay = next(stay for stay in needed[index] if not is_brought(stay, turn))
            yield (
                f"access {index} waits for residence {stay.id} of block "
                f"{plan.table.blocks[plan.items[stay.item].block].name}, whose load waits for its turn on "
                f"{stay.channel}: deadlock"
            )
            return
        both = plan.table.duplex_factor if {"h2d", "d2h"} <= under_way.keys() else 1.0
        speeds = {name: both if name in ("h2d", "d2h") else 1.0 for name in under_way}
        step = min(left / speeds[name] for name, left in under_way.items())
        now += step
        under_way = {name: left - step * speeds[name] for name, left in under_way.items()}
        over = [name for name, left in under_way.items() if left <= _NOTHING * now]
        for name in over:
            del under_way[name]
            (ended[name] if name else ends).append(now)
        if "" in over and len(ends) % length == 0 and _is_said(stated, ends, ended, turns):
            break
    else:
        found = (ends[-1] - ends[-1 - _MOST_PASSES // 2 * length]) / (_MOST_PASSES // 2)
        if abs(found - stated) > _SAME * max(found, stated):
            yield f"the prediction says {what} of {stated:.6g} s, the rows say {found:.6g} s"


def _is_said(pass_s: float, ends: list[float], ended: Mapping[str, list[float]], turns: Mapping[str, int]) -> bool:
    """Whether the last pass, or the mean of the last few that may take turns, is what was said, and comes again and
    again: not its accesses alone but its loads too, since what is brought ahead less and less hides for many passes.

    ``turns``: by channel its loads in a pass, and under an empty name the accesses.
    """
    rows = [(ends, turns[""]), *((finished, turns[channel]) for channel, finished in ended.items())]
    for back in (1, 2, 3, 4):
        shift = back * pass_s
        near = _SAME * max(shift, 1e-12)
        if all(
            len(times) > (back + 1) * turn
            and all(abs(times[-k] - times[-k - back * turn] - shift) <= near for k in range(1, turn + 1))
            for times, turn in rows
        ):
            return True
    return False


def _queues(plan: Plan) -> Mapping[str, list[Residence]]:
    queues: dict[str, list[Residence]] = {}
    for stay in plan.residences:
        if stay.begins == "load" and stay.channel is not None:
            queues.setdefault(stay.channel, []).append(stay)
    for queue in queues.values():
        queue.sort(key=lambda stay: stay.order)
    return queues


def _load_s(plan: Plan, stay: Residence, *, reads_disk: bool, slow: bool) -> float:
    """Return the seconds of a load alone. A card has one link: while the disk is read, its bytes have up to half of it.

    ``slow``: it passes through pageable memory; from the disk it is first read, then sent.
    """
    table, item = plan.table, plan.items[stay.item]
    host, disk, back = table.host_to_device_bytes_per_s, table.disk_bytes_per_s, table.device_to_host_bytes_per_s
    if is_apart(table.device):
        disk = min(disk, 0.5 * host)
        if reads_disk:
            host = host - disk
    rate = {"h2d": host, "d2h": back}.get(stay.channel or "", disk)
    seconds = item.size_bytes / rate
    if slow:
        slow_s = item.size_bytes / (table.pageable_bytes_per_s or rate)
        seconds = seconds + slow_s if stay.channel == "disk" else max(seconds, slow_s)
    return table.load_latency_s + seconds


def _durations(plan: Plan) -> list[float]:
    """Return the seconds of each access for one micro-batch; the optimizer's counts once a step, not in a pass."""
    policies = plan.policies()
    link, slow = plan.table.host_to_device_bytes_per_s, slow_items(plan)
    rates = {
        item.block: min(link, plan.table.pageable_bytes_per_s or link) if item.id in slow else link
        for item in plan.items
        if item.kind == "weights" and item.home == "host"
    }

    def seconds(row: AccessRow) -> float:
        policy: Activations = policies.get(row.module, "keep")
        more = row.recompute_s if policy == "recompute" else row.offload_s if policy == "offload" else 0.0
        read_s = sum(rows.size_bytes / rates[rows.block] for rows in row.rows if rows.block in rates)
        return row.time_s + more + (read_s if is_apart(plan.table.device) else 0.0)

    return [0.0 if row.kind == "optimizer" else seconds(row) for row in plan.table.accesses]


def _optimizer_s(plan: Plan) -> float:
    return sum(row.time_s for row in plan.table.accesses if row.kind == "optimizer")
