"""What lies in each tier at every access of a pass, by kind: the plan's own peaks, taken apart.

Sums are those of the plan's check: of the arenas what is there, and beside the device's what is fixed, the lifetimes
that are alive and the transient of the access. No kind is ever negative. Where a transient is (what is born and what
dies in an access need not be alive at once), the lifetimes that begin or end in it are shown by so much less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import accumulate

from memplan.analyze.graph import AccessKind, Lifetime
from memplan.cost.table import AccessRow, CostTable
from memplan.program.schema import Plan, Tier
from memplan.units import align_up

ACTIVATION_KINDS = ("kept", "boundaries", "recomputed", "logits", "passing", "activations")
"""Of the device's kinds those that a plan's ``vram_parts`` count as activations, where they are no workspace there."""

DEVICE_KINDS = (
    "weights",
    "streamed",
    "offloaded",
    "idle",
    "adapters",
    "gradients",
    "optimizer",
    "buffers",
    "batch",
    "context",
    "communication",
    *ACTIVATION_KINDS,
    "workspace",
)
"""What device bytes are counted by.

``weights``: frozen blocks that always lie there. ``streamed``: others, from the start of their load to their last use.
``offloaded``: saved activations, in their slots. ``idle``: what nothing lies in of the arena. ``kept``: what layers
that keep save for their backward. ``boundaries``: what recomputed and offloaded layers leave there from their forward
on. ``recomputed``: what a backward has recomputed. ``logits``: what the head and the loss make, their own workspace and
the gradients of the logits included. ``passing``: gradients between layers. ``activations``: those of modules whose
policy memplan cannot set. ``workspace``: what else an access needs for itself.
"""
HOST_KINDS = ("weights", "offloaded", "idle", "optimizer", "staging")
"""What host bytes are counted by: blocks at home there, offloaded activations from when they leave the device, the room
of the optimizer's state where it waits there between steps."""

_TAKEN_FIRST = ("passing", "recomputed", "kept", "boundaries", "activations", "logits", "gradients")
"""The order in which what meets in an access, but is not there at once, is taken from kinds."""

_Sums = dict[str, list[int]]
"""Bytes by kind and access."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Bytes at the peak of one access."""

    index: int
    kind: AccessKind
    module: str
    """Empty for the loss and the optimizer."""
    vram: Mapping[str, int]
    """By ``DEVICE_KINDS``."""
    ram: Mapping[str, int]
    """By ``HOST_KINDS``."""
    disk_bytes: int
    """Of blocks at home on the disk."""

    @property
    def vram_bytes(self) -> int:
        return sum(self.vram.values())

    @property
    def ram_bytes(self) -> int:
        return sum(self.ram.values())


def timeline(plan: Plan) -> tuple[Moment, ...]:
    """Return the bytes at every access of a pass. The greatest ``vram_bytes`` and ``ram_bytes`` are the plan's
    peaks.
    """
    rows = plan.table.accesses
    device, host = _arena(plan, "device"), _arena(plan, "host")
    beside = _beside(plan)
    on_disk = sum(item.size_bytes for item in plan.items if item.home == "disk")
    is_staged = on_disk or any(arena.pageable for arena in plan.arenas)
    host["optimizer"] = [plan.table.state_on_host_bytes] * len(rows)
    host["staging"] = [plan.staging_bytes if is_staged else 0] * len(rows)
    each = plan.ranks.per_node  # weights lie on a node once, all else is each rank's; idle is room of activations
    host |= {kind: [each * size for size in host[kind]] for kind in HOST_KINDS if kind != "weights"}
    vram = {kind: device.get(kind) or beside.get(kind) or [0] * len(rows) for kind in DEVICE_KINDS}
    return tuple(
        Moment(
            index=row.index,
            kind=row.kind,
            module=row.module,
            vram={kind: vram[kind][row.index] for kind in DEVICE_KINDS},
            ram={kind: host[kind][row.index] for kind in HOST_KINDS},
            disk_bytes=on_disk,
        )
        for row in rows
    )


# ---- what lies in an arena ------------------------------------------------------------------------------------------


def _arena(plan: Plan, tier: Tier) -> _Sums:
    """Return what lies in a tier's arenas. A stay lasts from the access after which its load may start to its last
    use.
    """
    length = len(plan.table.accesses)
    arenas = {arena.id: arena for arena in plan.arenas if arena.tier == tier}
    always, spans = 0, dict[str, list[tuple[int, int, int]]]()
    for stay in plan.residences:
        if stay.arena not in arenas:
            continue
        item = plan.items[stay.item]
        if stay.begins == "always":
            always += align_up(item.size_bytes)
            continue
        kind = "streamed" if item.kind == "weights" else "offloaded"
        spans.setdefault(kind, []).extend(_wrapped(stay.load_after + 1, stay.last_use, item.size_bytes, length))
    totals = [sum(arena.size_bytes_at(index) for arena in arenas.values()) for index in range(length)]
    always = min([always, *totals])  # where an arena ends with the last tensor's own end
    found = {kind: _sums(spans.get(kind, ()), length) for kind in ("streamed", "offloaded")}
    found["weights"] = [always] * length
    found["idle"] = [total - sum(found[kind][index] for kind in found) for index, total in enumerate(totals)]
    return found


