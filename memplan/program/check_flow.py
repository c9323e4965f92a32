"""Whether a plan can run at all, and takes the time that it says: the residences played pass after pass.

Written for the judge alone: the solvers have their timeline elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from memplan.analyze.graph import Activations
from memplan.cost.table import AccessRow
from memplan.program.schema import Plan, Residence

_MOST_PASSES = 64
"""Nearly every plan comes again and again from its third pass on."""

_SAME = 1e-6
"""Share by which the time that is said and the one that is found may differ."""


def flow_faults(plan: Plan) -> Iterator[str]:
    """Yield what can never move, and times that are not those of the rows."""
    length = len(plan.table.accesses)
    queues = _queues(plan)
    places = {stay.id: (channel, turn) for channel, queue in queues.items() for turn, stay in enumerate(queue)}
    needed: list[list[Residence]] = [[] for _ in range(length)]
    for queue in queues.values():
        for stay in queue:
            if 0 <= stay.first_use < length:
                needed[stay.first_use].append(stay)
    durations = _durations(plan)
    rates = _rates(plan, "disk" in queues)
    ended: dict[str, list[float]] = {channel: [] for channel in queues}  # loads, pass after pass
    ends: list[float] = []  # of accesses, pass after pass
    turns = {"": length, **{channel: len(queue) for channel, queue in queues.items()}}

    def advance(channel: str) -> bool:
        """Let the next load of a channel run, if what it waits for has happened."""
        queue, finished = queues[channel], ended[channel]
        turn, at = divmod(len(finished), len(queue))
        stay = queue[at]
        after = turn * length + stay.load_after
        if after >= len(ends) or turn > len(ends) // length + 1:
            return False
        begins = max(finished[-1] if finished else 0.0, ends[after] if after >= 0 else 0.0)
        source = stay.source.removeprefix("residence:")
        if source != stay.source and int(source) in places:
            their, position = places[int(source)]
            if len(ended[their]) <= turn * len(queues[their]) + position:
                return False
            begins = max(begins, ended[their][turn * len(queues[their]) + position])
        finished.append(begins + plan.table.load_latency_s + plan.items[stay.item].size_bytes / rates[channel])
        return True

    while len(ends) < _MOST_PASSES * length:
        while any(advance(channel) for channel in queues):
            pass
        turn, index = divmod(len(ends), length)
        begins = ends[-1] if ends else 0.0
        for stay in needed[index]:
            channel, at = places[stay.id]
            number = turn * len(queues[channel]) + at
            if len(ended[channel]) <= number:
                yield (
                    f"access {index} waits for residence {stay.id} of block {plan.table.blocks[plan.items[stay.item].block].name}, "
                    f"whose load waits for its turn on {channel}: nothing can move"
                )
                return
            begins = max(begins, ended[channel][number])
        ends.append(begins + durations[index])
        if len(ends) % length == 0 and _is_said(plan.prediction.pass_s, ends, ended, turns):
            break
    else:
        found, stated = (ends[-1] - ends[-1 - _MOST_PASSES // 2 * length]) / (_MOST_PASSES // 2), plan.prediction.pass_s
        if abs(found - stated) > _SAME * max(found, stated):
            yield f"the prediction says a pass of {stated:.6g} s, the rows say {found:.6g} s"
    compute_s, said = sum(durations), plan.prediction
    for what, stated, found in (
        ("compute", said.compute_s, compute_s),
        ("stall", said.stall_s, max(said.pass_s - compute_s, 0.0)),
        ("step", said.step_s, plan.workload.accumulation * said.pass_s + _optimizer_s(plan)),
    ):
        if abs(stated - found) > _SAME * max(said.pass_s, found):
            yield f"the prediction says {stated:.6g} s of {what}, the rows say {found:.6g} s"


def _is_said(pass_s: float, ends: list[float], ended: Mapping[str, list[float]], turns: Mapping[str, int]) -> bool:
    """Whether the last pass, or the mean of the last few that may take turns, is what was said, and comes again and again:
    not its accesses alone but its loads too, since what is brought ahead less and less hides for many passes.

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


def _rates(plan: Plan, reads_disk: bool) -> Mapping[str, float]:
    """Return bytes a second by channel. A card has one link: while the disk is read, its bytes have up to half of it."""
    table = plan.table
    host, disk = table.host_to_device_bytes_per_s, table.disk_bytes_per_s
    if table.device == "cuda":
        disk = min(disk, 0.5 * host)
        if reads_disk:
            host = host - disk
    return {"h2d": host, "d2h": table.device_to_host_bytes_per_s, "disk": disk}


def _durations(plan: Plan) -> list[float]:
    """Return the seconds of each access; the optimizer's counts once a step, not in a pass."""
    policies = plan.policies()
    on_host = {item.block for item in plan.items if item.kind == "weights" and item.home == "host"}

    def seconds(row: AccessRow) -> float:
        policy: Activations = policies.get(row.module, "keep")
        more = row.recompute_s if policy == "recompute" else row.offload_s if policy == "offload" else 0.0
        read = sum(rows.size_bytes for rows in row.rows if rows.block in on_host)
        over_link = 0.0 if plan.table.device == "cpu" else read / plan.table.host_to_device_bytes_per_s
        return row.time_s + more + over_link

    return [0.0 if row.kind == "optimizer" else seconds(row) for row in plan.table.accesses]


def _optimizer_s(plan: Plan) -> float:
    return sum(row.time_s for row in plan.table.accesses if row.kind == "optimizer")
