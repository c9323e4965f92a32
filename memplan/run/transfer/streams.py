"""Transfers on a device with streams: a channel is a stream, a ticket an event.

Proven in order and lifetimes on a simulated device (``tests/device``); no GPU has run it yet.

What lies on the disk or in pageable memory goes through a pinned ring, one for each of the two, which a thread fills
and empties. The ring is filled before the slot is free: only the device waits for that. A thread that makes the device
wait for an event must have it recorded first, so who waits for such a load waits for that thread; it is behind only
where the disk is, or where a block is larger than the ring and its slot was not free.
"""

from __future__ import annotations

from collections import deque
from contextlib import AbstractContextManager, nullcontext

import torch

from memplan.program.schema import RING_BYTES, Channel
from memplan.run.memory.arena import Arena, poison
from memplan.run.transfer.device import current_stream, made_current, synchronize
from memplan.run.transfer.interrupts import defer_sigint
from memplan.run.transfer.transfer import DiskSource, HostSource, Source, Ticket, await_job, is_staged, nothing
from memplan.run.transfer.worker import Job, Worker
from memplan.run.verify.spans import Spans
from memplan.units import MIB


class _Load:
    """A block's load, and its ticket: what does not change from one to the next is made once.

    A block's load begins only when the one before was waited for, so its events may be recorded again.
    """

    def __init__(self, device: torch.device, source: Source, destination: torch.Tensor, piece_bytes: int) -> None:
        self.source = source
        self.destination = destination
        self.is_staged = is_staged(source, destination)  # asks the driver
        self.free = torch.Event(device)
        """The compute that was enqueued before it."""
        self.done = torch.Event(device)
        self.filled: Job | None = None
        """Where a thread enqueues the copies."""
        self.copies: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
        """To and from, piece by piece, so that what the training itself sends gets through between them."""
        if isinstance(source, HostSource):
            with torch.inference_mode(False), torch.no_grad():
                to, of = destination.split(piece_bytes), source.part.split(piece_bytes)
                self.copies = tuple(zip(to, of, strict=True))

    def is_of(self, source: Source, destination: torch.Tensor) -> bool:
        if self.destination is not destination:
            return False
        mine = self.source
        return mine is source or (
            isinstance(mine, HostSource) and isinstance(source, HostSource) and mine.part is source.part
        )


