"""The handle of a model under a plan: its record, its weights to read, and the way back."""

from __future__ import annotations

import contextlib
import gc
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from types import TracebackType
from typing import TypeVar

import torch
from msgspec.structs import replace
from torch import nn

from memplan.errors import DoesNotFitError, RunError, first_line
from memplan.hardware.machine import cache_path
from memplan.hooks.recompute import drop_hooks_that_stayed
from memplan.model.live_storages import StorageLedger
from memplan.program.page_lock import page_locked_bytes
from memplan.program.record import RunRecord
from memplan.program.schema import Plan
from memplan.ranks.data_parallel import Broadcast, why_not_repeatable, wrapper_of
from memplan.ranks.restart import leave_vram
from memplan.ranks.world import world
from memplan.run.modules.guard import guard_of
from memplan.run.recovery import Before, Room, is_out_of_memory
from memplan.run.runtime import Runtime
from memplan.run.tiers import Tiers
from memplan.run.transfer.device import is_apart, peak_bytes
from memplan.run.transfer.interrupts import defer_sigint
from memplan.run.verify.scalars import Scalars
from memplan.units import format_bytes

Result = TypeVar("Result")
Batch = TypeVar("Batch")
_LOG = logging.getLogger("memplan")

_SMALLER = 0.9
"""Each try after an out-of-memory is planned for this much of what the one before was to take."""


