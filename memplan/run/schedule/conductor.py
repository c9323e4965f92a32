"""The conductor: what triggers call at every access. It asks the position what the access reads, and has the loader
bring that.

It is called in whichever thread autograd runs in, under one lock. An access off the sequence is served all the same,
and counted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memplan.errors import RunError
from memplan.hooks.triggers import caller, compute_here
from memplan.program.record import BlockRecord, RunRecord
from memplan.program.schema import Plan
from memplan.run.access.direct_access import DirectAccess
from memplan.run.access.dispatched import passes_by, passes_by_no_more
from memplan.run.access.entrances import Entrances
from memplan.run.access.transforms import refuse_transforms
from memplan.run.memory.arena import Arena
from memplan.run.modules.embedding_rows import read_in_place
from memplan.run.modules.offloaded_activations import Offloaded
from memplan.run.schedule.elastic import Elastic
from memplan.run.schedule.loader import Loader
from memplan.run.schedule.position import Position
from memplan.run.schedule.sequence import planned
from memplan.run.schedule.streamed import OPEN, Streamed
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
        self._transfers = transfers
        self._direct = direct
        self.entrances = entrances
        self._process = os.getpid()
        self._recomputed = plan.recomputed_triggers()
        self._forward_of: int | None = None  # the thread whose forward is under way
        self._used_by = 0  # the thread whose access was the last to begin
        self._closed = False
        self._paused = ""
        self._trained_by = 0  # the thread of the last forward with gradients
        self._measured = Measured()
        self.gave: Callable[[nn.Parameter], bool] | None = None
        """Where micro-batches take turns: whether the one whose turn it is has given a parameter a gradient."""
        self._lane_begins_cycle = True
        self._lanes = 1  # micro-batches that take turns now
        self._side_by_side = 1  # in the cycle that is under way
        self._blocks: tuple[BlockRecord, ...] = ()  # as they were when it was closed
        in_place = read_in_place(plan)
        reads = {
            a.index: tuple(b for b in a.blocks if b not in in_place.get(a.module, ())) for a in plan.table.accesses
        }
        by_module: dict[str, set[int]] = {}
        for access in plan.table.accesses:
            by_module.setdefault(access.module, set()).update(reads[access.index])
        at_home = {module: tuple(streamed[b] for b in blocks if b in streamed) for module, blocks in in_place.items()}
        elastic = Elastic(plan, arena, transfers)
        self._position = Position(
            planned(plan, reads, elastic.planned),
            {module: tuple(sorted(blocks)) for module, blocks in by_module.items()},
            self._measured,
        )
        self.loader = Loader(
            streamed, at_home, offloaded, transfers, arena, elastic, direct.written, self._position, self._measured
        )
        self._lock = self.loader.lock

    # ---- what the triggers say -------------------------------------------------------------------------------------

    def forward_begins(self, module: str, *, in_backward: bool) -> int:
        with self._lock:
            if self._closed:
                return -1
            self._refuse_elsewhere(module, in_backward)
            if self._paused:
                raise RunError(f"the model was called {self._paused}, where its weights are only read: call it outside")
            passes_by()
            if not in_backward:
                compute_here()
            self._used_by = caller()
            if in_backward:
                self.entrances.announced(module)
                call, reads = self._position.recompute_begins(module)
                self.loader.use(reads, opens=True)
            else:
                call, reads, begins_cycle = self._position.forward_begins(module)
                if begins_cycle:
                    self._cycle_begins()
                self.loader.use(reads, opens=True)
                self._position.forward_seen(module, call)
                if torch.is_grad_enabled():
                    self.entrances.called(module)
            if module in self.loader.at_home:
                self.loader.read_at_home(module)
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
        self._refuse_beside_forward(module)
        self._forward_of = caller()

    def _refuse_beside_forward(self, module: str) -> None:
        """Raise RunError where the forward that is under way is another thread's."""
        if self.loader.used and self._forward_of not in (None, caller()):
            raise RunError(
                f"{module} was reached in a thread while another one computes with the same model, whose weights "
                "memplan brings one after the other: let the calls take turns, or detach() first"
            )

    def forward_ends(self, module: str, call: int, *, in_backward: bool) -> None:
        with self._lock:
            if self._closed:
                return
            if module in self.loader.at_home:
                self.loader.leave_home(module)
            if in_backward:
                self.loader.shut_recomputed(self.loader.used)
                return
            self.loader.shut_all()
            if torch.is_grad_enabled():
                self._trained_by = caller()
            elif self._trained_by != caller():
                passes_by_no_more()  # it evaluates: what it reads by itself, while another trains, it is given
            if self._position.forward_ends(call):
                self.loader.start_loads(is_over=True)

    def forward_failed(self) -> None:
        """A forward was left by an error: nothing of it goes on."""
        if not any(one.state is OPEN for one in self.loader.used) or self._used_by != caller():
            return  # in a thread that was refused, beside another's access
        with self._lock:
            if not self._closed:
                self.loader.shut_all()

    def backward_begins(self, module: str, call: int) -> None:
        with self._lock:
            self._refuse_beside_forward(module)
            self._forward_of, self._used_by = None, caller()
            if self._closed or self._paused:
                raise RunError(
                    f"the backward of {module} ran {self._paused or 'after detach()'}, and what its forward read "
                    "is gone: finish the backward first"
                )
            if torch.is_grad_enabled() and (self.loader.streamed or self.loader.offloads.by_key):
                raise RunError(
                    "a backward that can itself be differentiated (create_graph=True) came to "
                    f"{module}: it reads weights again later, which no trigger would see. Pin all blocks to the device"
                )
            self.entrances.announced(module)
            self.loader.use(self._position.backward_begins(module, call), opens=False)

    def backward_ends(self) -> None:
        with self._lock:
            self.loader.unpin()
            self.loader.shut_all()
            if self._closed or self._position.now < 0:
                return
            left_out = self._position.backward_ends()
            if self.gave is not None:
                self.entrances.lane_ends(self.gave, left_out=left_out)
                self._position.count_backward()
                return
            self.entrances.backward_ends(left_out=left_out)
            self._position.backward_ended()
            self._position.learn(self.loader.sequence_of)
            self.loader.start_loads(is_over=True)

    # ---- micro-batches that take turns ------------------------------------------------------------------------------

    @property
    def position(self) -> Position:
        """Where in its sequence the run is."""
        return self._position

    def group_begins(self, count: int) -> list[tuple[Any, ...]]:
        """So many micro-batches are to take turns. Return what is each one's own, for :meth:`be_lane`."""
        begins = self._position.lanes_at_begin(count)
        return [(at, (set(), set()), not turn, count) for turn, at in enumerate(begins)]

    def lane(self) -> tuple[Any, ...]:
        """Return what is one micro-batch's own."""
        return self._position.lane(), self.entrances.lane(), self._lane_begins_cycle, self._lanes

    def be_lane(self, lane: tuple[Any, ...], floor: int) -> None:
        """Go on with another micro-batch. ``floor``: accesses from there on are yet to be done by others."""
        at, entrances, self._lane_begins_cycle, self._lanes = lane
        self._position.be_lane(at)
        self._position.floor = floor
        self.entrances.be_lane(entrances)

    def serve_again(self) -> Callable[[], None]:
        """Return what has the blocks of the access under way be there, once others have had their turn."""
        blocks = tuple(streamed.block for streamed in self.loader.used)

        def again() -> None:
            with self._lock:
                self.loader.use(blocks, opens=False)

        return again

    def group_ends(self, lanes: list[tuple[Any, ...]], *, failed: bool) -> None:
        """All have had their turn."""
        position = self._position
        with self._lock:
            self.gave, self._lane_begins_cycle, self._lanes = None, True, 1
            now, had_backward, strayed, _ = max((lane[0] for lane in lanes), key=lambda at: int(at[0]))
            position.be_lane((now, had_backward, strayed, lanes[0][0][3]))
            position.floor = sys.maxsize
            self.entrances.be_lane((set(), set()))
            self.loader.unpin()
            self.loader.shut_all()
            self._forward_of = None
            if self._closed or position.now < 0 or failed:
                return
            self.entrances.mark()
            position.cycle_ended()
            position.learn(self.loader.sequence_of)
            self.loader.start_loads(is_over=True)

    def _cycle_begins(self) -> None:
        if not self._lane_begins_cycle:
            return
        self.entrances.pass_begins()
        for block, stalled in self._transfers.device_stalls().items():
            if block in self.loader.streamed:
                self.loader.streamed[block].stall_s += stalled
            self._measured.stalled_s += stalled
        self._measured.cycle_begins(self._position.sequence.passes * self._side_by_side)
        self._side_by_side = self._lanes

    # ---- the record ------------------------------------------------------------------------------------------------

    def record(
        self, *, vram_peak_bytes: int, ram_peak_bytes: int, recoveries: int, weight_copy_bytes: int
    ) -> RunRecord:
        """Return what was measured so far. ``ram_peak_bytes``: without what transfers hold of their own."""
        with self._lock:
            return self._measured.record(
                self._plan,
                self._blocks if self._closed else blocks_of(self.loader.streamed.values()),
                self.loader.offloads,
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
            self.loader.begin()

    def pause(self, where: str) -> None:
        """Have every load finish, every block away, and every access refused until ``resume``."""
        with self._lock:
            self.loader.quiesce()
            self._direct.written.settle()
            self._paused = where

    def resume(self) -> None:
        """Serve again."""
        with self._lock:
            self._paused = ""

    def close(self) -> None:
        """Stop serving. A backward of a call made before raises."""
        with self._lock:
            try:
                self.loader.quiesce()
                self.loader.offloads.close()
            finally:
                self.loader.used = ()
                try:
                    self._direct.close()
                finally:
                    self._end()

    def _end(self) -> None:
        self._closed = True
        self._blocks = blocks_of(self.loader.streamed.values())
        self.loader.close()
        self._transfers.close()