class StreamTransfers:
    """Streams and events. The host never synchronises with the device here, except in staging threads, whose piece of
    the ring must be free again. What goes back to pageable memory is waited for by another thread: one that waits for
    the compute must not hold up loads.
    """

    PIECE_BYTES = 32 * MIB
    """Of one copy. Smaller ones let others through sooner, and cost the host about 5 us each."""

    def __init__(
        self,
        device: torch.device,
        *,
        poisoned: bool = False,
        spans: Spans | None = None,
        is_ring_locked: bool = True,
        most_waits: int = 256,
    ) -> None:
        """``is_ring_locked``: whether rings may be pinned; else what is in pageable memory is left to the driver.
        ``most_waits``: of which the time is kept until it is asked for, the last ones: those of a pass at least.
        """
        self._device = device
        self._spans = spans
        self._stream = torch.Stream(device)
        self._back_stream = torch.Stream(device)
        self._staged: dict[Channel, torch.Stream] = {}
        self._workers: dict[str, Worker] = {}
        self._rings: dict[Channel, list[tuple[torch.Tensor, torch.Event]]] = {}
        self._loads: dict[int, _Load] = {}
        self._is_ring_locked = is_ring_locked
        self._poisoned = poisoned
        self._most_waits = most_waits
        self._timed: deque[tuple[int, torch.Event, torch.Event]] = deque()
        self._timers: list[tuple[torch.Event, torch.Event]] = []
        # The arena was allocated on the compute stream: what was enqueued there comes before any copy into it.
        self._stream.wait_stream(current_stream(device))
        self._back_stream.wait_stream(current_stream(device))

    def load(self, channel: Channel, block: int, source: Source, destination: torch.Tensor) -> _Load:
        if self._poisoned and destination.device.type != "cpu":  # the host's memory a copy that waits may still read
            poison(destination)
        load = self._loads.get(block)
        if load is None or not load.is_of(source, destination):
            load = self._loads[block] = _Load(self._device, source, destination, self.PIECE_BYTES)
        load.free.record(current_stream(self._device))
        if load.is_staged and channel not in self._staged:
            # For good, as its loads run in turn: those of pinned memory too are enqueued by the thread then.
            self._staged[channel] = self._back_stream
            if channel != "d2h":
                self._staged[channel] = torch.Stream(self._device)
                self._staged[channel].wait_stream(self._stream)
        if channel not in self._staged:
            self._copy(channel, block, self._back_stream if channel == "d2h" else self._stream, load)
            return load
        fill = self._stage if self._goes_through_ring(channel, load) else self._copy
        load.filled = self._worker(f"staging-{channel}").submit(fill, channel, block, self._staged[channel], load)
        return load

    def _goes_through_ring(self, channel: Channel, load: _Load) -> bool:
        """Whether a load goes through its channel's ring. One copy into pageable memory, or out of it where there is no
        better ring, is the driver's: it returns when it is done.
        """
        if isinstance(load.source, DiskSource):
            return True
        return channel != "d2h" and self._is_ring_locked and load.is_staged

    def _worker(self, name: str) -> Worker:
        worker = self._workers.get(name)
        if worker is None:
            with defer_sigint():
                worker = self._workers[name] = Worker(f"memplan-{name}")
        return worker

    def _noted(self, channel: Channel, block: int, stream: torch.Stream) -> AbstractContextManager[None]:
        return nullcontext() if self._spans is None else self._spans.of(channel, block, stream)

    def _copy(self, channel: Channel, block: int, stream: torch.Stream, load: _Load) -> None:
        """Enqueue a copy. Into pageable memory, or out of it, this returns when it is done."""
        stream.wait_event(load.free)
        with self._noted(channel, block, stream), stream:
            for to, of in load.copies:
                to.copy_(of, non_blocking=True)
        load.done.record(stream)

    def _stage(self, channel: Channel, block: int, stream: torch.Stream, load: _Load) -> None:
        # Pageable memory that the device writes to has been written when that copy returns: no event is behind it.
        ring = self._rings.get(channel)
        if ring is None:  # where even this is refused, a copy from it returns when the driver has taken it
            with made_current(self._device):  # this thread's own is the first one
                held = Arena(RING_BYTES, torch.device("cpu"), pinned=self._is_ring_locked)
            half = RING_BYTES // 2
            halves = (held.part(turn * half, half) for turn in range(2))
            ring = self._rings[channel] = [(buffer, torch.Event(self._device)) for buffer in halves]
        stream.wait_event(load.free)
        with self._noted(channel, block, stream):
            for turn, (offset, size, fill) in enumerate(load.source.pieces(ring[0][0].numel())):
                buffer, empty = ring[turn % 2]
                empty.synchronize()
                fill(buffer.numpy()[:size])
                with stream:
                    load.destination[offset : offset + size].copy_(buffer[:size], non_blocking=True)
                empty.record(stream)
        load.done.record(stream)

    def wait(self, ticket: Ticket, block: int) -> float:
        assert isinstance(ticket, _Load)
        stalled = 0.0
        if ticket.filled is not None:
            stalled = await_job(ticket.filled)
        if not ticket.done.query():
            stream = current_stream(self._device)
            before, after = self._timer()
            before.record(stream)
            stream.wait_event(ticket.done)
            after.record(stream)
            self._timed.append((block, before, after))
        return stalled

    def _timer(self) -> tuple[torch.Event, torch.Event]:
        if len(self._timed) >= self._most_waits:
            _, before, after = self._timed.popleft()
            return before, after
        if self._timers:
            return self._timers.pop()
        return torch.Event(self._device, enable_timing=True), torch.Event(self._device, enable_timing=True)

    def device_stalls(self) -> dict[int, float]:
        stalls: dict[int, float] = {}
        while self._timed and self._timed[0][2].query():
            block, before, after = self._timed.popleft()
            stalls[block] = stalls.get(block, 0.0) + before.elapsed_time(after) / 1e3
            self._timers.append((before, after))
        return stalls

    @property
    def ring_bytes(self) -> int:
        return sum(buffer.numel() for ring in list(self._rings.values()) for buffer, _ in ring)

    def drain(self) -> None:
        for worker in self._workers.values():
            await_job(worker.submit(nothing))
        synchronize(self._device)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        synchronize(self._device)  # the compute too: it reads rows in pinned memory
        self._workers.clear()
        self._rings.clear()
        self._loads.clear()