class Handle:
    """A model under a plan. ``detach`` gives it back; so does leaving the ``with`` block."""

    def __init__(
        self,
        model: nn.Module,
        install: Callable[[Handle], Runtime],
        undo: ExitStack,
        replan: Callable[[Plan, int], Plan] | None,
    ) -> None:
        """``install``: has the model run, at once and wherever the plan changes. ``undo``: what ``detach`` unwinds; it
        is taken over once the model runs. ``replan``: as for ``attach``.
        """
        self.model = model
        self.recoveries = 0
        self._install: Callable[[Handle], Runtime] | None = install
        self._replan = replan
        self._vram_peak_bytes = 0
        self._ledger: StorageLedger | None = None
        """Counts live device bytes, inside ``watch_memory``."""
        self._readers = 0
        self._last: tuple[RunRecord, int] | None = None
        self._scalars = Scalars()
        self._before: Room | None = None
        """Where gradients wait while a micro-batch runs that may be repeated."""
        self._runtime: Runtime | None = install(self)
        """None once detached: the arenas go, though the handle may stay for its record."""
        self.plan = self._runtime.tiers.plan
        """The one at work: another than was given once a micro-batch ran out of memory."""
        self.undo = undo.pop_all()

    @property
    def is_attached(self) -> bool:
        """Whether the model is under the plan still."""
        return self._runtime is not None

    @property
    def record(self) -> RunRecord:
        """What was measured so far. ``vram_peak_bytes`` on the CPU is that of the steps inside ``watch_memory``; on a
        GPU it is torch's, of the whole process since the last ``attach``, which resets torch's peak statistics.
        """
        return self._measured()[0]

    def scalars(self) -> dict[str, float]:
        """Return figures for a log, since the last call: ``memplan/pass_s``, ``memplan/stall_share``,
        ``memplan/loaded_gib_per_s``, and ``memplan/vram_peak_gib`` and ``memplan/vram_reserved_gib`` so far, where they
        are measured.
        """
        return self._scalars.take(self.record)

    @property
    def checked_reads(self) -> int:
        """Saved weights that the checked mode looked at again; 0 outside it."""
        return self._measured()[1]

    def _measured(self) -> tuple[RunRecord, int]:
        runtime = self._runtime
        if runtime is None:
            assert self._last is not None
            return self._last
        peak, reserved = self._vram_peak_bytes, 0
        if is_apart(runtime.tiers.device):
            peak, reserved = peak_bytes(runtime.tiers.device)
        record = runtime.conductor.record(
            vram_peak_bytes=peak,
            ram_peak_bytes=runtime.tiers.host_bytes + (self._before.size_bytes if self._before else 0),
            recoveries=self.recoveries,
            weight_copy_bytes=runtime.copies.unforeseen_bytes if runtime.copies else 0,
        )
        record = replace(record, vram_reserved_bytes=reserved)
        if runtime.spans is not None:
            record = replace(record, spans=runtime.spans.last())
        return record, runtime.checked.checked if runtime.checked else 0

    @contextlib.contextmanager
    def watch_memory(self, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
        """Count live device bytes in the steps inside (CPU: slower there by a Python call an operator).

        The state of ``optimizer`` that exists already counts too.
        """
        if self._runtime is None or is_apart(self._runtime.tiers.device):
            yield
            return
        tiers = self._runtime.tiers
        apart = [*tiers.on_host(), *([tiers.arena.bytes] if tiers.arena.is_elastic else [])]
        with StorageLedger.of_training(self.model, optimizer, ignore=apart) as ledger:
            _count_arena(ledger, tiers)
            self._ledger = ledger
            if tiers.optimizer_state is not None:
                tiers.optimizer_state.watch = ledger.ignore
            try:
                yield
            finally:
                self._ledger = tiers.arena.watch = None
                if tiers.optimizer_state is not None:
                    tiers.optimizer_state.watch = None
        self._vram_peak_bytes = max(self._vram_peak_bytes, ledger.peak_bytes)

    @contextlib.contextmanager
    def _counted_anew(self) -> Iterator[None]:
        """Have ``watch_memory`` count the arena that comes inside in the place of the one before, and nothing of the
        way.
        """
        ledger = self._ledger
        if ledger is None or self._runtime is None:
            yield
            return
        tiers = self._runtime.tiers
        if tiers.arena.is_elastic:
            tiers.arena.watch = None
            ledger.hold(-tiers.arena.there_bytes)
            ledger.regard(tiers.arena.bytes)
        with ledger.looking_away():
            yield
        _count_arena(ledger, tiers)

    def read_directly(self) -> tuple[str, ...]:
        """Return the names of the streamed blocks that were read outside of their modules' forward and backward."""
        names = self._runtime.direct.read_names if self._runtime is not None else set()
        blocks = self.plan.table.blocks
        return tuple(block.name for block in blocks if any(tensor.name in names for tensor in block.tensors))

    def adopt(self, optimizer: torch.optim.Optimizer) -> None:
        """Have an optimizer's state wait where the plan has it from now on, where it has a state already: one that was
        loaded from a checkpoint before its first step. From its first step on that is seen to without being asked for.
        """
        if self._runtime is not None and self._runtime.tiers.optimizer_state is not None:
            self._runtime.tiers.optimizer_state.adopt(getattr(optimizer, "optimizer", optimizer))

    def change(self, plan: Plan) -> None:
        """Have the same blocks run under another plan. On failure the model is detached."""
        assert self._runtime is not None
        assert self._install is not None
        self._refuse_in_turns("change()")
        tiers = self._runtime.tiers
        try:
            with defer_sigint():
                self._runtime.undo.close()
                tiers.change_plan(plan)
                self._runtime = self._install(self)
                self.plan = plan
        except BaseException:
            self.detach()
            raise

    def micro_batch(self, run: Callable[[], Result], *, tries: int = 3) -> Result:
        """Return ``run()``, a forward and backward of one micro-batch, repeated under a smaller plan if memory runs
        out.

        Gradients, buffers and random numbers are then as they were before it, so its result is the one it would have
        been. ``run`` is called again, up to ``tries`` times, so it must not consume what it was given, and must not
        step an optimizer: that cannot be undone. What a record counts begins anew with each plan; ``recoveries`` goes
        on. Within :meth:`accumulate`, where micro-batches take turns, it is not repeated.

        A copy of the gradients of what is trained is held meanwhile, beside what the plan counts (of a GPU's in RAM,
        which is kept until ``detach`` and in the record's ``ram_peak_bytes``).
        While the plan is changed RAM holds what was on the device. Raises RunError where no smaller plan is left.
        """
        runtime = self._runtime
        if runtime is None or self._replan is None or not any(p.requires_grad for p in self.model.parameters()):
            return run()  # of what is trained beside the model the gradients are not known
        if runtime.accumulation is not None and runtime.accumulation.takes_turns:
            return run()  # there are gradients of others by now, which would be lost
        wrapper = wrapper_of(self.model)
        if wrapper is not None and (why := why_not_repeatable(wrapper)) is not None:
            return self._not_repeated(run, why)
        if self._before is None:
            limit, plan = self.plan.budgets.page_lock_bytes, self.plan
            self._before = Room(None if limit is None else max(0, limit - page_locked_bytes(plan)))
        before = Before(self.model, self._before)
        if wrapper is None:
            return self._repeated(run, before, tries)
        with Broadcast(wrapper, before.note_buffers) as broadcast:
            return self._repeated(run, before, tries, broadcast.repeat)

    def _repeated(
        self, run: Callable[[], Result], before: Before, tries: int, again: Callable[[], None] = lambda: None
    ) -> Result:
        """As ``micro_batch``. ``again``: called before each try but the first."""
        while True:
            try:
                return run()
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                if not tries:
                    before.restore()
                    raise
                said = first_line(error)
                traceback.clear_frames(error.__traceback__)
            # Outside of the except block: the error is gone, and with it all that its frames held.
            tries -= 1
            before.restore()
            self._take_less(said)
            again()

    def _not_repeated(self, run: Callable[[], Result], why: str) -> Result:
        """Return ``run()``, of which the other ranks do a part. Raises RunError where memory runs out."""
        try:
            return run()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            ranks = world()
            taken = self.plan.prediction.peaks.vram_bytes
            smaller = int(taken * _SMALLER)
            is_left = leave_vram(cache_path(), smaller)
            raise RunError(
                f"rank {0 if ranks is None else ranks.rank} ran out of device memory ({first_line(error)}) under a "
                f"plan for {format_bytes(taken)}, and the micro-batch cannot be repeated on one rank: {why}. "
                + ("The launcher's restart plans for" if is_left else "Start anew with")
                + f" vram of {format_bytes(smaller)} ({smaller}B) at most"
            ) from error

    def accumulate(self, run: Callable[[Batch], Result], batches: Iterable[Batch]) -> list[Result]:
        """Return ``run(batch)`` of each of ``batches``, a forward and backward of one micro-batch each, in order.

        Under a plan with a ``group`` so many micro-batches pass each block one after another before it leaves, and
        share its loads; gradients, losses and all else are bit-identical to those of one by one. ``run`` is called in
        threads, of which one at a time goes on: it must not step an optimizer, nor wait for another micro-batch, and
        the next one's must not hang on what it leaves, such as a running mean that the script keeps (nobody can see
        that). Where a micro-batch draws random numbers, changes buffers or attributes of modules, or several processes
        train together, they go one by one, which is logged once; so does the first one, of which that is learned.

        Raises what ``run`` raises for the first of those that fail; the others then end at their next layer.
        """
        runtime = self._runtime
        if runtime is None or runtime.accumulation is None:
            return [run(batch) for batch in batches]
        return runtime.accumulation.run(run, batches)

    def _take_less(self, said: str) -> None:
        """Go on under a plan that takes less vram. Raises RunError where there is none."""
        assert self._runtime is not None
        assert self._replan is not None
        taken = self.plan.prediction.peaks.vram_bytes
        try:
            plan = self._replan(self.plan, int(taken * _SMALLER))
        except DoesNotFitError as error:
            least = error.least_vram_bytes
            if least is None or least >= taken:
                raise RunError(
                    f"the device ran out of memory ({said}) under a plan for {format_bytes(taken)}, and no plan "
                    "takes less: end what else uses the device, or use a smaller micro-batch"
                ) from None
            plan = self._replan(self.plan, least)
        gc.collect()
        with self._counted_anew():
            self.change(plan)
        self.recoveries += 1
        _LOG.warning(
            "the device ran out of memory (%s) under a plan for %s; the micro-batch is repeated under one for %s",
            said,
            format_bytes(taken),
            format_bytes(plan.prediction.peaks.vram_bytes),
        )

    @contextlib.contextmanager
    def materialise(self) -> Iterator[nn.Module]:
        """Have every weight readable inside: in RAM, or mapped from disk. Only read them, call nothing.

        On exit what is streamed is away again.
        """
        runtime = self._runtime
        if runtime is None:
            yield self.model
            return
        if not self._readers:
            runtime.conductor.pause("inside materialise")
        self._readers += 1
        try:
            if self._readers == 1:
                runtime.direct.show_all()
            yield self.model
        finally:
            self._readers -= 1
            if not self._readers and self._runtime is not None:
                try:
                    runtime.direct.hide_all()
                finally:
                    runtime.conductor.resume()

    def detach(self) -> nn.Module:
        """Give the model back as it was and return it: the same parameters with their weights, no hooks.

        A forward before it can have no backward after it. Raises TransferError where a block cannot be read from disk,
        RunError in micro-batches that take turns.
        """
        self._refuse_in_turns("detach()")
        runtime = self._runtime
        if runtime is not None:
            with defer_sigint():
                self._last = self._measured()
                self._runtime = self._install = self._replan = self._before = None
                with self.undo:
                    runtime.undo.close()
                drop_hooks_that_stayed()
        return self.model

    def _refuse_in_turns(self, what: str) -> None:
        """Raise RunError where others are in their middle."""
        runtime = self._runtime
        if runtime is not None and runtime.accumulation is not None and runtime.accumulation.takes_turns:
            raise RunError(
                f"{what} was called in a micro-batch while others take turns with it: call it once accumulate() has "
                "returned"
            )

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.detach()


def _count_arena(ledger: StorageLedger, tiers: Tiers) -> None:
    """Have the device arena counted from now on, as far as it is there, and nothing of what lies in RAM for the
    plan.
    """
    arena = tiers.arena
    for held in tiers.on_host():
        ledger.ignore(held)
    if arena.is_elastic:  # of its storage not all is there
        ledger.ignore(arena.bytes)
        ledger.hold(arena.there_bytes)
        arena.watch = ledger.hold
    else:
        ledger.add(arena.bytes)


def handle_of(model: nn.Module) -> Handle | None:
    """Return the handle of a model that is attached, whole or in part, or None.

    ``model``: any module.
    """
    for module in model.modules():
        guard = guard_of(module)
        if guard is not None and isinstance(guard.handle, Handle):
            return guard.handle
    return None


@contextlib.contextmanager
def materialise(model: nn.Module) -> Iterator[nn.Module]:
    """A context in which all weights of ``model`` are readable: for looking at them, comparing, hashing.

    Takes no memory: weights are read where they lie, in RAM or mapped from disk. A model that is not attached is left
    alone. Raises RunError where the model is called inside.
    """
    handle = handle_of(model)
    if handle is None:
        yield model
        return
    with handle.materialise():
        yield model
