"""The micro-batches of a group share each load: they pass an access one after another, then the next one.

The rows of a group are those of one micro-batch and the group's size. What follows from it: an access takes the sum of
its micro-batches' times. Of activations there are, for each micro-batch that waits, those that cross from one access to
the next, and for the one that passes what it has at the access: while the first passes all others wait before the
access, while the last does all others wait behind it, and between the two the sum changes evenly, so that one of these
is the most. Gradients of adapters, the optimizer's state and weights are there once. The turn-around
(:attr:`memplan.cost.table.CostTable.turn_around`) is passed in one visit, as if it were one access.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from msgspec.structs import replace

from memplan.analyze.graph import Activations, Lifetime
from memplan.cost.table import CostTable


def grouped(table: CostTable, group: int, accumulation: int) -> CostTable:
    """Return the rows of groups of so many micro-batches, of ``accumulation`` in a step. Raises ValueError where there
    can be none of such rows.

    Gradients of adapters are there from the first access on where a micro-batch went before in the step. Where all of
    them are one group, each comes where the first one makes it.
    """
    if group < 1 or (group > 1 and table.turn_around is None):
        raise ValueError(f"groups of {group} micro-batches cannot pass these accesses")
    if group == table.group == 1:
        return table
    others = [life for life in table.lifetimes if life.kind != "gradients"]
    lifetimes = sorted([*others, *_gradients(table, is_sole=group == accumulation)], key=_order)
    return replace(table, group=group, lifetimes=tuple(lifetimes))


def _gradients(table: CostTable, *, is_sole: bool) -> list[Lifetime]:
    given = [life for life in table.lifetimes if life.kind == "gradients"]
    totals = Counter[str]()
    for life in given:
        totals[life.policy] += life.size_bytes
    of_all = totals.pop("any", 0)
    # What the first access has from the beginning is said once for each policy where its module has a choice.
    total, last = of_all + max(totals.values(), default=0), max((life.last for life in given), default=0)
    made = [(row.index, row.gradient_bytes) for row in table.accesses if row.gradient_bytes] if is_sole else []
    before = total - sum(size_bytes for _, size_bytes in made)
    return [
        Lifetime(kind="gradients", born=born, last=last, size_bytes=size_bytes, policy="any")
        for born, size_bytes in ([(0, total)] if before < 0 else [(0, before), *made])
        if size_bytes
    ]


def _order(life: Lifetime) -> tuple[int, int, str, str]:
    return life.born, life.last, life.kind, life.policy


def sizes(accumulation: int) -> tuple[int, ...]:
    """Return the sizes of groups that are worth a look where a step has so many micro-batches, the smallest first:
    what divides it, and powers of two.
    """
    return tuple(n for n in range(1, accumulation + 1) if accumulation % n == 0 or n & (n - 1) == 0)


def copies_at(
    table: CostTable, policies: Mapping[str, Activations], index: int
) -> tuple[int, list[tuple[Lifetime, int]]]:
    """Return the access within the visit of ``index`` that needs most, and what is alive at its peak, each with how
    often it is there: for the micro-batch that passes, and for those that wait.
    """
    first, last = table.visit(index)
    alone = replace(table, group=1).device_bytes(policies)
    at = max(range(first, last + 1), key=alone.__getitem__)
    alive, before, behind = [], [], []
    for life in table.lifetimes:
        if life.policy not in ("any", policies.get(table.accesses[life.born].module, "keep")):
            continue
        if life.born <= at <= life.last:
            alive.append(life)
        if life.kind == "activations" and life.born < first <= life.last:
            before.append(life)
        if life.kind == "activations" and life.born <= last < life.last:
            behind.append(life)
    waiting = max((before, behind), key=lambda lives: sum(life.size_bytes for life in lives))
    return at, [(life, 1) for life in alive] + [(life, table.group - 1) for life in waiting if table.group > 1]
