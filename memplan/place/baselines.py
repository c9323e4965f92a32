"""Other ways of placing, as arrangements: what each would take on the same timeline.

As they are published or in use. Each has what the plan has: the same blocks, room, links and, between all activations
kept and all recomputed, the better.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, get_args

from memplan.place.evaluator import Candidate, Evaluator
from memplan.place.generators import CandidateGenerator, Candidates
from memplan.place.layout.layout import Arrangement, arrangement_of
from memplan.place.layout.ring_layout import homes_of, read_in_place
from memplan.place.problem import Problem, evenly

Baseline = Literal["all streamed", "first resident", "spread in equal slots", "accelerate's device map"]
"""``all streamed``: two slots, nothing stays. ``first resident``: as many of the first blocks stay as there is room for
beside two slots. ``spread in equal slots``: those that stay lie evenly between the others, which take two slots of the
greatest one's size in turn. ``accelerate's device map``: the first blocks stay as in ``infer_auto_device_map``, which
leaves room for the greatest; the others come when they are called, each time, with nothing ahead (accelerate's own
hooks do so)."""

WAYS: tuple[Baseline, ...] = get_args(Baseline)

_SLOTS = 2


def generator_of(way: Baseline) -> CandidateGenerator:
    """Return what proposes a way of placing alone: with all activations kept, and with all recomputed."""

    def propose(evaluator: Evaluator) -> Candidates:
        for level in (0, len(evaluator.rooms) - 1):
            arrangement = _arrange_as(way, evaluator.problem, evaluator.rooms[level])
            if arrangement is not None:
                yield Candidate(level, None, arrangement)

    return propose


def _arrange_as(way: Baseline, problem: Problem, room_bytes: int) -> Arrangement | None:
    """Return the arrangement of a way of placing in a room; None where it needs more, or more RAM and disk."""
    on_demand = way == "accelerate's device map"
    in_place = set() if on_demand else read_in_place(problem)
    bundles = [bundle for bundle in problem.bundles if in_place.isdisjoint(bundle)]
    free_bytes = room_bytes - problem.room(problem.resident)
    bytes_of = [problem.room(bundle) for bundle in bundles]
    if free_bytes >= sum(bytes_of):
        return _arranged(problem, bundles, range(len(bundles)), 0, in_place, on_demand=False)
    greatest = max(bytes_of, default=0)
    slots = 1 if on_demand else _SLOTS
    for_residents = free_bytes - slots * greatest
    if for_residents < 0:
        return None
    if way == "all streamed":
        return _arranged(problem, bundles, (), greatest, in_place, on_demand=False)

    def chosen(count: int) -> Sequence[int]:
        return evenly(count, len(bundles)) if way == "spread in equal slots" else range(count)

    count = next(n for n in range(len(bundles), -1, -1) if sum(bytes_of[i] for i in chosen(n)) <= for_residents)
    return _arranged(problem, bundles, chosen(count), greatest, in_place, on_demand=on_demand)


def _arranged(
    problem: Problem,
    bundles: Sequence[tuple[int, ...]],
    residents: Sequence[int],
    slot_bytes: int,
    in_place: set[int],
    *,
    on_demand: bool,
) -> Arrangement | None:
    stays = set(residents)
    streamed = [bundle for index, bundle in enumerate(bundles) if index not in stays]
    homes = homes_of(problem, problem.in_order(block for bundle in streamed for block in bundle), in_place)
    if homes is None:
        return None
    slots = 1 if on_demand else _SLOTS
    offsets: dict[int, int] = {}
    for turn, bundle in enumerate(streamed):
        top = turn % slots * slot_bytes
        for block in bundle:
            offsets[block] = top
            top += problem.sizes_bytes[block]
    region_bytes = min(slots, len(streamed)) * slot_bytes
    return arrangement_of(problem, offsets, homes, region_bytes, on_demand=on_demand)
