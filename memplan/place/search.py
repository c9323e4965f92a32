"""The search: shapes × counts of streamed layers, coarse first and then finer, each judged by the timeline.

An arrangement takes the fewest recomputed modules that leave it room: more of them would only add compute. What cannot
beat the best so far by its compute and its bytes on each channel alone is not timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memplan.place.problem import Bytes, Problem, policies_for
from memplan.place.spread import Arrangement, Key, Shape, arrange, channel_of, shapes, stays_of
from memplan.program.timeline import Load, durations, load_s, simulate

_MOST_ARRANGEMENTS = 4000
"""Arrangements listed at most; beyond that the counts of streamed layers are taken at a stride."""

_STRIDES = (4, 2, 1)
"""Counts tried of each shape: every fourth, then ever nearer to its best."""

_WORTH = 1.3
"""A shape is looked at more finely where its best pass is below this times the best of all."""

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

    @property
    def ties(self) -> tuple[int, int, int]:
        """What decides between equal passes: bytes moved, recomputes, and streamed blocks. Less is better."""
        return (self.moved_bytes, self.recomputed, len(self.arrangement.homes))


def arrangements(problem: Problem) -> dict[Shape, list[Arrangement]]:
    """Return what is tried, by shape, with ever more streamed layers.

    It depends on ``ram``, ``disk`` and the pins, not on ``vram``: so what is the least vram of these is the least of all.
    """
    listed = list(shapes(problem))
    most = len(problem.stack)
    stride = max(1, -(-len(listed) * (most + 1) // _MOST_ARRANGEMENTS))
    counts = sorted({*range(0, most + 1, stride), most})
    seen: set[Key] = set()
    found: dict[Shape, list[Arrangement]] = {}
    for shape in listed:
        for count in counts:
            arrangement = arrange(problem, shape, count)
            if arrangement is not None and arrangement.key not in seen:
                seen.add(arrangement.key)
                found.setdefault(shape, []).append(arrangement)
    return found


def best(problem: Problem, options: dict[Shape, list[Arrangement]], nonweight: Sequence[Bytes]) -> Choice | None:
    """Return the choice with the shortest pass, or None where nothing fits.

    ``nonweight``: device bytes at each access apart from frozen weights, by number of recomputed modules.
    """
    rooms = [problem.budgets.vram_bytes - int(bytes_at.max()) for bytes_at in nonweight]
    search = _Search(problem)
    by_compute = sorted(range(len(rooms)), key=lambda level: (search.compute_s(level), level))
    rows: list[list[tuple[Arrangement, int]]] = []
    for listed in options.values():
        row: list[tuple[Arrangement, int]] = []
        for arrangement in listed:
            level = next((level for level in by_compute if arrangement.device_bytes <= rooms[level]), None)
            if level is not None:
                row.append((arrangement, level))
        if row:
            rows.append(row)
    rows.sort(key=lambda row: min(search.compute_s(level) for _, level in row))
    bests: list[tuple[float, int] | None] = [None] * len(rows)  # by row: best pass and where it stands
    for stride in _STRIDES:
        for number, row in enumerate(rows):
            top = bests[number]
            if stride == _STRIDES[0]:
                places = sorted({*range(0, len(row), stride), len(row) - 1})
            elif top is None or (search.best_s is not None and top[0] > search.best_s * _WORTH):
                continue
            else:
                places = [at for at in (top[1] - stride, top[1] + stride) if 0 <= at < len(row)]
            for at in places:
                pass_s = search.time(*row[at])
                now = bests[number]
                if pass_s is not None and (now is None or pass_s < now[0]):
                    bests[number] = (pass_s, at)
    return search.chosen()


class _Search:
    """What was timed so far, and the best of it."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._times: dict[int, tuple[list[float], float]] = {}
        self._load_s = {
            (block.id, name): load_s(problem.table, block.size_bytes, name)
            for block in problem.table.blocks
            for name in (channel_of("host"), channel_of("disk"))
        }
        self._seen: dict[tuple[Key, int], float | None] = {}
        self._near: list[Choice] = []
        self._stores, self._back = problem.saves.loads(problem.table)
        self.best_s: float | None = None

    def compute_s(self, recomputed: int) -> float:
        """Return the compute of a pass in s."""
        return self._durations(recomputed)[1]

    def _durations(self, recomputed: int) -> tuple[list[float], float]:
        if recomputed not in self._times:
            times = durations(self._problem.table, policies_for(self._problem, recomputed))
            self._times[recomputed] = (times, sum(times))
        return self._times[recomputed]

    def time(self, arrangement: Arrangement, recomputed: int) -> float | None:
        """Return the pass in s, or None where it cannot be the best."""
        key = (arrangement.key, recomputed)
        if key not in self._seen:
            self._seen[key] = self._time(arrangement, recomputed)
        return self._seen[key]

    def _time(self, arrangement: Arrangement, recomputed: int) -> float | None:
        times, compute_s = self._durations(recomputed)
        if arrangement.rows_bytes and self._problem.table.device != "cpu":
            on_host = {block for block, tier in arrangement.homes.items() if tier == "host"}
            times = durations(self._problem.table, policies_for(self._problem, recomputed), on_host)
            compute_s = sum(times)
        if self.best_s is not None and compute_s > self.best_s * (1 + _TIE):
            return None
        loads: dict[str, list[Load]] = {"d2h": self._stores} if self._stores else {}
        moved_bytes = arrangement.rows_bytes
        for stay in stays_of(self._problem, arrangement):
            channel = channel_of(arrangement.homes[stay.block])
            load = Load(stay.load_after, stay.first_use, self._load_s[stay.block, channel], None)
            loads.setdefault(channel, []).append(load)
            moved_bytes += self._problem.size(stay.block)
        if self._back:
            loads["h2d"] = sorted([*loads.get("h2d", ()), *self._back], key=lambda load: load.first_use)
        least_s = max([compute_s, *(sum([load.time_s for load in queue]) for queue in loads.values())])
        if self.best_s is not None and least_s > self.best_s * (1 + _TIE):
            return None
        pass_s = simulate(times, list(loads.values())).pass_s
        self._near.append(
            Choice(arrangement=arrangement, recomputed=recomputed, pass_s=pass_s, moved_bytes=moved_bytes)
        )
        if self.best_s is None or pass_s < self.best_s:
            self.best_s = pass_s
        return pass_s

    def chosen(self) -> Choice | None:
        """Return the best of what was timed."""
        if self.best_s is None:
            return None
        equal = self.best_s * (1 + _TIE)
        return min(
            (choice for choice in self._near if choice.pass_s <= equal),
            key=lambda choice: (*choice.ties, choice.pass_s),
        )
