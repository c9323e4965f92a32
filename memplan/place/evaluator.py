"""The evaluator: what a pass takes under a candidate. It knows the best so far, and times nothing that cannot beat it.

What cannot is told by its compute and by its bytes on each channel alone; what was timed once is not timed again.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

from memplan.device_kinds import is_apart
from memplan.place.layout.layout import Arrangement, Key, Stay, channel_of, stays_of
from memplan.place.layout.page_lock import NOTHING, Pageable, pageable_of
from memplan.place.layout.ring_layout import LayoutRecipe, Rings
from memplan.place.problem import Bytes, Problem, nonweight_bytes, policies_for
from memplan.program.timeline import Load, durations, load_s, simulate, slowed

TIE = 1e-4
"""Passes that differ by less are the same: no cost row is known so well. Then fewer bytes moved win."""


class Candidate(NamedTuple):
    """What a generator proposes: a number of recomputed modules, and a recipe or an arrangement."""

    level: int
    recipe: LayoutRecipe | None
    """What the arrangement is made by; None where nothing but itself says."""
    arrangement: Arrangement | None = None
    """None: as the recipe makes it in all the room that the level leaves."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Choice:
    """An arrangement, with its number of recomputed modules and what a pass under it takes."""

    arrangement: Arrangement
    level: int
    recipe: LayoutRecipe | None
    pass_s: float
    moved_bytes: int
    """Bytes that cross the links in a pass."""

    def ties(self, percent_bytes: int) -> tuple[int, int, int, int, int]:
        """What decides between equal passes: bytes moved (to the percent), recomputes, bytes on the disk, bytes off the
        device, and blocks.
        """
        on_disk = self.arrangement.disk_bytes
        off_bytes = self.arrangement.host_bytes + on_disk
        moved = self.moved_bytes // max(percent_bytes, 1)
        return (moved, self.level, on_disk, off_bytes, len(self.arrangement.homes))


