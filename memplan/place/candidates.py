"""The rings that a search tries for each number of recomputed layers: the least vram is the least of them, too."""

from __future__ import annotations

from collections.abc import Iterator

from memplan.place.layout.ring_layout import LayoutRecipe
from memplan.place.problem import Problem

TIMES = (2.0, 1.0, 3.0, 5.0, 8.0)
"""Sizes of the shared region that are tried first, in units of the least."""
_PART = 0.25
"""Size of a tail in units of the middle bundle, where bundles are of several blocks."""
_HALF = 0.5
"""Share of what is streamed up to which there are tails, beside all of it."""


def rings(problem: Problem, *, every: bool = True, tails: bool = False) -> Iterator[LayoutRecipe]:
    """Yield the rings that are tried for a number of recomputed modules: what the least vram is the least of, too.
    Fewer, where not ``every``, tell which numbers are worth the others. ``tails``: those with tails instead.
    """
    in_parts = any(len(bundle) > 1 for bundle in problem.bundles)
    may_be_disk = problem.budgets.disk_bytes is None or problem.budgets.disk_bytes > 0
    total = sum(problem.sizes_bytes[block] for block in (*problem.movable, *problem.forced))
    mixed = may_be_disk and problem.ram_bytes < total + problem.staging_bytes
    mixed = mixed or "disk" in problem.pins.values()
    for times in TIMES if every else TIMES[:2]:
        ring = LayoutRecipe(times, "bundle", 0)
        if tails:
            yield ring._replace(tails=1.0)
            if every:
                yield ring._replace(tails=1.0, most=_HALF)
            if every and in_parts:
                yield ring._replace(tails=_PART)
            continue
        yield ring
        if in_parts:
            yield ring._replace(grain="block")
        if mixed:
            yield ring._replace(disk_bundles=1)
            yield ring._replace(disk_bundles=2)