def _wrapped(first: int, last: int, size_bytes: int, length: int) -> Iterator[tuple[int, int, int]]:
    """Yield a stay's accesses within the pass: those beyond its ends are of the next pass, or of the one before."""
    for shift in (-length, 0, length):
        begin, end = max(first + shift, 0), min(last + shift, length - 1)
        if begin <= end:
            yield begin, end, size_bytes


# ---- what lies beside it --------------------------------------------------------------------------------------------


def _beside(plan: Plan) -> _Sums:
    table, policies = plan.table, plan.policies()
    length = len(table.accesses)
    spans = dict[str, list[tuple[int, int, int]]]()
    meeting = dict[str, list[tuple[int, int, int]]]()
    saved = [0] * length  # what recomputing spares, by forward
    heads = _heads(table)
    for life in table.lifetimes:
        born = table.accesses[life.born]
        if life.kind == "activations" and life.policy in ("keep", "recompute"):
            saved[life.born] += life.size_bytes if life.policy == "keep" else -life.size_bytes
        policy = policies.get(born.module, "keep")
        if life.policy not in ("any", policy):
            continue
        kind = _kind(life, born, heads)
        spans.setdefault(kind, []).append((life.born, life.last, life.size_bytes))
        for index in {life.born, life.last}:
            meeting.setdefault(kind, []).append((index, index, life.size_bytes))
    found = {kind: _sums(listed, length) for kind, listed in spans.items()}
    edges = {kind: _sums(listed, length) for kind, listed in meeting.items()}
    for fixed in table.fixed:
        found[fixed.kind] = [size + fixed.size_bytes for size in found.get(fixed.kind, [0] * length)]
    for kind in ("batch", "recomputed", "logits", "workspace"):
        found.setdefault(kind, [0] * length)
    for row in table.accesses:
        policy = policies.get(row.module, "keep")
        transient = row.transient(policy)
        if transient < 0:
            _take(-transient, row.index, found, edges)
            continue
        again = 0
        if row.kind == "backward" and policy == "recompute":
            again = max(0, min(transient, saved[row.forward]))
        found["recomputed"][row.index] += again
        own = "logits" if row.kind == "loss" or row.index in heads else "workspace"
        found[own][row.index] += transient - again
    return found if plan.group == 1 else _grouped(plan, found, heads)


def _grouped(plan: Plan, alone: _Sums, heads: frozenset[int]) -> _Sums:
    """Return the bytes of a group from those of one micro-batch ``alone``: with what the others hold that wait, before
    an access or behind it, whichever is more. A visit of several accesses is shown as the one that needs most.
    """
    table, policies, others = plan.table, plan.policies(), plan.group - 1
    length = len(table.accesses)
    crossing = dict[str, list[tuple[int, int, int]]]()
    for life in table.lifetimes:
        born = table.accesses[life.born]
        if life.kind == "activations" and life.policy in ("any", policies.get(born.module, "keep")):
            crossing.setdefault(_kind(life, born, heads), []).append((life.born + 1, life.last, life.size_bytes))
    waits = {kind: _sums(spans, length + 1) for kind, spans in crossing.items()}
    totals = [sum(sizes[index] for sizes in waits.values()) for index in range(length + 1)]
    found = {kind: list(sizes) for kind, sizes in alone.items()}
    for index in range(length):
        first, last = table.visit(index)
        at = max(range(first, last + 1), key=lambda at: sum(sizes[at] for sizes in alone.values()))
        where = first if totals[first] >= totals[last + 1] else last + 1
        for kind, sizes in alone.items():
            found[kind][index] = sizes[at] + others * (waits[kind][where] if kind in waits else 0)
        found["batch"][index] += others * table.batch_bytes
    return found


def _kind(life: Lifetime, born: AccessRow, heads: frozenset[int]) -> str:
    if life.kind != "activations":
        return life.kind
    if born.kind == "loss" or born.index in heads:
        return "logits"
    if born.kind != "forward":
        return "passing"
    if life.policy == "any":
        return "activations"
    return "kept" if life.policy == "keep" else "boundaries"


def _heads(table: CostTable) -> frozenset[int]:
    """Return the forwards that make logits: of the head, or of the last that reads a shared table whole."""
    forwards = [row for row in table.accesses if row.kind == "forward"]
    heads = {row.index for row in forwards if any(table.blocks[block].kind == "head" for block in row.blocks)}
    if forwards and not heads:
        last = forwards[-1]
        heads = {
            last.index
            for block in last.blocks
            if table.blocks[block].kind == "shared" and not last.reads_rows_of(block)
        }
    return frozenset(heads)


def _take(owed: int, index: int, found: _Sums, edges: _Sums) -> None:
    """Take from an access what is not there at its peak: from what begins or ends in it, else from whatever there
    is.
    """
    for limits in (edges, found):
        for kind in (*_TAKEN_FIRST, *found):
            if owed and kind in found and kind in limits:
                taken = min(owed, found[kind][index], limits[kind][index])
                found[kind][index] -= taken
                owed -= taken


def _sums(spans: Iterable[tuple[int, int, int]], length: int) -> list[int]:
    """Return the bytes alive at each access, of spans of (first, last, bytes)."""
    steps = [0] * (length + 1)
    for first, last, size_bytes in spans:
        steps[first] += size_bytes
        steps[last + 1] -= size_bytes
    return list(accumulate(steps))[:length]
