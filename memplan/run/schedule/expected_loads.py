"""Which planned loads are wanted: of what a pass has left out nothing comes in its backward, and experts only by habit.

A forward that was not seen has no backward: a layer that was dropped, an expert that no token was sent to. Whether an
expert will be called in the next forward no one knows before its router has run: it is loaded when it is called, and
ahead of that once it was called in several passes in a row, as most are where there are many tokens.
"""

from __future__ import annotations

from memplan.run.schedule.sequence import PlannedLoad, Sequence

HABIT = 4
"""Passes in a row in which an expert must have been called to be loaded ahead."""


class Choices:
    """The forwards that were seen, by linear position."""

    def __init__(self, sequence: Sequence) -> None:
        self._sequence = sequence
        self._seen: set[int] = set()
        self._habits: dict[int, tuple[int, int]] = {}
        """Of each expert the last cycle that called it, and how many in a row have."""

    def note(self, position: int) -> None:
        """A forward was seen."""
        cycle, index = divmod(position, self._sequence.length)
        self._seen.add(position)
        if not self._sequence.experts:
            return
        for block in self._sequence.experts.intersection(self._sequence.steps[index].blocks):
            last, row = self._habits.get(block, (-1, 0))
            if last < cycle:
                self._habits[block] = (cycle, row + 1 if last == cycle - 1 else 1)

    def cycle_begins(self, cycle: int) -> None:
        """Forget what no load asks for any more."""
        self._seen = {position for position in self._seen if position >= (cycle - 1) * self._sequence.length}

    def wants(self, cycle: int, due: PlannedLoad) -> bool:
        """Whether what a load of that cycle brings will be used, as far as is known."""
        if not due.uses:
            return True  # no weights
        for use in due.uses:
            later, index = divmod(use, self._sequence.length)
            step = self._sequence.steps[index]
            if step.kind == "backward":
                if (cycle + later) * self._sequence.length + step.forward in self._seen:
                    return True
            elif due.key not in self._sequence.experts or self._is_habit(due.key, cycle + later):
                return True
        return False

    def _is_habit(self, expert: int, cycle: int) -> bool:
        last, row = self._habits.get(expert, (-1, 0))
        return row >= HABIT and last >= cycle - 1
