"""The search: numbers of recomputed modules × rings, coarse first and then finer, each judged by the timeline.

What cannot beat the best so far by its compute and its bytes on each channel alone is not timed.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from memplan.place.baselines import Baseline, arrange_as
from memplan.place.candidates import rings
from memplan.place.layout.layout import Arrangement, Key, Stay, channel_of, stays_of
from memplan.place.layout.page_lock import NOTHING, Pageable, pageable_of
from memplan.place.layout.ring_layout import LayoutRecipe, Rings
from memplan.place.problem import MOST_SUBSETS, Bytes, Problem, policies_for
from memplan.program.timeline import Load, durations, load_s, simulate, slowed

_FINER = (0.5, 0.75, 1.25, 1.5)
"""The best of them is multiplied by these."""

_LEVELS = 9
"""Numbers of recomputed modules that are tried first."""

_THOROUGH = 2
"""Of them, those for which every ring is tried."""

_NEAR = 2
"""How many more or fewer are tried where the best is about known."""

_FEW = 20
"""Blocks up to which less room is tried than there is:"""

_ROOMS = 64
"""in steps of this part of all blocks"""

_LESS_ROOM = 0.25
"""down to this share less."""

_DISK_SHARES = 4
"""Parts of the streamed blocks, by number, that lie on the disk where RAM would hold more: every number of few."""

_MOST_CLIMBED = 6000
"""Changes of what stays that are looked at, times the blocks there are."""

_STARTS = 24
"""Rings from whose best the climb begins where blocks are few."""

_MOST_STACKED = 11_000
"""Arrangements that are looked at where every one of a few blocks is: there are 10,000 of six blocks. A search for what
is better than something looks at a fortieth of that."""

_STACKED_LEVELS = 3
"""Numbers of recomputed modules for which every arrangement is looked at, where there are few blocks; all of few
modules.
"""


_TIE = 1e-4
"""Passes that differ by less are the same: no cost row is known so well. Then fewer bytes moved win."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """An arrangement, with its number of recomputed modules and what a pass under it takes."""

    arrangement: Arrangement
    recomputed: int
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
        return (moved, self.recomputed, on_disk, off_bytes, len(self.arrangement.homes))


class Search:
    """What was timed so far, and the best of it."""

    def __init__(
        self, problem: Problem, nonweight: Sequence[Bytes], below_s: float | None = None, *, elastic: bool = False
    ) -> None:
        """``nonweight``: device bytes at each access apart from frozen weights, by number of recomputed modules.
        ``below_s``: a choice that takes longer is none. ``elastic``: whether the device arena may have tails.
        """
        self._problem = problem
        self._rings = Rings(problem)
        self._elastic = elastic
        self._sweeps = _sweeps(problem)
        self._room_at = [problem.budgets.vram_bytes - bytes_at for bytes_at in nonweight]
        self._rooms = [int(room_at.min()) for room_at in self._room_at]
        self._times: dict[int, tuple[list[float], float]] = {}
        limit = problem.page_lock_bytes
        self._load_s = {
            (block.id, name, disk_used, pageable): load_s(problem.table, block.size_bytes, name, disk_used, pageable)
            for block in problem.table.blocks
            for name in (channel_of("host"), channel_of("disk"))
            for disk_used in (False, True)
            for pageable in ((False,) if limit is None else (False, True))
        }
        self._seen: dict[tuple[Key, int], Choice | None] = {}
        self._stays: dict[Key, tuple[list[Stay], Pageable] | None] = {}
        self._near: list[tuple[Choice, LayoutRecipe | None]] = []
        self._saves: dict[tuple[bool, frozenset[str]], tuple[list[Load], list[Load]]] = {}
        self._stacked_left = _MOST_STACKED if below_s is None else _MOST_STACKED // 40
        self.best_s = math.inf if below_s is None else below_s
        """Of what was timed; at first what must be beaten."""

    @property
    def least_of_all_s(self) -> float:
        """The least of :meth:`least_s`."""
        return min(self.least_s(level) for level in range(len(self._rooms)))

    def best(self, near: int | None = None, *, climb: bool = True) -> Choice | None:
        """Return the choice with the shortest pass, or None where nothing fits.

        ``near``: a number of recomputed modules that is known to be about the best. ``climb``: whether single blocks
        change places in the end; without, a pass may be a little longer.
        """
        found = self._search(near, tails=False, climb=climb)
        if not self._elastic or self.best_s <= self.least_of_all_s * (1 + _TIE):
            return found
        # Only then with tails: what a search finds without them is never lost.
        return self._search(near, tails=True, climb=climb)

    def _search(self, near: int | None, *, tails: bool, climb: bool) -> Choice | None:
        few = list(rings(self._problem, every=False, tails=tails))
        every = list(rings(self._problem, tails=tails))
        levels = len(self._rooms)
        every_choice = len(self._problem.free_modules) <= MOST_SUBSETS
        stride = 1 if every_choice else max(1, -(-levels // _LEVELS))
        tried: dict[int, float] = {}  # by level: its best pass

        def look(chosen: Iterable[int]) -> None:
            for level in sorted(set(chosen) - tried.keys(), key=lambda level: (self.least_s(level), level)):
                found = [pass_s for ring in few if (pass_s := self.time(level, ring)) is not None]
                tried[level] = min(found, default=math.inf)

        if near is not None:
            look(level for level in range(near - _NEAR, near + _NEAR + 1) if 0 <= level < levels)
        else:
            roomiest = max(range(levels), key=lambda level: (self._rooms[level], -level))
            look([*range(0, levels, stride), levels - 1, roomiest])
            if all(math.isinf(pass_s) for pass_s in tried.values()):  # little room: every ring, where there is most
                tried = {roomiest: math.inf}
            while stride > 1:
                stride = max(1, stride // 2)
                # With more of them less streams and more is computed: the best lies beside the best, or where it begins
                # to fit.
                around = sorted(tried, key=lambda level: (tried[level], level))[:2]
                look(beside for top in around for beside in (top - stride, top + stride) if 0 <= beside < levels)
        tops = sorted(tried, key=lambda level: (tried[level], level))
        for level in tops[:_THOROUGH]:
            for ring in every:
                self.time(level, ring)
            self._try_less_room(level, every)
        for _ in range(2):
            choice = self.chosen()
            if choice is None or choice.pass_s <= self.compute_s(choice.recomputed) * (1 + _TIE):
                break
            made_by = self._ring_of(choice)
            if made_by is None:
                break
            for factor in _FINER:
                self.time(choice.recomputed, made_by._replace(times=made_by.times * factor))
                if made_by.tails:
                    self.time(choice.recomputed, made_by._replace(most=made_by.most * factor))
        if not tails:
            self._try_disk(tops[:_THOROUGH], every)
        stacked = tops if every_choice else tops[:_STACKED_LEVELS]
        for level in () if tails else stacked:
            if self.best_s > self.least_of_all_s * (1 + _TIE):
                self._try_stacked(level)
        if climb:
            self._climb()
        return self.chosen()

    def _try_less_room(self, level: int, rings_of: Sequence[LayoutRecipe]) -> None:
        """Have less room where blocks are few and unequal: which of them fit together is a matter of chance."""
        if len(self._problem.movable) > _FEW or self.best_s <= self.least_s(level) * (1 + _TIE):
            return
        total = sum(self._problem.sizes_bytes)
        step = max(1, total // _ROOMS)
        top = min(self._rooms[level], total) // step
        for room in range(top * step, int(top * step * (1 - _LESS_ROOM)), -step):
            for ring in rings_of:
                arrangement = self._rings.arrange(ring, room, self._room_at[level] - room)
                if arrangement is not None:
                    self._look_at(arrangement, level, ring)

    def _try_disk(self, levels: Sequence[int], rings_of: Sequence[LayoutRecipe]) -> None:
        """Have more on the disk than RAM forces: both bring bytes at once, so that with fewer there a pass may be
        longer.
        """
        choice = self.chosen()
        if choice is None:
            return
        if not any(ring.disk_bundles for ring in rings_of):  # RAM holds all
            if not self._problem.disk_may_help:
                return
            rings_of = [ring._replace(disk_bundles=bundles) for ring in rings_of for bundles in range(3)]
        count = len(self._problem.movable)
        parts = count if count <= _FEW else _DISK_SHARES
        if count > _FEW:
            levels, rings_of = [choice.recomputed], [self._ring_of(choice) or rings_of[0]]
        for level in levels:
            for part, ring in itertools.product(range(1, parts + 1), rings_of):
                if self.best_s <= self.compute_s(level) * (1 + _TIE):
                    return
                self.time(level, ring._replace(disk_share=part / parts))

    def _climb(self) -> None:
        """Change what stays, a bundle at a time, as long as that helps and is not too much work: from the best, and
        where blocks are few from the best of other rings too, since where a climb ends depends on where it begins.
        """
        for start, ring in self._starts():
            left = _MOST_CLIMBED // max(1, len(self._problem.movable))
            room = self._rooms[start.recomputed]
            spare = self._room_at[start.recomputed] - room
            choice: Choice | None = start
            while choice is not None and left > 0:
                if self.best_s <= self.least_s(start.recomputed) * (1 + _TIE):
                    return
                top, choice = choice, None
                for arrangement in self._rings.beside(top.arrangement, ring, room, spare):
                    left -= 1 + (ring.tails > 0)  # tails are twice the work
                    found = self._look_at(arrangement, start.recomputed, ring)
                    if found is not None and found.pass_s < top.pass_s * (1 - _TIE):
                        choice = found
                        break
                    if left <= 0:
                        break

    def _starts(self) -> list[tuple[Choice, LayoutRecipe]]:
        """Return what is climbed from."""
        best = self.chosen()
        if best is None:
            return []
        starts = {self._ring_of(best) or LayoutRecipe(1.0, "bundle", 0): best}
        if len(self._problem.movable) <= _FEW:
            for choice, ring in sorted(self._near, key=lambda one: one[0].pass_s):
                if len(starts) < _STARTS and ring is not None:
                    starts.setdefault(ring, choice)
        return [(choice, ring) for ring, choice in starts.items()]

    def as_others(self, way: Baseline) -> Choice | None:
        """Return the choice of another way of placing: all activations kept, or all recomputed, as is faster."""
        for level in (0, len(self._rooms) - 1):
            arrangement = arrange_as(way, self._problem, self._rooms[level])
            if arrangement is not None:
                self._look_at(arrangement, level, None)
        return self.chosen()

    def _try_stacked(self, level: int) -> None:
        if self.least_s(level) * (1 + _TIE) < self.best_s:
            for arrangement in itertools.islice(self._rings.stacked(self._rooms[level]), self._stacked_left):
                self._stacked_left -= 1
                self._look_at(arrangement, level, None)

    def compute_s(self, recomputed: int) -> float:
        """Return the compute of a pass in s."""
        return self._durations(recomputed)[1]

    def least_s(self, recomputed: int) -> float:
        """Return a pass time in s that no arrangement beats: of what a sweep reads, what has no room has to come."""
        table, room_at, least = self._problem.table, self._room_at[recomputed], self._rooms[recomputed]
        moved = sum(max(swept - (int(room_at[at]) if self._elastic else least), 0) for at, swept in self._sweeps)
        together = table.host_to_device_bytes_per_s + (table.disk_bytes_per_s if self._problem.disk_may_help else 0.0)
        return max(self.compute_s(recomputed), moved / together)

    def _durations(self, recomputed: int) -> tuple[list[float], float]:
        if recomputed not in self._times:
            times = durations(self._problem.table, policies_for(self._problem, recomputed))
            self._times[recomputed] = (times, sum(times))
        return self._times[recomputed]

    def _durations_with_rows(
        self, arrangement: Arrangement, recomputed: int, pageable: Pageable
    ) -> tuple[list[float], float]:
        on_host = {block for block, tier in arrangement.homes.items() if tier == "host"}
        policies = policies_for(self._problem, recomputed)
        times = durations(self._problem.table, policies, on_host, pageable.blocks)
        return times, sum(times)

    def time(self, recomputed: int, ring: LayoutRecipe) -> float | None:
        """Return the pass in s, or None where it does not fit or cannot be the best."""
        if self.least_s(recomputed) > self.best_s * (1 + _TIE):
            return None
        if ring.tails and self.best_s <= self.least_s(recomputed) * (1 + _TIE):
            return None  # it would win nothing
        room = self._rooms[recomputed]
        arrangement = self._rings.arrange(ring, room, self._room_at[recomputed] - room)
        found = None if arrangement is None else self._look_at(arrangement, recomputed, ring)
        return None if found is None else found.pass_s

    def _look_at(self, arrangement: Arrangement, recomputed: int, ring: LayoutRecipe | None) -> Choice | None:
        key = (arrangement.key, recomputed)
        if key not in self._seen:
            self._seen[key] = self._time(arrangement, recomputed, ring)
        return self._seen[key]

    def _time(self, arrangement: Arrangement, recomputed: int, ring: LayoutRecipe | None) -> Choice | None:
        times, compute_s = self._durations(recomputed)
        reads_rows = arrangement.rows_bytes and self._problem.table.device != "cpu"
        if reads_rows:
            times, compute_s = self._durations_with_rows(arrangement, recomputed, NOTHING)
        if compute_s > self.best_s * (1 + _TIE):
            return None
        if self._least_loads_s(arrangement) > self.best_s * (1 + _TIE):
            return None
        if arrangement.key not in self._stays:
            self._stays[arrangement.key] = self._moved(arrangement)
        moved = self._stays[arrangement.key]
        if moved is None:
            return None
        stays, pageable = moved
        if reads_rows and pageable.blocks:
            times, compute_s = self._durations_with_rows(arrangement, recomputed, pageable)
        disk_used = arrangement.reads_disk
        stores, back = self._saves_of(disk_used, pageable.modules)
        loads: dict[str, list[Load]] = {"d2h": stores} if stores else {}
        moved_bytes = arrangement.rows_bytes
        for stay in stays:
            channel = channel_of(arrangement.homes[stay.block])
            slow = pageable.rings if channel == "disk" else stay.block in pageable.blocks
            load = Load(stay.load_after, stay.first_use, self._load_s[stay.block, channel, disk_used, slow], None)
            loads.setdefault(channel, []).append(load)
            moved_bytes += self._problem.size(stay.block)
        if back:
            loads["h2d"] = sorted([*loads.get("h2d", ()), *back], key=lambda load: load.first_use)
        least_s = max([compute_s, *(sum([load.time_s for load in queue]) for queue in loads.values())])
        if least_s > self.best_s * (1 + _TIE):
            return None
        pass_s = simulate(times, list(loads.values()), slowed(self._problem.table, list(loads))).pass_s
        choice = Choice(arrangement=arrangement, recomputed=recomputed, pass_s=pass_s, moved_bytes=moved_bytes)
        self._near.append((choice, ring))
        self.best_s = min(self.best_s, pass_s)
        return choice

    def _moved(self, arrangement: Arrangement) -> tuple[list[Stay], Pageable] | None:
        """Return what an arrangement loads, and what of it is not page-locked; None where it cannot be."""
        stays = stays_of(self._problem, arrangement)
        if stays is None or self._problem.page_lock_bytes is None:
            return None if stays is None else (stays, NOTHING)
        loaded = [stay.block for stay in stays]
        return stays, pageable_of(self._problem, arrangement.homes, arrangement.offsets, loaded)

    def _saves_of(self, disk_used: bool, pageable: frozenset[str]) -> tuple[list[Load], list[Load]]:
        """Return the stores of offloaded activations, and what comes back."""
        key = (disk_used, pageable)
        if key not in self._saves:
            self._saves[key] = self._problem.saves.loads(self._problem.table, disk_used, pageable)
        return self._saves[key]

    def _least_loads_s(self, arrangement: Arrangement) -> float:
        """Return what its loads take at least: each streamed block comes once a pass."""
        busy, disk_used = {"host": 0.0, "disk": 0.0}, arrangement.reads_disk
        for block, tier in arrangement.homes.items():
            if block in arrangement.offsets:
                busy[tier] += self._load_s[block, channel_of(tier), disk_used, False]
        return max(busy.values())

    def chosen(self) -> Choice | None:
        """Return the best of what was timed."""
        equal = self.best_s * (1 + _TIE)
        percent_bytes = sum(self._problem.sizes_bytes) // 100
        return min(
            (choice for choice, _ in self._near if choice.pass_s <= equal),
            key=lambda choice: (*choice.ties(percent_bytes), choice.pass_s),
            default=None,
        )

    def _ring_of(self, choice: Choice) -> LayoutRecipe | None:
        """Return what a choice was made by."""
        return next(ring for made, ring in self._near if made is choice)


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
    swept = [sum(problem.sizes_bytes[block] for block in read[kind]) for kind in ("forward", "backward")]
    return ((min(forwards) - 1, swept[0]), (min(backwards) - 1, swept[1]))
