"""The loader: which block comes next and when its slot is free, and what becomes of a block that is there.

It starts each planned load as soon as its room is free, makes the compute wait for what an access reads, and has
parameters show their slot or not. What no load has brought is loaded on demand, into its one address: the plan's order
is only ever a matter of speed; what is right does not rest on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch

from memplan.run.access.written_weights import WrittenWeights
from memplan.run.memory.arena import Arena
from memplan.run.modules.offloaded_activations import Offloaded, Offloads
from memplan.run.schedule.elastic import Elastic
from memplan.run.schedule.learning import Cycle, SlotUser, sequence_of
from memplan.run.schedule.position import Position
from memplan.run.schedule.sequence import Sequence
from memplan.run.schedule.streamed import AWAY, HIDDEN, IN_SLOT, LOADING, OPEN, SHUT, Streamed
from memplan.run.transfer.lock import Lock
from memplan.run.transfer.transfer import Transfers
from memplan.run.verify.metrics import Measured


class Loader:
    """Brings streamed blocks and has them go. Unless it is said otherwise its lock is in the caller's hand."""

    def __init__(
        self,
        streamed: dict[int, Streamed],
        at_home: Mapping[str, tuple[Streamed, ...]],
        offloaded: dict[int, Offloaded],
        transfers: Transfers,
        arena: Arena,
        elastic: Elastic,
        written: WrittenWeights,
        position: Position,
        measured: Measured,
    ) -> None:
        """``at_home``: by module, the blocks that it reads rows of where they lie on the host. ``arena``: the
        device's. ``written``: who takes home what was written to weights.
        """
        self.lock = Lock(self._mend)
        self.streamed = streamed
        self.used: tuple[Streamed, ...] = ()
        """What the access under way reads, open or not."""
        self.offloads = Offloads(offloaded, transfers, self.lock, self._clear, arena)
        self.at_home = {module: held for module, held in at_home.items() if held}
        self._transfers = transfers
        self._elastic = elastic
        self._written = written
        self._position = position
        self._measured = measured
        self._pinned: frozenset[int] = frozenset()
        for block in elastic.segment_of:
            if block in streamed:
                streamed[block].comes_and_goes = True

    # ---- accesses ---------------------------------------------------------------------------------------------------

    def use(self, blocks: tuple[int, ...], *, opens: bool) -> None:
        """An access of blocks begins: have them there. ``opens``: by a forward of the module that reads them."""
        self._pinned = frozenset(blocks)
        if self.used:
            self.shut_all(but=blocks)
        self.start_loads()
        used = []
        for block in blocks:
            streamed = self.streamed.get(block)
            if streamed is None:
                continue
            if streamed.is_stale:
                self._shut(streamed)
            state = streamed.state
            if state is AWAY:
                position = self._position
                streamed.misses += self._measured.passes > 0 or position.now >= position.sequence.length
                self._load(streamed)
                self._wait(streamed)
            elif state is LOADING:
                self._wait(streamed)
            elif state is HIDDEN or streamed.at_home:  # a forward that raised has left it there
                streamed.bind()
            if opens or streamed.opens_in_backward:
                streamed.open()
            used.append(streamed)
        self.used = tuple(used)

    def read_at_home(self, module: str) -> None:
        """A forward begins of a module in ``at_home``."""
        for streamed in self.at_home[module]:
            streamed.point_home()

    def leave_home(self, module: str) -> None:
        """It is over."""
        for streamed in self.at_home[module]:
            replaced, is_written = streamed.leave_home()
            for place, value in replaced.items():
                self._written.write(streamed, streamed.rows[place], value, replaced=True)
            if is_written:
                self._evict(streamed)

    @contextmanager
    def recomputing(self, module: str) -> Iterator[None]:
        """The forward of a module runs again, in its backward, as the plan has it. It takes the lock itself."""
        with self.lock:
            held = [self.streamed[block] for block in self._position.reads.get(module, ()) if block in self.streamed]
            opened = [streamed for streamed in held if streamed.state in (HIDDEN, SHUT)]
            for streamed in opened:
                streamed.open()
        try:
            yield
        finally:
            with self.lock:
                self.shut_recomputed(opened)

    def open_in_backward(self, streamed: Streamed, *, for_good: bool) -> bool:
        """Open a block of which a backward is under way, and return whether it is. ``for_good``: in each backward to
        come. It takes the lock itself.
        """
        with self.lock:
            if streamed.state not in IN_SLOT or streamed.block not in self._pinned:
                return False
            streamed.opens_in_backward |= for_good
            streamed.open()
            return True

    def shut_recomputed(self, opened: Iterable[Streamed]) -> None:
        """End forwards that ran again in a backward. The blocks stay: what they saved is read where it lies, in that
        backward.
        """
        for streamed in opened:
            written = streamed.shut()
            if written:
                self._written.written_in_access(streamed, written)

    def unpin(self) -> None:
        """No access is under way: any block may go."""
        self._pinned = frozenset()

    def shut_all(self, but: tuple[int, ...] = ()) -> None:
        """Have no block's weights read unnoticed from now on, but those of some."""
        used, self.used = self.used, ()
        for streamed in used:
            if streamed.block not in but:
                self._shut(streamed)

    def _shut(self, streamed: Streamed) -> None:
        """End an access of a block. What was written to its weights meanwhile goes to its home. Raises RunError."""
        written = streamed.shut()
        if written:
            self._written.written_in_access(streamed, written)
        if streamed.taken:
            self._written.keep_taken(streamed)
        if streamed.is_stale:
            streamed.is_stale = False
            self._evict(streamed)
        elif streamed.is_shared_out and not written:
            self._written.settle(streamed.block)
            if streamed.is_shared_out:  # who holds it may write to it at any time: have it read anew
                self._evict(streamed)
        # In backward autograd reads what it saved; and what nothing else ever lies in the place of may be kept by
        # whoever reads it.
        may_go = streamed.overlapping or streamed.comes_and_goes
        if may_go and streamed.state is SHUT and torch._C._current_graph_task_id() == -1:
            streamed.hide()

    def _wait(self, streamed: Streamed) -> None:
        """Make the compute wait for a block that is on its way."""
        assert streamed.ticket is not None
        try:
            stalled = self._transfers.wait(streamed.ticket, streamed.block)
        except Exception:  # the load failed; an interrupt of the wait leaves it under way
            streamed.leave()
            raise
        streamed.stall_s += stalled
        self._measured.stalled_s += stalled
        streamed.arrive()

    # ---- loads ------------------------------------------------------------------------------------------------------

    def start_loads(self, *, is_over: bool = False) -> None:
        """Start every planned load whose room is free, in each channel's order. ``is_over``: the access under way is,
        and what it read may go.
        """
        if is_over:
            self._pinned = frozenset()
        if self._elastic.planned:
            self._give_back()
        position = self._position
        length, done, turns = position.sequence.length, position.done, position.next_load
        for channel, loads in position.sequence.loads.items():
            while True:
                cycle, turn = divmod(turns[channel], len(loads))
                due = loads[turn]
                if cycle * length + due.load_after >= done:
                    break
                is_ahead = cycle * length + due.last_use >= max(position.now, 0)
                if is_ahead and position.choices.wants(cycle, due) and not self._start(due.key):
                    break
                turns[channel] += 1

    def _give_back(self) -> None:
        """Give back the segments that what is under way has no room for. [Note: when a segment is there]"""
        for number in self._elastic.there():
            if self._lacks(number):
                blocks = self._elastic.blocks[number]
                if self._pinned.isdisjoint(blocks):
                    for block in blocks:
                        self._evict(self.streamed[block])
                    self._elastic.leave(number)

    def _lacks(self, segment: int) -> bool:
        position = self._position
        return position.sequence.lacks(segment, position.now, position.done)

    def _start(self, key: int) -> bool:
        """Start a load unless it is there already, or nobody wants it. Returns False where it has to wait for its
        room.
        """
        streamed = self.streamed.get(key)
        wanted = self.offloads.is_due(key) if streamed is None else streamed.state is AWAY
        if wanted:
            overlapping = self.offloads.by_key[key].overlapping if streamed is None else streamed.overlapping
            if any(rival in self._pinned for rival in overlapping):
                return False
            segment = self._elastic.segment_of.get(key)
            if segment is not None and self._lacks(segment):
                return False
            if streamed is None:
                self.offloads.load(key)
            elif not streamed.is_shared_out or self._is_settled(streamed):
                self._load(streamed)
        return True

    def _is_settled(self, streamed: Streamed) -> bool:
        """Whether a block that was shared out may be loaded ahead of its use: nobody may write to it meanwhile."""
        self._written.settle(streamed.block)
        return not streamed.is_shared_out

    def _load(self, streamed: Streamed) -> None:
        if streamed.is_shared_out:
            self._written.settle(streamed.block)
        for rival in streamed.overlapping:
            self._clear(rival)
        self._elastic.come(streamed.block)
        streamed.start(self._transfers.load(streamed.channel, streamed.block, streamed.source, streamed.part))

    def _clear(self, key: int) -> None:
        """Have a slot's bytes free for others."""
        if key in self.streamed:
            self._evict(self.streamed[key])
        else:
            self.offloads.clear(key)

    def _evict(self, streamed: Streamed) -> None:
        if streamed.state is OPEN:
            self._shut(streamed)
        if streamed.state is not AWAY:
            ticket = streamed.leave()
            if ticket is not None:  # off the sequence: two channels must not write one slot at once
                self._transfers.wait(ticket, streamed.block)

    def drop(self, block: int) -> None:
        """Have a streamed block be loaded anew before it is used: it was written to. It takes the lock itself."""
        with self.lock:
            streamed = self.streamed[block]
            if streamed in self.used:  # its access goes on with what is there: another thread's may be under way
                streamed.is_stale = True
            else:
                self._evict(streamed)

    def sequence_of(self, cycle: Cycle) -> Sequence | None:
        """Return the sequence of a cycle that was learned, with the loads that slots have room for."""
        segments = self._elastic.segment_of
        users = {b: SlotUser(s.channel, s.overlapping, segment=segments.get(b, -1)) for b, s in self.streamed.items()}
        users |= {key: SlotUser("h2d", held.overlapping, held.module) for key, held in self.offloads.by_key.items()}
        position = self._position
        return sequence_of(cycle, position.reads, users, position.sequence.experts, self._elastic.absences)

    # ---- beginning and end ------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the first loads."""
        for number in self._elastic.there():
            self._elastic.leave(number)
        self.start_loads()

    def is_there(self, block: int) -> bool:
        """Whether a streamed block may be read now (checked mode)."""
        streamed = self.streamed.get(block)
        return streamed is not None and streamed.state in IN_SLOT

    def quiesce(self) -> None:
        """Have every load finish, and every block away."""
        for streamed in self.streamed.values():
            self._evict(streamed)

    def _mend(self) -> None:
        """Have nothing on its way and every block away."""
        self._transfers.drain()
        self.shut_all()
        for streamed in self.streamed.values():
            streamed.forget()
        self.offloads.forget()
        self._pinned = frozenset()

    def close(self) -> None:
        """Hold nothing any more."""
        del self._elastic
        self.used, self.streamed, self.at_home = (), {}, {}  # a graph that is alive must not keep the arenas
        self.lock.mend = None  # no circle is left
