"""The judge's view of ranks: the RAM of a node, and the all-reduce behind the last backward."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from memplan.program.check.page_locks import stages
from memplan.program.schema import Plan
from memplan.units import ALIGNMENT_BYTES


def host_bytes(plan: Plan) -> int:
    """Return the bytes of RAM that a node needs: frozen weights once, everything else for each of its ranks."""
    each = sum(life.size_bytes for life in plan.table.lifetimes if life.kind == "optimizer")
    each += plan.staging_bytes if stages(plan) else 0
    there = 0
    for arena in plan.arenas:
        if arena.tier == "host":
            own = [a for a in plan.addresses if a.arena == arena.id and plan.items[a.item].kind != "weights"]
            own_bytes = sum(-(-address.size_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES for address in own)
            own_bytes = min(own_bytes, arena.size_bytes)  # where it ends with the last tensor's own end
            there += arena.size_bytes - own_bytes
            each += own_bytes
    return there + each * max(1, plan.table.ranks.per_node)


def rank_faults(plan: Plan) -> Iterator[str]:
    """Yield what ranks cannot be."""
    ranks = plan.table.ranks
    if ranks.nodes < 1 or ranks.per_node < 1:
        yield f"there are {ranks.nodes} nodes of {ranks.per_node} ranks: at least one of each trains"
    if ranks.count > 1 and plan.group > 1:
        yield f"groups are of {plan.group} micro-batches, which several ranks pass one by one"
    if ranks.count == 1 and ranks.reduces:
        yield "gradients are summed over the ranks, but there is one"
    for reduce in ranks.reduces:
        if not 0 <= reduce.after < len(plan.table.accesses):
            yield f"gradients are summed after access {reduce.after}, which is not there"
        if not reduce.time_s >= 0 or reduce.size_bytes < 0:
            yield f"gradients of {reduce.size_bytes} bytes are summed in {reduce.time_s} s"


def unhidden_s(plan: Plan, ends_s: Sequence[float]) -> list[float]:
    """Return by how much the all-reduce outlasts each of the last few micro-batches, if that were the last of a step.

    ``ends_s``: of accesses, micro-batch after micro-batch.
    """
    length, found = len(plan.table.accesses), []
    for last in range(len(ends_s), max(0, len(ends_s) - 4 * length), -length):
        ends = ends_s[last - length : last]
        finished = -1.0
        for reduce in plan.table.ranks.reduces:
            finished = reduce.time_s + (ends[reduce.after] if ends[reduce.after] > finished else finished)
        found.append(finished - ends[-1] if finished > ends[-1] else 0.0)
    return found
