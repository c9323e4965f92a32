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
from itertools import accumulate

from msgspec.structs import replace

from memplan.analyze.graph import Activations, Lifetime
from memplan.cost.table import CostTable


def grouped(table: CostTable, group: int, accumulation: int) -> CostTable:
    """Return the rows of groups of so many micro-batches, of ``accumulation`` in a step. Raises ValueError where there
    can be none of such rows.

    Gradients of adapters are there from the first access on where a micro-batch went before in the step. In a step's
    first group, each comes where the first micro-batch makes it; what a smaller group behind it has more than that is
    counted where it has it.
    """
    if group < 1 or (group > 1 and table.turn_around is None):
        raise ValueError(f"groups of {group} micro-batches cannot pass these accesses")
    if group == table.group == 1:
        return table
    others = [life for life in table.lifetimes if life.kind != "gradients"]
    lifetimes = sorted([*others, *_gradients(table, group, accumulation)], key=_order)
    return replace(table, group=group, lifetimes=tuple(lifetimes))


def _gradients(table: CostTable, group: int, accumulation: int) -> list[Lifetime]:
    given = [life for life in table.lifetimes if life.kind == "gradients"]
    last = max((life.last for life in given), default=0)
    totals = Counter[str]()
    for life in given:
        if life.last == last:  # others are a smaller group's, where these are rows of groups
            totals[life.policy] += life.size_bytes
    of_all = totals.pop("any", 0)
    # What the first access has from the beginning is said once for each policy where its module has a choice.
    total = of_all + max(totals.values(), default=0)
    is_first = accumulation < 2 * group  # no other of its size is behind it
    made = [(row.index, row.gradient_bytes) for row in table.accesses if row.gradient_bytes] if is_first else []
    before = total - sum(size_bytes for _, size_bytes in made)
    if before < 0:
        before, made = total, []
    lives = [(born, last, size_bytes) for born, size_bytes in ((0, before), *made)]
    if made and group > 1:
        # One at least: the first micro-batch of all is looked at by itself, and where a run is resumed there is
        # an optimizer's state by then.
        lives += _of_smaller(replace(table, group=group), made, group - max(1, accumulation - group))
    return [
        Lifetime(kind="gradients", born=born, last=last, size_bytes=size_bytes, policy="any")
        for born, last, size_bytes in lives
        if size_bytes
    ]


def _of_smaller(table: CostTable, made: list[tuple[int, int]], fewer: int) -> list[tuple[int, int, int]]:
    """Return what a group of ``fewer`` micro-batches less has at accesses beyond those of the table's size: gradients
    that are yet to be made there, less what the fewer ones that wait have at least, whatever becomes of activations.
    """
    length = len(table.accesses)
    waiting: dict[tuple[str, str], list[int]] = {}
    for life in table.lifetimes:
        if life.kind == "activations":
            module = table.accesses[life.born].module if life.policy != "any" else ""
            changes = waiting.setdefault((module, life.policy), [0] * (length + 1))
            changes[life.born + 1] += life.size_bytes
            changes[life.last + 1] -= life.size_bytes
    least = [0] * (length + 1)
    for module in {module for module, _ in waiting}:
        policies: tuple[str, ...] = ("any",)
        if module:
            policies = ("keep", "recompute") if module in table.recomputable else ("keep",)
        bytes_of = [accumulate(waiting.get((module, policy), [0] * (length + 1))) for policy in policies]
        least = [held + min(each) for held, each in zip(least, zip(*bytes_of, strict=True), strict=True)]
    missing, found, sizes_at = sum(size_bytes for _, size_bytes in made), [], dict(made)
    for index in range(length):
        missing -= sizes_at.get(index, 0)
        first, last = table.visit(index)
        saved = fewer * (max(least[first], least[last + 1]) + table.batch_bytes)
        found.append((index, index, max(0, missing - saved)))
    return found


def size_beside_gradients(table: CostTable, policies: Mapping[str, Activations], *, at_each: bool) -> int:
    """Return the largest group that needs no more than the table's, though all gradients are there; ``at_each`` access,
    where arenas come and go, else at the peak. ``policies``: as in :meth:`CostTable.device_bytes`.
    """
    given, last = [0] * (len(table.accesses) + 1), 0
    for life in table.lifetimes:
        if life.kind == "gradients":
            given[life.born] += life.size_bytes
            given[life.last + 1] -= life.size_bytes
            last = max(last, life.last)
    total = max(accumulate(given))
    others = [life for life in table.lifetimes if life.kind != "gradients"]
    there = Lifetime(kind="gradients", born=0, last=last, size_bytes=total, policy="any")
    room = table.device_bytes(policies)
    room = room if at_each else [max(room)] * len(room)
    for size in range(table.group, 1, -1):
        needed = replace(table, group=size, lifetimes=(*others, there)).device_bytes(policies)
        if all(a <= b for a, b in zip(needed, room, strict=True)):
            return size
    return 1


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
