"""Learning a sequence anew: what a program does instead of what the plan foresaw, once it does it always.

What is right does not rest on the sequence; how early a block comes does. So as long as passes leave it, their accesses
are written down, and what repeats itself becomes the sequence: the same blocks at the same addresses, loaded in the
order in which they are really used. In the steady state nothing is written.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Collection
from typing import Literal, NamedTuple

from memplan.program.schema import Channel
from memplan.run.schedule.sequence import PlannedLoad, Sequence, Step

REPEATS = 3
"""A way that was taken as often in a row is there for good."""

_PERIODS = (1, 2, 3, 4)
"""Backwards after which a way may begin again: two losses in turn are a cycle of two."""

_MOST = 1 << 14
"""Accesses up to which a cycle is written down: a long evaluation is none."""


class _Seen(NamedTuple):
    """One access. Two cycles are alike where these are."""

    kind: Literal["forward", "backward"]
    module: str
    back: int
    """Of a backward: how many accesses ago its forward was."""


class Cycle(NamedTuple):
    """A cycle of accesses that passes take."""

    accesses: tuple[_Seen, ...]
    passes: int
    """How many outermost backwards it has."""


class Learner:
    """Writes down what is accessed from one end of a backward to the next, while passes leave their sequence."""

    def __init__(self) -> None:
        self.writing = False
        self._strayed = False
        self._calm = 0  # backwards in a row without straying
        self._cycle: list[_Seen] = []
        self._past: list[tuple[_Seen, ...]] = []
        self._count = 0  # accesses written so far
        self._forward_of: dict[int, tuple[int, str]] = {}  # by call: its number and its module; the last of them
        self._open: dict[str, list[int]] = {}  # by module: forwards without backward, by number
        self._broken = False

    def strayed(self) -> None:
        """An access was not where the sequence has it."""
        self._strayed = True

    def forward(self, module: str, call: int) -> None:
        """A forward begins, outside of any backward."""
        if len(self._forward_of) >= _MOST:
            self._broken = True
            return
        self._forward_of[call] = (self._count, module)
        self._open.setdefault(module, []).append(self._count)
        self._write(_Seen("forward", module, 0))

    def backward(self, module: str, call: int | None = None) -> None:
        """The backward of a call begins; without one: a recompute in it. Announced more than once it is one access."""
        last = self._cycle[-1] if self._cycle else None
        number, of = self._forward_of.get(call, (-1, "")) if call is not None else (-1, "")
        if of != module:  # a recompute, or the backward of what it made
            if last is not None and (last.kind, last.module) == ("backward", module):
                return
            waiting = self._open.get(module)
            if not waiting:
                self._broken = True
                return
            number = waiting[-1]
        back = self._count - number
        if last is not None and last == ("backward", module, back - 1):
            return
        if number in self._open.get(module, ()):
            self._open[module].remove(number)
        self._write(_Seen("backward", module, back))

    def _write(self, seen: _Seen) -> None:
        self._cycle.append(seen)
        self._count += 1

    def cycle_ends(self) -> Cycle | None:
        """An outermost backward has ended. Return the way that passes take for good, if there is one."""
        if not self.writing:
            self.writing, self._strayed = self._strayed, False
            return None
        self._past.append(tuple(self._cycle))
        del self._past[: -REPEATS * _PERIODS[-1]]
        self._cycle.clear()
        self._calm = 0 if self._strayed else self._calm + 1
        self.writing = self._calm < _PERIODS[-1]
        if self._broken or not self.writing:
            self._past.clear()
            self._forward_of.clear()
            self._open.clear()
        self._strayed = self._broken = False
        return self._repeated()

    def _repeated(self) -> Cycle | None:
        for period in _PERIODS:
            recent = self._past[-REPEATS * period :]
            alike = all(one == other for one, other in zip(recent, recent[period:], strict=False))
            if len(recent) == REPEATS * period and alike and self._calm < period:
                self._past.clear()
                return Cycle(sum(recent[-period:], ()), period)
        return None


class SlotUser(NamedTuple):
    """What comes into a slot."""

    channel: Channel
    overlapping: tuple[int, ...]
    """Keys of what lies on the same bytes."""
    module: str = ""
    """Whose saved activations it is; empty for a block."""
    segment: int = -1
    """Segment of the device arena that it lies in, where that is not always there."""


def sequence_of(
    way: Cycle,
    reads: Mapping[str, tuple[int, ...]],
    movers: Mapping[int, SlotUser],
    experts: frozenset[int],
    absences: Callable[[Collection[Step]], Mapping[int, frozenset[int]]],
) -> Sequence | None:
    """Return the sequence of a way; None where a backward's forward is not in it.

    ``reads``: blocks by the module that reads them. ``movers``: what comes into slots, by key. ``absences``: says at
    which steps segments are absent.
    """
    steps = []
    for index, one in enumerate(way.accesses):
        forward = index - one.back
        if forward < 0 or (way.accesses[forward].kind, way.accesses[forward].module) != ("forward", one.module):
            return None
        steps.append(Step(one.kind, one.module, forward, reads.get(one.module, ())))
    absent = absences(steps)
    return Sequence(tuple(steps), loads_of(steps, movers, absent), experts, absent, way.passes)


def loads_of(
    steps: Collection[Step], movers: Mapping[int, SlotUser], absent: Mapping[int, frozenset[int]]
) -> dict[Channel, tuple[PlannedLoad, ...]]:
    """Return the loads of a cycle. A stay lasts from a use until a rival's, and is loaded once the rival before is
    over. The absence of a segment is as a rival's use of all that lies there; what is read in one comes on demand.
    """
    length = len(steps)
    of_module = {mover.module: key for key, mover in movers.items() if mover.module}
    uses: dict[int, list[int]] = {key: [] for key in movers}
    for index, step in enumerate(steps):
        for key in (*step.blocks, of_module.get(step.module, -1)):
            if key in uses:
                uses[key].append(index)
    made = {(key, i) for module, key in of_module.items() for i in uses[key] if steps[i].kind == "forward"}
    around = {key: [at + shift for shift in (-length, 0, length) for at in own] for key, own in uses.items()}
    found: dict[Channel, list[PlannedLoad]] = {}
    for key, mover in movers.items():
        gone = absent.get(mover.segment, frozenset())
        others = sorted(
            {at + shift for at in gone for shift in (-length, 0, length)}.union(*(around[r] for r in mover.overlapping))
        )
        for first in uses[key] if others else ():
            load_after = others[bisect_left(others, first) - 1]
            if around[key][bisect_left(around[key], first) - 1] > load_after or (key, first) in made or first in gone:
                continue  # it is there still, or comes to be there
            until = others[bisect_left(others, first + 1)]
            last_use = first if mover.module else around[key][bisect_left(around[key], until) - 1]
            due = PlannedLoad(
                key=key,
                channel=mover.channel,
                load_after=load_after,
                first_use=first,
                last_use=last_use,
                uses=() if mover.module else tuple(at for at in around[key] if first <= at <= last_use),
            )
            found.setdefault(mover.channel, []).append(due)
    return {channel: tuple(sorted(dues, key=lambda due: (due.first_use, due.key))) for channel, dues in found.items()}
