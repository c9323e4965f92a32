"""Turns: a lane (a thread) for each micro-batch of a group, of which one at a time runs.

At each access of the sequence a lane waits until all are there that have not done the access before; those of lower
number go first. So all do an access one after another, in their order, and a lane is never ahead of one before it but
in what it alone does. What a run has of one micro-batch (triggers, conductor) is exchanged as the turn goes on.

[Note: where nobody waits] A lane goes on from its last forward into that access's backward, so that logits and losses
are those of one at a time; and within what a layer that memplan runs again calls: the setting of that forward is put in
place around it.
[Note: an error ends all] The others are ended where they wait, by an exception that passes by ``except Exception``,
the last one first, each before the next: contexts that they are in are left one after another.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from memplan.errors import RunError, TransferError
from memplan.hooks.triggers import Triggers
from memplan.run.lanes.inherited import Inherited
from memplan.run.schedule.conductor import Conductor
from memplan.run.transfer.interrupts import defer_sigint

DEADLINE_S = 1800.0
"""A turn that takes longer is taken for one that never ends."""


class LaneEnded(BaseException):
    """Ends a lane where it waits, since another one has failed."""


class Exchanged(Protocol):
    """Something with a state for each micro-batch, beside triggers and conductor."""

    def lane(self) -> Any:
        """Return what is one micro-batch's own."""

    def be_lane(self, lane: Any) -> None:
        """Go on with another micro-batch; None: with one that has not begun."""


class Lane:
    """One micro-batch on its way."""

    def __init__(self, index: int, batch: Any, own: tuple[Any, ...]) -> None:
        self.index = index
        self.batch = batch
        self.result: Any = None
        self.error: BaseException | None = None
        self.is_over = False
        self.at = -1
        """The access that it is to begin, or is doing; -1: none yet."""
        self.called: set[str] = set()
        """Trigger modules whose forwards it has called."""
        self.is_in_backward = False
        self.is_parked = False
        """It has a thread, and waits for its turn."""
        self.until: Callable[[], bool] | None = None
        """What it waits for besides its turn."""
        self.own = own
        """The states of triggers, of the conductor, and of what else is exchanged, while others have their turn."""
        self.wake = threading.Lock()  # a seventh of what a Semaphore takes, which is Python
        self.wake.acquire()
        self.thread = threading.Thread(target=lambda: None)
        self.identity = 0
        """Of its thread, once that runs."""


