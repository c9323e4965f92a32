"""The conductor: at every access it brings what the plan says and makes the compute wait for what it needs.

It watches the triggers (in whichever thread autograd runs in, under one lock), keeps the position in the plan's cycle,
starts each planned load as soon as its room is free, and points parameters at their slot or away from it.

An access off the sequence is served all the same: its blocks are loaded on demand, each into its one address, and
counted. So the plan's order is only ever a matter of speed; what is right does not rest on it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from memplan.errors import RunError
from memplan.program.record import BlockRecord, RunRecord
from memplan.program.schema import Plan
from memplan.run.access.direct_access import DirectAccess
from memplan.run.access.entrances import Entrances
from memplan.run.access.transforms import refuse_transforms
from memplan.run.memory.arena import Arena
from memplan.run.modules.embedding_rows import read_in_place
from memplan.run.modules.offloaded_activations import Offloaded, Offloads
from memplan.run.schedule.elastic import Elastic
from memplan.run.schedule.expected_loads import Choices
from memplan.run.schedule.learning import Learner, SlotUser, sequence_of
from memplan.run.schedule.sequence import Sequence, planned
from memplan.run.schedule.streamed import Streamed
from memplan.run.transfer.lock import Lock
from memplan.run.transfer.transfer import Transfers
from memplan.run.verify.metrics import Measured, blocks_of


class Conductor:
    """A :class:`memplan.hooks.triggers.Watcher` that serves a plan's streamed blocks."""

    def __init__(
        self,
        plan: Plan,
        streamed: dict[int, Streamed],
        transfers: Transfers,
        offloaded: dict[int, Offloaded],
        arena: Arena,
        direct: DirectAccess,
        entrances: Entrances,
    ) -> None:
        """``arena``: the device's. ``direct``: who serves what reads weights that are not open. ``entrances``: who
        looks whether a backward came to a layer unseen.
        """
        self._plan = plan
        self._streamed = streamed
        self._transfers = transfers
        self._direct = direct
        self.lock = self._lock = Lock(self._mend)
        self._used: tuple[Streamed, ...] = ()  # what the access under way reads, open or not
        self._had_backward = False
        self._strayed_in_backward = False  # or its forwards did, of which some may have none that is seen
        self.entrances = entrances
        self._process = os.getpid()
        self._recomputed = frozenset(p.module for p in plan.activations if p.activations == "recompute")
        self._forward_of: int | None = None  # the thread whose forward is under way
        self._opening = False  # whether what is used now is used by its own module's forward
        self.offloads = Offloads(offloaded, transfers, self._lock, self._clear, arena)
        in_place = read_in_place(plan)
        reads = {
            a.index: tuple(b for b in a.blocks if b not in in_place.get(a.module, ())) for a in plan.table.accesses
        }
        at_home = {module: tuple(streamed[b] for b in blocks if b in streamed) for module, blocks in in_place.items()}
        self._at_home = {module: held for module, held in at_home.items() if held}
        by_module: dict[str, set[int]] = {}
        for access in plan.table.accesses:
            by_module.setdefault(access.module, set()).update(reads[access.index])
        self._module_reads = {module: tuple(sorted(blocks)) for module, blocks in by_module.items()}
        self._learner = Learner()
        self._first_call = 0  # what a forward at position 0 of this sequence is called: calls before it lie below
        self._aside = -1  # the last name of a forward that the sequence lacks: it counts down
        self._elastic = Elastic(plan, arena, transfers)
        for block in self._elastic.segment_of:
            if block in streamed:
                streamed[block].comes_and_goes = True
        self._follow(planned(plan, reads, self._elastic.planned))
        self._pinned: frozenset[int] = frozenset()
        self._closed = False
        self._paused = ""
        self._measured = Measured()
        self._blocks: tuple[BlockRecord, ...] = ()  # as they were when it was closed

    # ---- what the triggers say -------------------------------------------------------------------------------------

    def forward_begins(self, module: str, *, in_backward: bool) -> int:
        with self._lock:
            if self._closed:
                return -1
            self._refuse_elsewhere(module, in_backward)
            if self._paused:
                raise RunError(f"the model was called {self._paused}, where its weights are only read: call it outside")
            self._opening = True
            try:
                call = self._recompute_begins(module) if in_backward else self._forward_begins(module)
            finally:
                self._opening = False
            for streamed in self._at_home.get(module, ()):
                streamed.point_home()
            return call

    def _refuse_elsewhere(self, module: str, in_backward: bool) -> None:
        """Raise RunError where two threads compute with the model at once, a process that was forked, or
        ``torch.func``.
        """
        if os.getpid() != self._process:
            raise RunError(
                f"{module} was called in a process that was forked from one in which memplan streams its weights: "
                "the threads that bring them are not there. Start the process with the spawn method, or call the "
                "model in the main process"
            )
        if in_backward:
            return  # autograd's own threads
        refuse_transforms(module, self._recomputed)
        thread = threading.get_ident()
        if self._used and self._forward_of not in (None, thread):
            raise RunError(
                f"{module} was called in a thread while another one computes with the same model, whose weights "
                "memplan brings one after the other: let the calls take turns, or detach() first"
            )
        self._forward_of = thread

    def _forward_begins(self, module: str) -> int:
        passed = self._sequence.passed_expert(module, self._now)
        position = self._sequence.next_forward(module, self._now) if passed is None else passed
        if position is None:
            call = self._aside = self._aside - 1
            self._serve_aside(module)
            self._strayed_in_backward = True
        else:
            call = self._first_call + position
            if passed is None:
                self._move_on(position)
            else:
                self._serve_aside(module)
            self._choices.note(position)  # only now: what is loaded when it is called was not foreseen
        if torch.is_grad_enabled():
            self.entrances.called(module)
        if self._learner.writing:
            self._learner.forward(module, call)
        return call

    def _move_on(self, position: int) -> None:
        """Go to a forward that is ahead."""
        begun = self._measured.has_begun
        if begun and self._sequence.skipped_reads(self._now, position):
            self._strayed()
        if position // self._sequence.length != self._now // self._sequence.length or not begun:
            self._strayed_in_backward |= begun and not self._had_backward  # that one's backward may be to come
            self._had_backward = False
            self._cycle_begins()
            self._choices.cycle_begins(position // self._sequence.length)
        self._go_to(position)

    def forward_ends(self, module: str, call: int, *, in_backward: bool) -> None:
        with self._lock:
            if self._closed:
                return
            for streamed in self._at_home.get(module, ()):
                replaced, is_written = streamed.leave_home()
                for place, value in replaced.items():
                    self._direct.write(streamed, streamed.rows[place], value, replaced=True)
                if is_written:
                    self._evict(streamed)
            if in_backward:
                self._close(self._used)
            else:
                self._shut_all()
            if not in_backward and call == self._first_call + self._now:
                self._done = self._now + 1
                self._pinned = frozenset()
                self._start_loads()

    def forward_failed(self) -> None:
        """A forward was left by an error: nothing of it goes on."""
        if not any(one.is_open for one in self._used):
            return
        with self._lock:
            if not self._closed:
                self._shut_all()

    def backward_begins(self, module: str, call: int) -> None:
        with self._lock:
            self._forward_of = None
            if self._closed or self._paused:
                raise RunError(
                    f"a backward came to {module} {self._paused or 'after detach()'}, but its forward was before: "
                    "what it read is no longer there. Finish the backward first"
                )
            if torch.is_grad_enabled() and (self._streamed or self.offloads.by_key):
                raise RunError(
                    "a backward that can itself be differentiated (create_graph=True) came to "
                    f"{module}: it reads weights again later, which no trigger would see. Pin all blocks to the device"
                )
            self.entrances.announced(module)
            if self._learner.writing:
                self._learner.backward(module, call)
            position = self._sequence.backward_at(module, call - self._first_call, self._now)
            if position is not None:
                if position > self._now and self._sequence.skipped_reads(self._now, position):
                    self._strayed()
                    self._strayed_in_backward = True
                self._go_to(position)
            else:
                self._serve_aside(module)

    def backward_ends(self) -> None:
        with self._lock:
            self._pinned = frozenset()
            self._shut_all()
            if self._closed or self._now < 0:
                return
            self._had_backward = True
            strayed, self._strayed_in_backward = self._strayed_in_backward, False
            self.entrances.backward_ends(left_out=strayed or not self._sequence.is_over(self._now))
            cycle = self._now // self._sequence.length
            is_over = self._sequence.is_over(self._now)
            self._done = (cycle + 1) * self._sequence.length if is_over else self._now + 1
            self._measured.backward_ends(self._sequence.passes if is_over else 0)
            self._learn()
            self._start_loads()

    def _recompute_begins(self, module: str) -> int:
        """A forward inside a backward: a checkpoint recomputes. It is the same access as the backward it belongs to.

        Where a checkpoint spans several modules they come in forward order: only the next planned backward moves the
        position, the others are served beside it, lest what is still needed counts as over.
        """
        self.entrances.announced(module)
        if self._learner.writing:
            self._learner.backward(module)
        position = self._sequence.next_backward(module, self._now)
        if position is None:
            self._serve_aside(module)
            return -1
        index = position % self._sequence.length
        if position == self._now or not self._sequence.skipped_reads(self._now, position):
            self._go_to(position)
        else:
            self._serve_aside(module)
        return self._first_call + position - index + self._sequence.steps[index].forward

    # ---- where it is -----------------------------------------------------------------------------------------------

    def _follow(self, sequence: Sequence) -> None:
        """Take a sequence for the one that accesses follow from now on. None of it has been done yet."""
        self._choices = Choices(sequence)
        self._now = -1  # linear position of the access under way; -1: none yet
        self._done = 0  # accesses below this are over: what they read may be overwritten
        # Per channel: how many loads were dealt with. From the cycle before the first: some of its loads stay for it.
        self._next = {channel: -len(loads) for channel, loads in sequence.loads.items()}
        self._sequence = sequence  # last: a Ctrl-C before it leaves the old one at its beginning

    def _strayed(self) -> None:
        self._measured.out_of_order += 1
        self._learner.strayed()

    def _learn(self) -> None:
        """Follow another sequence where passes have left this one for good."""
        way = self._learner.cycle_ends()
        if way is None:
            return
        segments = self._elastic.segment_of
        movers = {b: SlotUser(s.channel, s.overlapping, segment=segments.get(b, -1)) for b, s in self._streamed.items()}
        movers |= {key: SlotUser("h2d", held.overlapping, held.module) for key, held in self.offloads.by_key.items()}
        experts, absences = self._sequence.experts, self._elastic.absences
        sequence = sequence_of(way, self._module_reads, movers, experts, absences)
        if sequence is None:
            return
        is_new = sequence.steps != self._sequence.steps  # else an odd forward has put it out of step for good
        self._first_call += (self._now // self._sequence.length + 2) * self._sequence.length
        self._follow(sequence if is_new else self._sequence)
        self._measured.sequence_begins_anew(is_new)

    # ---- serving ---------------------------------------------------------------------------------------------------

    def _go_to(self, position: int) -> None:
        self._now = position
        self._done = max(self._done, position)
        self._use(self._sequence.steps[position % self._sequence.length].blocks)

    def _serve_aside(self, module: str) -> None:
        """Serve an access that is not where the plan has it; the position stays."""
        self._strayed()
        self._use(self._module_reads.get(module, ()))

    def _use(self, blocks: tuple[int, ...]) -> None:
        self._pinned = frozenset(blocks)
        if self._used:
            self._shut_all(but=blocks)
        self._start_loads()
        used = []
        for block in blocks:
            streamed = self._streamed.get(block)
            if streamed is None:
                continue
            if streamed.is_stale:
                self._shut(streamed)
            if not streamed.usable:
                if streamed.ticket is None:
                    streamed.misses += self._measured.passes > 0 or self._now >= self._sequence.length
                    self._load(streamed)
                self._make_usable(streamed)
            elif streamed.is_hidden or streamed.at_home:  # a forward that raised has left it there
                streamed.bind()
            if self._opening or streamed.opens_in_backward:
                streamed.open()
            used.append(streamed)
        self._used = tuple(used)

    @contextmanager
    def recomputing(self, module: str) -> Iterator[None]:
        """The forward of a module runs again, in its backward, as the plan has it."""
        with self._lock:
            held = [self._streamed[block] for block in self._module_reads.get(module, ()) if block in self._streamed]
            opened = [streamed for streamed in held if streamed.usable and not streamed.is_open]
            for streamed in opened:
                streamed.open()
        try:
            yield
        finally:
            with self._lock:
                self._close(opened)

    def _close(self, opened: Iterable[Streamed]) -> None:
        """End forwards that ran again in a backward. The blocks stay: what they saved is read where it lies, in that
        backward.
        """
        for streamed in opened:
            written = streamed.shut()
            if written:
                self._direct.written_in_access(streamed, written)

    def open_in_backward(self, streamed: Streamed, *, for_good: bool) -> bool:
        """Open a block of which a backward is under way, and return whether it is. ``for_good``: in each backward to
        come.
        """
        with self._lock:
            if not streamed.usable or streamed.block not in self._pinned:
                return False
            streamed.opens_in_backward |= for_good
            streamed.open()
            return True

    def _shut_all(self, but: tuple[int, ...] = ()) -> None:
        """Have no block's weights read unnoticed from now on, but those of some."""
        used, self._used = self._used, ()
        for streamed in used:
            if streamed.block not in but:
                self._shut(streamed)

    def _shut(self, streamed: Streamed) -> None:
        """End an access of a block. What was written to its weights meanwhile goes to its home. Raises RunError."""
        written = streamed.shut()
        if written:
            self._direct.written_in_access(streamed, written)
        if streamed.taken:
            self._direct.keep_taken(streamed)
        if streamed.is_stale:
            streamed.is_stale = False
            self._evict(streamed)
        elif streamed.is_shared_out and not written:
            self._direct.settle(streamed.block)
            if streamed.is_shared_out:  # who holds it may write to it at any time: have it read anew
                self._evict(streamed)
        # In backward autograd reads what it saved; and what nothing else ever lies in the place of may be kept by
        # whoever reads it.
        if streamed.usable and streamed.may_go and torch._C._current_graph_task_id() == -1:
            streamed.hide()

    def _make_usable(self, streamed: Streamed) -> None:
        assert streamed.ticket is not None
        try:
            stalled = self._transfers.wait(streamed.ticket, streamed.block)
        except Exception:  # the load failed; an interrupt of the wait leaves it under way
            streamed.ticket = None
            raise
        streamed.stall_s += stalled
        self._measured.stalled_s += stalled
        streamed.bind()
        streamed.usable = True

    def _start_loads(self) -> None:
        """Start every planned load whose room is free, in each channel's order."""
        if self._elastic.planned:
            self._give_back()
        length, done = self._sequence.length, self._done
        for channel, loads in self._sequence.loads.items():
            while True:
                cycle, turn = divmod(self._next[channel], len(loads))
                due = loads[turn]
                if cycle * length + due.load_after >= done:
                    break
                is_ahead = cycle * length + due.last_use >= max(self._now, 0)
                if is_ahead and self._choices.wants(cycle, due) and not self._start(due.key):
                    break
                self._next[channel] += 1

    def _give_back(self) -> None:
        """Give back the segments that what is under way has no room for. [Note: when a segment is there]"""
        for number in self._elastic.there():
            if self._sequence.lacks(number, self._now, self._done):
                blocks = self._elastic.blocks[number]
                if self._pinned.isdisjoint(blocks):
                    for block in blocks:
                        self._evict(self._streamed[block])
                    self._elastic.leave(number)

    def _start(self, key: int) -> bool:
        """Start a load unless it is there already, or nobody wants it. Returns False where it has to wait for its
        room.
        """
        streamed = self._streamed.get(key)
        wanted = self.offloads.is_due(key) if streamed is None else streamed.ticket is None
        if wanted:
            overlapping = self.offloads.by_key[key].overlapping if streamed is None else streamed.overlapping
            if any(rival in self._pinned for rival in overlapping):
                return False
            segment = self._elastic.segment_of.get(key)
            if segment is not None and self._sequence.lacks(segment, self._now, self._done):
                return False
            if streamed is None:
                self.offloads.load(key)
            elif not streamed.is_shared_out or self._is_settled(streamed):
                self._load(streamed)
        return True

    def _is_settled(self, streamed: Streamed) -> bool:
        """Whether a block that was shared out may be loaded ahead of its use: nobody may write to it meanwhile."""
        self._direct.settle(streamed.block)
        return not streamed.is_shared_out

    def _load(self, streamed: Streamed) -> None:
        if streamed.is_shared_out:
            self._direct.settle(streamed.block)
        for rival in streamed.overlapping:
            self._clear(rival)
        self._elastic.come(streamed.block)
        streamed.ticket = self._transfers.load(streamed.channel, streamed.block, streamed.source, streamed.part)
        streamed.loads += 1

    def _clear(self, key: int) -> None:
        """Have a slot's bytes free for others."""
        if key in self._streamed:
            self._evict(self._streamed[key])
        else:
            self.offloads.clear(key)

    def _evict(self, streamed: Streamed) -> None:
        if streamed.ticket is None:
            return
        if streamed.is_open:
            self._shut(streamed)
            if streamed.ticket is None:
                return
        ticket, usable = streamed.ticket, streamed.usable
        streamed.ticket, streamed.usable = None, False
        if usable:
            if not streamed.is_hidden:
                streamed.unbind()
            if streamed.at_home:  # a forward that raised has left it there
                streamed.be_away()
        else:  # still on its way, off the sequence: two channels must not write one slot at once
            self._transfers.wait(ticket, streamed.block)

    # ---- the record ------------------------------------------------------------------------------------------------

    def _cycle_begins(self) -> None:
        self.entrances.pass_begins()
        for block, stalled in self._transfers.device_stalls().items():
            if block in self._streamed:
                self._streamed[block].stall_s += stalled
            self._measured.stalled_s += stalled
        self._measured.cycle_begins(self._sequence.passes)

    def drop(self, block: int) -> None:
        """Have a streamed block be loaded anew before it is used: it was written to. It may be called with the lock in
        hand.
        """
        with self._lock:
            streamed = self._streamed[block]
            if streamed in self._used:  # its access goes on with what is there: another thread's may be under way
                streamed.is_stale = True
            else:
                self._evict(streamed)

    def record(
        self, *, vram_peak_bytes: int, ram_peak_bytes: int, recoveries: int, weight_copy_bytes: int
    ) -> RunRecord:
        """Return what was measured so far. ``ram_peak_bytes``: without what transfers hold of their own."""
        with self._lock:
            return self._measured.record(
                self._plan,
                self._blocks if self._closed else blocks_of(self._streamed.values()),
                self.offloads,
                vram_peak_bytes=vram_peak_bytes,
                ram_peak_bytes=ram_peak_bytes + self._transfers.ring_bytes,
                recoveries=recoveries,
                weight_copy_bytes=weight_copy_bytes,
                direct=self._direct,
            )

    # ---- beginning and end -----------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the first loads."""
        with self._lock:
            for number in self._elastic.there():
                self._elastic.leave(number)
            self._start_loads()

    def is_there(self, block: int) -> bool:
        """Whether a streamed block may be read now (checked mode)."""
        streamed = self._streamed.get(block)
        return streamed is not None and streamed.usable

    def pause(self, where: str) -> None:
        """Have every load finish, every block away, and every access refused until ``resume``."""
        with self._lock:
            self._quiesce()
            self._direct.settle()
            self._paused = where

    def resume(self) -> None:
        """Serve again."""
        with self._lock:
            self._paused = ""

    def _mend(self) -> None:
        """Have nothing on its way and every block away."""
        self._transfers.drain()
        self._shut_all()
        for streamed in self._streamed.values():
            streamed.ticket, streamed.usable = None, False
            streamed.unbind()
            streamed.be_away()
        self.offloads.forget()
        self._pinned = frozenset()

    def _quiesce(self) -> None:
        for streamed in self._streamed.values():
            self._evict(streamed)

    def close(self) -> None:
        """Stop serving. A backward of a call made before raises."""
        with self._lock:
            try:
                self._quiesce()
                self.offloads.close()
            finally:
                self._used = ()
                try:
                    self._direct.close()
                finally:
                    self._end()

    def _end(self) -> None:
        self._closed = True
        self._blocks = blocks_of(self._streamed.values())
        del self._elastic
        self._streamed, self._at_home = {}, {}  # a graph that is still alive must not keep the arenas
        self._lock.mend = None  # no circle is left
        self._transfers.close()
