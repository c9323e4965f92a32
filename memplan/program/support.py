"""What this version runs of what a plan may say: the one rule for who makes a plan and for who attaches it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from memplan.errors import PlanMismatchError
from memplan.program.schema import Plan

ELASTIC_DEVICES = ("cpu",)
"""Devices whose arena gives bytes back unless told otherwise: no GPU has proven what does so."""


def require_supported(plan: Plan) -> None:
    """Raise PlanMismatchError where a plan that holds has what this version does not run."""
    fault = next(_unsupported(plan), None)
    if fault is not None:
        raise PlanMismatchError(f"{fault}: make the plan again with this version")


def _unsupported(plan: Plan) -> Iterator[str]:
    devices = [arena.id for arena in plan.arenas if arena.tier == "device"]
    if len(devices) > 1:
        yield (f"the plan has the arenas {', '.join(map(str, devices))} on the device, and this version runs one there")
    for arena in plan.arenas:  # of the host there may be several: one that is pinned, one that is not
        ends = [0, *accumulate(segment.size_bytes for segment in arena.segments)]
        follow = all(segment.offset_bytes == end for segment, end in zip(arena.segments, ends, strict=False))
        if not follow or (arena.tier == "host" and len(arena.segments) > 1):
            yield (
                f"arena {arena.id} of the plan ({arena.tier}) has {len(arena.segments)} segments, and this version "
                "runs one that begins at 0, on the device several that follow one another"
            )
    comes_and_goes = [
        (arena.id, segment.offset_bytes, segment.offset_bytes + segment.size_bytes)
        for arena in plan.arenas
        for segment in arena.segments
        if segment.absent
    ]
    for address in plan.addresses:
        item, offset = plan.items[address.item], address.offset_bytes
        if item.kind != "weights" and any(a == address.arena and b <= offset < e for a, b, e in comes_and_goes):
            yield (
                f"the plan keeps what {item.module} saved in bytes that are given back for part of a micro-batch, "
                "which this version does for weights alone"
            )
    if plan.group > 1 and any(item.kind == "saved" for item in plan.items):
        yield (
            f"the plan has groups of {plan.group} micro-batches and offloads activations, of which this version does "
            "one alone"
        )
    for stay in plan.residences:
        item = plan.items[stay.item]
        if item.kind == "boundary" or (item.kind == "weights" and stay.source.startswith("residence:")):
            yield (
                f"residence {stay.id} of the plan (begins {stay.begins}, from {stay.source or 'nowhere'}, ends "
                f"{stay.ends}) is of a kind that this version cannot run"
            )