class Evaluator:
    """What was timed so far, and the best of it."""

    def __init__(
        self, problem: Problem, *, below_s: float | None = None, elastic: bool = False, near: int | None = None
    ) -> None:
        """``below_s``: a choice that takes longer is none. ``elastic``: whether the device arena may have tails.
        ``near``: a number of recomputed modules that is known to be about the best.
        """
        self.problem = problem
        self.rings = Rings(problem)
        self.elastic = elastic
        self.near = near
        self.tails = False
        """Whether the recipes of this round have tails."""
        self.below_s = math.inf if below_s is None else below_s
        self.best_s = self.below_s
        """Of what was timed; at first what must be beaten."""
        self.timed: list[Choice] = []
        self._level_s: dict[int, float] = {}
        self._sweeps = _sweeps(problem)
        self._room_at = [problem.budgets.vram_bytes - bytes_at for bytes_at in nonweight_bytes(problem)]
        self.rooms = [int(room_at.min()) for room_at in self._room_at]
        """Bytes for weights that every access leaves, by level."""
        self._times: dict[int, tuple[list[float], float]] = {}
        self._load_s = {
            (block.id, name, disk_used, pageable): load_s(problem.table, block.size_bytes, name, disk_used, pageable)
            for block in problem.table.blocks
            for name in (channel_of("host"), channel_of("disk"))
            for disk_used in (False, True)
            for pageable in ((False,) if problem.page_lock_bytes is None else (False, True))
        }
        self._known: dict[tuple[Key, int], Choice | None] = {}
        self._stays: dict[Key, tuple[list[Stay], Pageable] | None] = {}
        self._saves = cache(partial(problem.saves.loads, problem.table))

    # ---- what generators ask -----------------------------------------------------------------------------------------

    def begin_round(self, *, tails: bool) -> None:
        """Forget which levels were looked at, and have recipes with or without tails."""
        self.tails = tails
        self._level_s = {}

    def levels(self) -> list[int]:
        """Return the levels that were looked at in this round, the shortest pass first, then the most room."""
        return sorted(self._level_s, key=lambda level: (self._level_s[level], -self.rooms[level], level))

    def spare_bytes(self, level: int) -> Bytes:
        """Return the room at each access beside that of the access with the least."""
        return self._room_at[level] - self.rooms[level]

    def is_best(self, level: int | None = None) -> bool:
        """Whether nothing can be shorter: of a level, or of all."""
        least_s = self.least_of_all_s if level is None else self.least_s(level)
        return self.best_s <= least_s * (1 + TIE)

    @property
    def least_of_all_s(self) -> float:
        """The least of :meth:`least_s`."""
        return min(self.least_s(level) for level in range(len(self.rooms)))

    def least_s(self, level: int) -> float:
        """Return a pass time in s that no arrangement beats: of what a sweep reads, what has no room has to come."""
        table, room_at, least = self.problem.table, self._room_at[level], self.rooms[level]
        moved = sum(max(swept - (int(room_at[at]) if self.elastic else least), 0) for at, swept in self._sweeps)
        together = table.host_to_device_bytes_per_s + (table.disk_bytes_per_s if self.problem.disk_may_help else 0.0)
        return max(self.compute_s(level), moved / together)

    def compute_s(self, level: int) -> float:
        """Return the compute of a pass in s."""
        return self._durations(level)[1]

    def chosen(self) -> Choice | None:
        """Return the best of what was timed."""
        equal = self.best_s * (1 + TIE)
        percent_bytes = sum(self.problem.sizes_bytes) // 100
        return min(
            (choice for choice in self.timed if choice.pass_s <= equal),
            key=lambda choice: (*choice.ties(percent_bytes), choice.pass_s),
            default=None,
        )

    # ---- what a candidate takes --------------------------------------------------------------------------------------

    def judge(self, candidate: Candidate) -> Choice | None:
        """Return the candidate with what its pass takes, or None where it does not fit or cannot be the best."""
        level, recipe, arrangement = candidate
        self._level_s.setdefault(level, math.inf)
        if self.least_s(level) > self.best_s * (1 + TIE) or (self.tails and self.is_best(level)):
            return None
        if arrangement is None and recipe is not None:
            arrangement = self.rings.arrange(recipe, self.rooms[level], self.spare_bytes(level))
        if arrangement is None:
            return None
        key = (arrangement.key, level)
        if key not in self._known:
            self._known[key] = self._time(arrangement, level, recipe)
        found = self._known[key]
        if found is not None:
            self._level_s[level] = min(self._level_s[level], found.pass_s)
        return found

    def _durations(self, level: int) -> tuple[list[float], float]:
        if level not in self._times:
            times = durations(self.problem.table, policies_for(self.problem, level))
            self._times[level] = (times, sum(times))
        return self._times[level]

    def _durations_with_rows(self, arrangement: Arrangement, level: int, slow: Pageable) -> tuple[list[float], float]:
        on_host = arrangement.key[1]
        times = durations(self.problem.table, policies_for(self.problem, level), on_host, slow.blocks)
        return times, sum(times)

    def _time(self, arrangement: Arrangement, level: int, recipe: LayoutRecipe | None) -> Choice | None:
        times, compute_s = self._durations(level)
        reads_rows = arrangement.rows_bytes and is_apart(self.problem.table.device)
        if reads_rows:
            times, compute_s = self._durations_with_rows(arrangement, level, NOTHING)
        too_long_s = self.best_s * (1 + TIE)
        if compute_s > too_long_s or self._least_loads_s(arrangement) > too_long_s:
            return None
        if arrangement.key not in self._stays:
            self._stays[arrangement.key] = self._moved(arrangement)
        moved = self._stays[arrangement.key]
        if moved is None:
            return None
        stays, pageable = moved
        if reads_rows and pageable.blocks:
            times, compute_s = self._durations_with_rows(arrangement, level, pageable)
        disk_used = arrangement.reads_disk
        stores, back = self._saves(disk_used, pageable.modules)
        loads: dict[str, list[Load]] = {"d2h": stores} if stores else {}
        moved_bytes = arrangement.rows_bytes
        for stay in stays:
            channel = channel_of(arrangement.homes[stay.block])
            slow = pageable.rings if channel == "disk" else stay.block in pageable.blocks
            load = Load(stay.load_after, stay.first_use, self._load_s[stay.block, channel, disk_used, slow], None)
            loads.setdefault(channel, []).append(load)
            moved_bytes += self.problem.size(stay.block)
        if back:
            loads["h2d"] = sorted([*loads.get("h2d", ()), *back], key=lambda load: load.first_use)
        if max([compute_s, *(sum([load.time_s for load in queue]) for queue in loads.values())]) > too_long_s:
            return None
        pass_s = simulate(times, list(loads.values()), slowed(self.problem.table, list(loads))).pass_s
        choice = Choice(arrangement=arrangement, level=level, recipe=recipe, pass_s=pass_s, moved_bytes=moved_bytes)
        self.timed.append(choice)
        self.best_s = min(self.best_s, pass_s)
        return choice

    def _moved(self, arrangement: Arrangement) -> tuple[list[Stay], Pageable] | None:
        """Return what an arrangement loads, and what of it is not page-locked; None where it cannot be."""
        stays = stays_of(self.problem, arrangement)
        if stays is None:
            return None
        loaded = [stay.block for stay in stays]
        return stays, pageable_of(self.problem, arrangement.homes, arrangement.offsets, loaded)

    def _least_loads_s(self, arrangement: Arrangement) -> float:
        """Return what its loads take at least: each streamed block comes once a pass."""
        busy, disk_used = {"host": 0.0, "disk": 0.0}, arrangement.reads_disk
        for block, tier in arrangement.homes.items():
            if block in arrangement.offsets:
                busy[tier] += self._load_s[block, channel_of(tier), disk_used, False]
        return max(busy.values())


def _sweeps(problem: Problem) -> tuple[tuple[int, int], ...]:
    """Return the bytes that the forward, and that the backward needs on the device, each block once; before each, the
    access that precedes it (-1: the last of a pass), whose room is all that can be there as it begins.
    """
    accesses = problem.table.accesses
    read: dict[str, set[int]] = {"forward": set(), "backward": set()}
    for access in accesses:
        if access.kind in read:
            read[access.kind].update(block for block in access.blocks if not access.reads_rows_of(block))
    forwards = [access.index for access in accesses if access.kind == "forward"]
    backwards = [access.index for access in accesses if access.kind == "backward"]
    if not forwards or not backwards or max(forwards) > min(backwards):
        return ()  # they are no two windows
    swept = [problem.room(read[kind]) for kind in ("forward", "backward")]
    return ((min(forwards) - 1, swept[0]), (min(backwards) - 1, swept[1]))
