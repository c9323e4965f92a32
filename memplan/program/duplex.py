"""A link that is slower each way while it is busy both ways: its two channels, played together.

A transfer goes at its own rate while the other direction is idle and at a share of it while that is busy, piece by
piece: so what it takes is known only once what goes the other way meanwhile is. Both are played forward in time
together, no further than somebody asks: what is asked for ends before anything can start that is not known yet.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from memplan.errors import PlanCheckError

Start = Callable[[int], tuple[float, float] | None]
"""From a load's number, over all passes, to when it may start and what it takes alone; None while that is not known."""


class BothWays(NamedTuple):
    """Two channels of one link."""

    channels: tuple[int, int]
    share: float
    """Of its own rate that each reaches while both are busy."""


class Pair:
    """The two channels of a link and how far they have been played."""

    def __init__(self, share: float, starts: tuple[Start, Start], done: tuple[list[tuple[float, float]], ...]) -> None:
        """``done``: by channel the beginning and end of each load that is over; it grows."""
        self._share = share
        self._starts = starts
        self._done = done
        self._now = 0.0
        self._begun: list[float | None] = [None, None]
        """When what is on its way began; None where nothing is."""
        self._left = [0.0, 0.0]
        """What it still takes, alone."""

    def bring(self, channel: int, target: int) -> None:
        """Play until a channel's load of number ``target`` is over. Raises PlanCheckError where it can never be."""
        while len(self._done[channel]) <= target:
            self._step()

    def _step(self) -> None:
        """Go on to the next moment in which a load starts or ends."""
        share = self._share if None not in self._begun else 1.0
        at, side, takes = math.inf, -1, 0.0
        for turn in (0, 1):
            if self._begun[turn] is not None:
                when = self._now + self._left[turn] / share
                alone = 0.0
            else:
                known = self._starts[turn](len(self._done[turn]))
                if known is None:
                    continue
                when, alone = max(known[0], self._now), known[1]
            if when < at:
                at, side, takes = when, turn, alone
        if side < 0:
            raise PlanCheckError(("a load waits for an access or a load, which waits for it",))
        for turn in (0, 1):
            if self._begun[turn] is not None:
                self._left[turn] -= (at - self._now) * share
        self._now = at
        begun = self._begun[side]
        if begun is None:
            self._begun[side], self._left[side] = at, takes
        else:
            self._done[side].append((begun, at))
            self._begun[side] = None