class Group:
    """The lanes of one group. Of no use after :meth:`run`."""

    def __init__(
        self,
        run: Callable[[Any], Any],
        batches: Sequence[Any],
        triggers: Triggers,
        conductor: Conductor,
        within: frozenset[str],
        exchanged: Sequence[tuple[Exchanged, Sequence[Any]]],
        inherited: Inherited,
        is_changed: Callable[[], bool],
    ) -> None:
        """``within``: trigger modules that others call whose forwards memplan runs again. ``exchanged``: what else has
        a state for each micro-batch, with each one's. ``is_changed``: whether modules have other settings than they had
        before.
        """
        self._is_changed = is_changed
        self._takes_turns = True
        self._run = run
        self._triggers = triggers
        self._conductor = conductor
        self._position = conductor.position
        self._within = within
        self._exchanged = [one for one, _ in exchanged]
        self._inherited = inherited
        begins = conductor.group_begins(len(batches))
        others = [[states[index] for _, states in exchanged] for index in range(len(batches))]
        self.lanes = [
            Lane(i, batch, (None, own, other))
            for i, (batch, own, other) in enumerate(zip(batches, begins, others, strict=True))
        ]
        self.now = self.lanes[0]
        self._live = list(self.lanes)
        self._fails = False
        self._turns = 0
        self._all_over = threading.Semaphore(0)

    # ---- in the thread that calls ----------------------------------------------------------------------------------

    def run(self) -> list[Any]:
        """Return what each lane's run returned. Raises what the first of them raised."""
        before = self._taken()
        try:
            try:
                with defer_sigint():
                    self._triggers.turns = self
                    self._start()
                    self._give(self.lanes[0])
                self._wait()
            except BaseException:
                self._end_all()
                raise
        finally:
            with defer_sigint():
                for lane in self.lanes:
                    if lane.is_over:
                        lane.thread.join()
                if not self._live:  # else one that nothing could end is still to be ended where it goes on
                    self._triggers.turns = None
                self._keep(self.now)
                self._put(before, 0)
                self._conductor.group_ends([lane.own[1] for lane in self.lanes], failed=self._fails)
        for lane in self.lanes:
            if lane.error is not None:
                error, lane.error = lane.error, None
                try:
                    raise error
                finally:
                    del error  # which holds this frame
        return [lane.result for lane in self.lanes]

    def _start(self) -> None:
        for lane in self.lanes:
            name = f"memplan-lane-{lane.index}"
            lane.thread = threading.Thread(target=self._in_lane, args=(lane,), name=name, daemon=True)
            lane.is_parked = True
            lane.thread.start()

    def _end_all(self) -> None:
        """Return when no lane is left."""
        with defer_sigint():
            self._fails = True
            for lane in self.lanes:
                if lane.thread.ident is None and lane in self._live:  # the system has no thread to give
                    self._live.remove(lane)
            if self._live and not self._turns:
                self._give(self._live[-1])
            if self._live and not self._all_over.acquire(timeout=DEADLINE_S):
                # It may go on once the others have let go of what they hold.
                parked = self._next()
                if parked is not None:
                    self._give(parked)
                self._all_over.acquire(timeout=DEADLINE_S)

    def _wait(self) -> None:
        """Return when all lanes are over. Raises TransferError where none goes on."""
        seen = -1
        while not self._all_over.acquire(timeout=DEADLINE_S):
            if seen == self._turns:
                raise TransferError(
                    f"micro-batch {self.now.index} of a group has not come to its next layer within {DEADLINE_S:.0f} "
                    "s: it may wait for something that another one holds (a lock, a queue), which waits for its turn. "
                    "Leave that out of what accumulate() runs, or run the micro-batches one by one"
                )
            seen = self._turns

    # ---- in lanes --------------------------------------------------------------------------------------------------

    def _in_lane(self, lane: Lane) -> None:
        lane.identity = threading.get_ident()
        lane.wake.acquire()
        lane.is_parked = False
        try:
            if not self._fails:
                lane.result = self._inherited.run(self._run, lane.batch)
        except LaneEnded:
            pass
        except BaseException as error:
            lane.error, self._fails = error, True
        finally:
            lane.batch, lane.is_over = None, True
            self._live.remove(lane)
            if not self._live:
                self._all_over.release()
            elif lane is self.now and (following := self._next()) is not None:
                self._keep(lane)
                self._give(following)

    def is_in_lane(self) -> bool:
        """Return whether this thread is the one whose turn it is."""
        return self.now.identity == threading.get_ident()

    def refuse_changed(self) -> None:
        """Raise RunError where others cannot go on now: modules have settings of one micro-batch's own."""
        if self._is_changed():
            raise RunError(
                "a micro-batch of a group came to a gradient before another one, while it had settings of modules "
                "changed (adapters off, evaluation): do not step the optimizer, zero the gradients, and give "
                "accumulate() one micro-batch at a time"
            )

    def before_forward(self, module: str, *, in_backward: bool) -> None:
        """Return when the lane's forward may begin."""
        if not self._goes_on(in_backward=in_backward):
            return
        if in_backward:
            self._turn(self._position.recompute_due(module), module)
            return
        self.now.called.add(module)
        at, now, length = self._position.forward_due(module), self._position.now, self._position.sequence.length
        if at // length != now // length and self._is_changed():
            # Others would compute with that. What they are at they have done without.
            self._takes_turns = False
        self._turn(at, module)

    def before_backward(self, module: str, call: int) -> None:
        """Return when the lane's backward may begin."""
        if self._goes_on(in_backward=True):
            self._turn(self._position.backward_due(module, call), module)

    def _goes_on(self, *, in_backward: bool) -> bool:
        """Return whether this thread is a lane. Raises LaneEnded."""
        if not self.is_in_lane():
            if any(other.identity == threading.get_ident() for other in self.lanes):
                raise LaneEnded  # the deadline was past
            return False  # another's altogether: the conductor refuses that
        if self._fails:
            raise LaneEnded
        self.now.is_in_backward = in_backward
        return True

    def _turn(self, at: int, module: str) -> None:
        """Let others have their turn before the access ``at`` begins."""
        lane, now = self.now, self._position.now
        if at <= now or module in self._within or not self._takes_turns:
            return
        lane.at = at
        sequence = self._position.sequence
        if at % sequence.length == sequence.turn_around and sequence.steps[at % sequence.length].forward == (
            now % sequence.length
        ):
            return
        self.let_others()

    def let_others(self, until: Callable[[], bool] | None = None) -> bool:
        """Have those go on that are to go before this lane. Return whether there were any. ``until``: what has to
        become true besides.
        """
        lane = self.now
        lane.until = until
        following = self._next()
        assert following is not None
        if following is lane:
            return False
        self._keep(lane)
        lane.is_parked = True  # first: the other may be done before this thread stands still
        self._give(following)
        lane.wake.acquire()
        lane.is_parked, lane.until = False, None
        if self._fails:
            raise LaneEnded
        return True

    def _next(self) -> Lane | None:
        """Return whose turn it is."""
        if self._fails:
            return next((lane for lane in reversed(self._live) if lane.is_parked), None)
        best = None
        for lane in self._live:
            if (best is None or lane.at < best.at) and (lane.until is None or lane.until()):
                best = lane
        return best

    def _keep(self, lane: Lane) -> None:
        lane.own = self._taken()

    def _taken(self) -> tuple[Any, ...]:
        return self._triggers.lane(), self._conductor.lane(), [one.lane() for one in self._exchanged]

    def _put(self, own: tuple[Any, ...], floor: int) -> None:
        triggers, conductor, others = own
        self._triggers.be_lane(triggers)
        self._conductor.be_lane(conductor, floor)
        for one, state in zip(self._exchanged, others, strict=True):
            one.be_lane(state)

    def _give(self, lane: Lane) -> None:
        """Have a lane go on."""
        self._put(lane.own, min((other.at for other in self._live if other is not lane), default=_LAST))
        self.now, self._turns = lane, self._turns + 1
        if lane.wake.locked():  # else it was woken, past the deadline
            lane.wake.release()


_LAST = 1 << 62
