"""Where in its sequence a run is: which access is under way, what it reads, which are over. Numbers only.

Positions are linear (see :mod:`memplan.run.schedule.sequence`). A *call* names a forward to who is told of its
backward; it stays what it was where another sequence is followed meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from memplan.program.schema import Channel
from memplan.run.schedule.expected_loads import Choices
from memplan.run.schedule.learning import Cycle, Learner
from memplan.run.schedule.sequence import Sequence
from memplan.run.verify.metrics import Measured

Reads = tuple[int, ...]
"""Blocks that an access reads on the device."""


class Position:
    """Follows the accesses of a run, counts those off the sequence, and learns another where passes leave it for
    good.
    """

    def __init__(self, sequence: Sequence, reads: Mapping[str, Reads], measured: Measured) -> None:
        """``reads``: by module, what all of its accesses read."""
        self.reads = reads
        self._measured = measured
        self._learner = Learner()
        self._had_backward = False
        self._strayed_in_backward = False  # or its forwards did, of which some may have none that is seen
        self._first_call = 0  # what a forward at position 0 of this sequence is called: calls before it lie below
        self._aside = -1  # the last name of a forward that the sequence lacks: it counts down
        self.floor = sys.maxsize  # other micro-batches of a group are yet to do the accesses from here on
        self._follow(sequence)

    def _follow(self, sequence: Sequence) -> None:
        """Take a sequence for the one that accesses follow from now on. None of it has been done yet."""
        self.choices = Choices(sequence)
        self.now = -1  # linear position of the access under way; -1: none yet
        self.done = 0  # accesses below this are over: what they read may be overwritten
        # How many loads were dealt with. From the cycle before the first: some of its loads stay for it.
        self.next_load: dict[Channel, int] = {channel: -len(loads) for channel, loads in sequence.loads.items()}
        self.sequence = sequence  # last: a Ctrl-C before it leaves the old one at its beginning

    # ---- accesses ---------------------------------------------------------------------------------------------------

    def forward_begins(self, module: str) -> tuple[int, Reads, bool]:
        """Return what the call is named, what it reads, and whether a cycle begins with it."""
        passed = self.sequence.passed_expert(module, self.now)
        if passed is not None:
            return self._first_call + passed, self._beside(module), False
        position = self.sequence.next_forward(module, self.now)
        if position is None:
            self._strayed_in_backward = True
            self._aside -= 1
            return self._aside, self._beside(module), False
        begun = self._measured.has_begun
        if begun and self.sequence.skipped_reads(self.now, position):
            self._strayed()
        begins = position // self.sequence.length != self.now // self.sequence.length or not begun
        if begins:
            self._strayed_in_backward |= begun and not self._had_backward  # that one's backward may be to come
            self._had_backward = False
            self.choices.cycle_begins(position // self.sequence.length)
        return self._first_call + position, self._go_to(position), begins

    def forward_seen(self, module: str, call: int) -> None:
        """What a forward reads is there. Only now is it known: what is loaded when it is called was not foreseen."""
        if call >= 0:
            self.choices.note(call - self._first_call)
        if self._learner.writing:
            self._learner.forward(module, call)

    def forward_ends(self, call: int) -> bool:
        """Note that a forward is over; return whether it is the access under way."""
        if call != self._first_call + self.now:
            return False
        end = self.now + 1
        if end > self.floor:
            return False  # others are yet to do it
        self.done = end
        return True

    def backward_begins(self, module: str, call: int) -> Reads:
        """Return what the backward of a call reads."""
        if self._learner.writing:
            self._learner.backward(module, call)
        position = self.sequence.backward_at(module, call - self._first_call, self.now)
        if position is None:
            return self._beside(module)
        if position > self.now and self.sequence.skipped_reads(self.now, position):
            self._strayed()
            self._strayed_in_backward = True
        return self._go_to(position)

    def recompute_begins(self, module: str) -> tuple[int, Reads]:
        """A forward inside a backward: a checkpoint recomputes. It is the same access as the backward it belongs to.

        Where a checkpoint spans several modules they come in forward order: only the next planned backward moves the
        position, the others are served beside it, lest what is still needed counts as over. Returns the call, and what
        it reads.
        """
        if self._learner.writing:
            self._learner.backward(module)
        position = self.sequence.next_backward(module, self.now)
        if position is None:
            return -1, self._beside(module)
        index = position % self.sequence.length
        call = self._first_call + position - index + self.sequence.steps[index].forward
        if position == self.now or not self.sequence.skipped_reads(self.now, position):
            return call, self._go_to(position)
        return call, self._beside(module)

    def _go_to(self, position: int) -> Reads:
        self.now = position
        if position > self.done:
            self.done = position if position <= self.floor else max(self.done, self.floor)
        return self.sequence.steps[position % self.sequence.length].blocks

    def _beside(self, module: str) -> Reads:
        """An access is not where the sequence has it; the position stays."""
        self._strayed()
        return self.reads.get(module, ())

    def _strayed(self) -> None:
        self._measured.out_of_order += 1
        self._learner.strayed()

    # ---- the end of a backward --------------------------------------------------------------------------------------

    def backward_ends(self) -> bool:
        """An outermost backward is over. Return whether accesses were left out in it, or are to come still."""
        self._had_backward = True
        strayed, self._strayed_in_backward = self._strayed_in_backward, False
        return strayed or not self.sequence.is_over(self.now)

    def backward_ended(self) -> None:
        """Count it, and go to the end of the cycle where none is to come."""
        self.count_backward()
        self.cycle_ended()

    def count_backward(self) -> None:
        """Count it."""
        self._measured.backward_ends(self.sequence.passes if self.sequence.is_over(self.now) else 0)

    def cycle_ended(self) -> None:
        """Go to the end of the cycle where no backward is to come."""
        cycle = self.now // self.sequence.length
        self.done = (cycle + 1) * self.sequence.length if self.sequence.is_over(self.now) else self.now + 1

    # ---- micro-batches that take turns ------------------------------------------------------------------------------

    def lane(self) -> tuple[int, bool, bool, Learner]:
        """Return what is one micro-batch's own, for :meth:`be_lane`."""
        return self.now, self._had_backward, self._strayed_in_backward, self._learner

    def be_lane(self, lane: tuple[int, bool, bool, Learner]) -> None:
        """Go on with another micro-batch."""
        self.now, self._had_backward, self._strayed_in_backward, self._learner = lane

    def lanes_at_begin(self, count: int) -> list[tuple[int, bool, bool, Learner]]:
        """Return that of micro-batches that have not begun. What the first one does is what is learned."""
        now, had, strayed, _ = self.lane()
        return [(now, had, strayed, Learner() if turn else self._learner) for turn in range(count)]

    def forward_due(self, module: str) -> int:
        """Return where the module's forward, if it begins now, will be; the present access off the sequence."""
        if self.sequence.passed_expert(module, self.now) is not None:
            return self.now
        position = self.sequence.next_forward(module, self.now)
        return self.now if position is None else position

    def recompute_due(self, module: str) -> int:
        """Return the same of its forward within a backward."""
        position = self.sequence.next_backward(module, self.now)
        if position is None or (position != self.now and self.sequence.skipped_reads(self.now, position)):
            return self.now
        return position

    def backward_due(self, module: str, call: int) -> int:
        """Return the same of the backward of a call."""
        position = self.sequence.backward_at(module, call - self._first_call, self.now)
        return self.now if position is None else position

    def learn(self, sequence_of: Callable[[Cycle], Sequence | None]) -> None:
        """Follow another sequence where passes have left this one for good. ``sequence_of``: makes it of a cycle."""
        cycle = self._learner.cycle_ends()
        sequence = None if cycle is None else sequence_of(cycle)
        if sequence is None:
            return
        is_new = sequence.steps != self.sequence.steps  # else an odd forward has put it out of step for good
        self._first_call += (self.now // self.sequence.length + 2) * self.sequence.length
        self._follow(sequence if is_new else self.sequence)
        self._measured.sequence_begins_anew(is_new)
