"""The judge's part on groups: micro-batches that pass each access one after another, replayed one by one.

Written for the judge alone: the solvers and the reports reckon it elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from memplan.program.schema import Plan


def group_faults(plan: Plan) -> Iterator[str]:
    """Yield why no group of this size can pass as the plan says."""
    if plan.group == 1:
        return
    if plan.group > plan.workload.accumulation:
        yield f"a group has {plan.group} micro-batches, a step {plan.workload.accumulation}"
    if 2 * plan.group <= plan.workload.accumulation and any(
        life.kind == "gradients" and life.born for life in plan.table.lifetimes
    ):
        yield f"the gradients of {plan.group} micro-batches are there for the next ones from the first access on"
    for item in plan.items:
        if item.kind != "weights":
            yield f"what {item.module} saves is offloaded, but each of {plan.group} micro-batches has its own"
    visit = _turn_around(plan)
    if visit is None:
        yield "the last forward and the first backward are not of one module: no group can pass them"
        return
    length, (first, last) = len(plan.table.accesses), visit
    in_ram = {item.block for item in plan.items if item.kind == "weights" and item.home == "host"}
    for access in plan.table.accesses[first : last + 1]:
        for block in access.blocks:
            stays = [
                stay
                for stay in plan.residences
                if (plan.items[stay.item].kind, plan.items[stay.item].block) == ("weights", block)
                and plan.arenas[stay.arena].tier == "device"
            ]
            through = any(
                stay.begins == "always"
                or any(stay.first_use <= first + turn and last + turn <= stay.last_use for turn in (0, length))
                for stay in stays
            )
            if not through and not (block in in_ram and access.reads_rows_of(block)):
                yield (
                    f"{plan.table.blocks[block].name} is not on the device from access {first} to {last}, which each "
                    f"micro-batch of a group passes before the next one"
                )
    for arena in plan.arenas:
        for number, segment in enumerate(arena.segments):
            for begins, ends in segment.absent:
                if begins <= last and first <= ends and not (begins <= first and last <= ends):
                    yield (
                        f"segment {number} of arena {arena.id} is absent from {begins} to {ends}, for part of a visit "
                        f"from {first} to {last}"
                    )


def device_bytes(plan: Plan) -> list[int]:
    """Return the most device bytes at each access, frozen weights apart: of each micro-batch what it has, while one
    passes and the others wait before it or behind it, in whichever group of a step has most.
    """
    table, policies, length = plan.table, plan.policies(), len(plan.table.accesses)
    its, shared, between = [0] * (length + 1), [0] * (length + 1), [0] * (length + 1)
    given = [0] * (length + 1)
    for life in table.lifetimes:
        if life.policy not in ("any", policies.get(table.accesses[life.born].module, "keep")):
            continue
        alive = its if life.kind == "activations" else shared
        alive[life.born] += life.size_bytes
        alive[life.last + 1] -= life.size_bytes
        if life.kind == "gradients":
            given[life.born] += life.size_bytes
            given[life.last + 1] -= life.size_bytes
        if life.kind == "activations":
            between[life.born + 1] += life.size_bytes  # it waits before the next access with this,
            between[life.last + 1] -= life.size_bytes  # and before the last one that holds it still
    its, shared, between = list(accumulate(its)), list(accumulate(shared)), list(accumulate(between))
    given = list(accumulate(given))
    fixed = sum(row.size_bytes for row in table.fixed if row.kind != "batch")
    batch = sum(row.size_bytes for row in table.fixed if row.kind == "batch")
    passing = []
    for row in table.accesses:
        policy = policies.get(row.module, "keep")
        transient = {"keep": row.transient_bytes, "recompute": row.transient_recompute_bytes}
        passing.append(its[row.index] + shared[row.index] + transient.get(policy, row.transient_offload_bytes))
    visit = _turn_around(plan) if plan.group > 1 else None
    # A smaller group behind the first one has each gradient from its first access on; so has the second micro-batch of
    # all, as the first is looked at by itself.
    sizes, rest = [(plan.group, [0] * length)], plan.workload.accumulation - plan.group
    if 0 <= rest < plan.group > 1:
        sizes.append((max(1, rest), [max(given) - there for there in given[:length]]))
    found = [0] * length
    for size, more in sizes:
        for index in range(length):
            first, last = visit if visit is not None and visit[0] <= index <= visit[1] else (index, index)
            waiting = [turn * between[last + 1] + (size - 1 - turn) * between[first] for turn in range(size)]
            most = max(passing[at] + more[at] for at in range(first, last + 1))
            found[index] = max(found[index], fixed + size * batch + most + max(waiting))
    return found


def _turn_around(plan: Plan) -> tuple[int, int] | None:
    """Return the last forward and the first backward with the loss between, which are of one module; None where they
    are not.
    """
    rows = plan.table.accesses
    for before, loss, behind in zip(rows, rows[1:], rows[2:], strict=False):
        if loss.kind == "loss":
            is_one = before.kind == "forward" and behind.kind == "backward" and behind.forward == before.index
            return (before.index, behind.index) if is_one else None
    return None
