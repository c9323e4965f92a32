"""Bringing bytes to a slot: one small interface, two implementations.

``CpuTransfers``: the compute device is the CPU; a channel is a worker thread, a ticket a future.
``StreamTransfers``: a channel is a stream, a ticket an event (behind a future where a thread reads the disk first).

Start and wait are a pair: ``load`` starts a transfer and never blocks; ``wait`` makes the compute wait for it.
A load may overwrite its slot at once on the CPU, where compute is done when the host says so; elsewhere the copy
stream first waits for all the compute that was enqueued when the load was started. [Note: slot overwritten while read]
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Protocol

import torch

from memplan.cache import checksum
from memplan.errors import TransferError
from memplan.program.schema import RING_BYTES, Channel
from memplan.run.memory.arena import Arena, poison
from memplan.run.memory.disk import Bytes, DiskReader, Extent, copy_bytes
from memplan.run.transfer.device import current_stream, made_current, synchronize
from memplan.run.transfer.interrupts import defer_sigint
from memplan.run.transfer.worker import Job, Worker
from memplan.run.verify.spans import Spans

DEADLINE_S = 600
"""No wait for a block is longer: what hangs is heard."""


Piece = tuple[int, int, Callable[[Bytes], None]]
"""Where bytes go in a block's layout, how many they are, and what fills as many with them."""


class HostSource:
    """A block's bytes in the host arena."""

    def __init__(self, part: torch.Tensor) -> None:
        self.part = part

    def pieces(self, most_bytes: int) -> Iterator[Piece]:
        """Yield the block's layout piece by piece."""
        for start in range(0, self.part.numel(), most_bytes):
            held = self.part[start : start + most_bytes].numpy()
            yield start, held.nbytes, partial(copy_bytes, source=held)


class DiskSource:
    """A block's bytes in files: each extent and where it goes in the block's layout."""

    def __init__(
        self, extents: tuple[tuple[Extent, int], ...], reader: DiskReader, block: str, expected: str | None = None
    ) -> None:
        """``expected``: the checksum that its first read must have."""
        self.extents = extents
        self.reader = reader
        self.block = block
        self.expected = expected

    def read(self, destination: Bytes) -> None:
        """Fill the block's layout. Raises TransferError."""
        self.reader.read(
            ((extent, destination[offset : offset + extent.size_bytes]) for extent, offset in self.extents),
            f"the block {self.block}",
        )
        if self.expected is not None:
            found = checksum()
            found.update(destination.data)
            self.verify(found.hexdigest())

    def pieces(self, most_bytes: int) -> Iterator[Piece]:
        """Yield the block's layout piece by piece, without what lies between its tensors.

        Its first read is compared with its checksum once the last piece was read. Raises TransferError.
        """
        found = checksum() if self.expected is not None else None

        def read(destination: Bytes, part: Extent) -> None:
            self.reader.read([(part, destination)], f"the block {self.block}")
            if found is not None:
                found.update(destination.data)

        for extent, offset in self.extents:
            for start in range(0, extent.size_bytes, most_bytes):
                size = min(most_bytes, extent.size_bytes - start)
                part = Extent(path=extent.path, file_offset_bytes=extent.file_offset_bytes + start, size_bytes=size)
                yield offset + start, size, partial(read, part=part)
        if found is not None:
            self.verify(found.hexdigest())

    def verify(self, found: str) -> None:
        """Compare the checksum of a whole read with what it must be; later reads need not. Raises TransferError."""
        if found != self.expected:
            path = self.extents[0][0].path
            raise TransferError(
                f"the block {self.block} was read from {path}, whose bytes are not those that were written: the disk "
                "or the file is damaged. Stop, run `memplan cache clear`, and resume from the last checkpoint of the "
                "adapter"
            )
        self.expected = None


Source = HostSource | DiskSource


def is_staged(source: Source, destination: torch.Tensor) -> bool:
    """Whether the copy engine of a device cannot go between the two by itself: page-locked memory is asked for."""
    if isinstance(source, DiskSource):
        return True
    return any(not part.is_pinned() for part in (source.part, destination) if part.device.type == "cpu")


class Ticket(Protocol):
    """A load that was started."""


class Transfers(Protocol):
    """What the conductor asks of a device."""

    def load(self, channel: Channel, block: int, source: Source, destination: torch.Tensor) -> Ticket:
        """Start filling ``destination`` (uint8) with the block, behind all compute enqueued so far.

        Loads of a channel run in turn.
        """

    def wait(self, ticket: Ticket, block: int) -> float:
        """Make the compute wait for the load of that block; return the seconds that the host itself stood still.

        Raises what the load raised, in the thread that waits.
        """

    def device_stalls(self) -> dict[int, float]:
        """Return the seconds, by block, that the device stood still and that are known since the last call."""

    @property
    def ring_bytes(self) -> int:
        """Host bytes of its own that loads pass through."""

    def drain(self) -> None:
        """Return when nothing is on its way any more, started by whomever. What was failing fails unheard."""

    def close(self) -> None:
        """End the threads. Loads under way are finished first."""


def _await(load: Job) -> float:
    """Wait for a load; return the seconds that it took. Raises what the load raised, and TransferError past a
    deadline.
    """
    began = time.perf_counter()
    if not load.wait(DEADLINE_S):
        raise TransferError(
            f"a block has not come within {DEADLINE_S} s: the disk or the file server that it is read from hangs. "
            "Look at the system's log, and resume from the last checkpoint of the adapter"
        )
    load.result()
    return time.perf_counter() - began


def _nothing() -> None:
    pass


class CpuTransfers:
    """Worker threads and jobs. ``poisoned``: each slot is filled with NaN before it is loaded (checked mode)."""

    def __init__(self, *, poisoned: bool = False, spans: Spans | None = None) -> None:
        self._spans = spans
        self._channels: dict[str, Worker] = {}
        self._arrays: dict[int, Bytes] = {}  # each block's slot, made once: to make it runs an operator
        self._poisoned = poisoned

    def load(self, channel: Channel, block: int, source: Source, destination: torch.Tensor) -> Job:
        if self._poisoned:
            poison(destination)
        array = self._arrays.get(block)
        if array is None:
            array = self._arrays[block] = destination.numpy()
        worker = self._channels.get(channel)
        if worker is None:
            with defer_sigint():
                worker = self._channels[channel] = Worker(f"memplan-{channel}")
        if self._spans is None:
            return worker.submit(self._fill, source, array)
        return worker.submit(self._fill_noted, self._spans, channel, block, source, array)

    def _fill_noted(self, spans: Spans, channel: Channel, block: int, source: Source, destination: Bytes) -> None:
        with spans.of(channel, block):
            self._fill(source, destination)

    @staticmethod
    def _fill(source: Source, destination: Bytes) -> None:
        if isinstance(source, HostSource):
            copy_bytes(destination, source.part.numpy())
        else:
            source.read(destination)

    def wait(self, ticket: Ticket, block: int) -> float:
        assert isinstance(ticket, Job)
        if ticket.done():
            ticket.result()
            return 0.0
        return _await(ticket)

    def device_stalls(self) -> dict[int, float]:
        return {}

    @property
    def ring_bytes(self) -> int:
        return 0

    def drain(self) -> None:
        for worker in self._channels.values():
            _await(worker.submit(_nothing))

    def close(self) -> None:
        for worker in self._channels.values():
            worker.close()
        self._channels.clear()
        self._arrays.clear()


class _StreamTicket:
    """Done when ``event`` is; ``filled`` is there where a thread enqueues the copies."""

    def __init__(self, event: torch.Event, filled: Job | None) -> None:
        self.event = event
        self.filled = filled


class StreamTransfers:
    """Streams and events. Unproven: no GPU has run it yet.

    The host never synchronises with the device here, except in staging threads. What lies on the disk or in pageable
    memory goes through a page-locked ring, one for each of the two, whose thread waits until its own piece of it is
    free again. What goes back to pageable memory is waited for by another thread: one that waits for the compute must
    not hold up loads.
    """

    _TIMED = 256

    def __init__(
        self,
        device: torch.device,
        *,
        poisoned: bool = False,
        spans: Spans | None = None,
        is_ring_locked: bool = True,
    ) -> None:
        """``is_ring_locked``: whether rings may be page-locked; else what is in pageable memory is left to the
        driver.
        """
        self._device = device
        self._spans = spans
        self._stream = torch.Stream(device)
        self._back_stream = torch.Stream(device)
        self._staged: dict[Channel, torch.Stream] = {}
        self._workers: dict[str, Worker] = {}
        self._rings: dict[Channel, list[tuple[torch.Tensor, torch.Event]]] = {}
        self._is_ring_locked = is_ring_locked
        self._poisoned = poisoned
        self._timed: deque[tuple[int, torch.Event, torch.Event]] = deque(maxlen=self._TIMED)
        # The arena was allocated on the compute stream: what was enqueued there comes before any copy into it.
        self._stream.wait_stream(current_stream(device))
        self._back_stream.wait_stream(current_stream(device))

    def load(self, channel: Channel, block: int, source: Source, destination: torch.Tensor) -> _StreamTicket:
        if self._poisoned and destination.device.type != "cpu":  # in no stream: a copy that waits may still read it
            poison(destination)
        free = torch.Event(self._device)
        free.record(current_stream(self._device))
        done = torch.Event(self._device)
        if channel not in self._staged and is_staged(source, destination):
            # For good, as its loads run in turn: those of page-locked memory too are enqueued by the thread then.
            self._staged[channel] = self._back_stream
            if channel != "d2h":
                self._staged[channel] = torch.Stream(self._device)
                self._staged[channel].wait_stream(self._stream)
        if channel not in self._staged:
            assert isinstance(source, HostSource)
            stream = self._back_stream if channel == "d2h" else self._stream
            self._copy(channel, block, stream, source, destination, free, done)
            return _StreamTicket(done, None)
        what = channel, block, self._staged[channel]
        fill = self._stage if self._is_staged(channel, source, destination) else self._copy
        filled = self._worker(f"staging-{channel}").submit(fill, *what, source, destination, free, done)
        return _StreamTicket(done, filled)

    def _is_staged(self, channel: Channel, source: Source, destination: torch.Tensor) -> bool:
        """Whether a load goes through its channel's ring. One copy into pageable memory, or out of it where there is no
        better ring, is the driver's: it returns when it is done.
        """
        if isinstance(source, DiskSource):
            return True
        return channel != "d2h" and self._is_ring_locked and is_staged(source, destination)

    def _worker(self, name: str) -> Worker:
        worker = self._workers.get(name)
        if worker is None:
            with defer_sigint():
                worker = self._workers[name] = Worker(f"memplan-{name}")
        return worker

    def _noted(self, channel: Channel, block: int, stream: torch.Stream) -> AbstractContextManager[None]:
        return nullcontext() if self._spans is None else self._spans.of(channel, block, stream)

    def _copy(
        self,
        channel: Channel,
        block: int,
        stream: torch.Stream,
        source: Source,
        destination: torch.Tensor,
        free: torch.Event,
        done: torch.Event,
    ) -> None:
        """Enqueue a copy. Into pageable memory, or out of it, this returns when it is done."""
        assert isinstance(source, HostSource)
        stream.wait_event(free)
        if channel == "h2d" and is_staged(source, destination):  # the processor reads it: see _stage
            free.synchronize()
        noted = self._noted(channel, block, stream)
        with noted, stream, torch.inference_mode(False), torch.no_grad():
            destination.copy_(source.part, non_blocking=True)
        done.record(stream)

    def _stage(
        self,
        channel: Channel,
        block: int,
        stream: torch.Stream,
        source: Source,
        destination: torch.Tensor,
        free: torch.Event,
        done: torch.Event,
    ) -> None:
        ring = self._rings.get(channel)
        if ring is None:  # where even this is refused, a copy from it returns when the driver has taken it
            with made_current(self._device):  # this thread's own is the first one
                held = Arena(RING_BYTES, torch.device("cpu"), pinned=self._is_ring_locked)
            half = RING_BYTES // 2
            halves = (held.part(turn * half, half) for turn in range(2))
            ring = self._rings[channel] = [(buffer, torch.Event(self._device)) for buffer in halves]
        stream.wait_event(free)
        if isinstance(source, HostSource):  # the processor reads it: what was sent there must have come
            free.synchronize()
        with self._noted(channel, block, stream):
            for turn, (offset, size, fill) in enumerate(source.pieces(ring[0][0].numel())):
                buffer, empty = ring[turn % 2]
                empty.synchronize()
                fill(buffer.numpy()[:size])
                with stream, torch.inference_mode(False), torch.no_grad():
                    destination[offset : offset + size].copy_(buffer[:size], non_blocking=True)
                empty.record(stream)
        done.record(stream)

    def wait(self, ticket: Ticket, block: int) -> float:
        assert isinstance(ticket, _StreamTicket)
        stalled = 0.0
        if ticket.filled is not None:
            stalled = _await(ticket.filled)
        if not ticket.event.query():
            stream = current_stream(self._device)
            before, after = torch.Event(self._device, enable_timing=True), torch.Event(self._device, enable_timing=True)
            before.record(stream)
            stream.wait_event(ticket.event)
            after.record(stream)
            self._timed.append((block, before, after))
        return stalled

    def device_stalls(self) -> dict[int, float]:
        stalls: dict[int, float] = {}
        while self._timed and self._timed[0][2].query():
            block, before, after = self._timed.popleft()
            stalls[block] = stalls.get(block, 0.0) + before.elapsed_time(after) / 1e3
        return stalls

    @property
    def ring_bytes(self) -> int:
        return sum(buffer.numel() for ring in list(self._rings.values()) for buffer, _ in ring)

    def drain(self) -> None:
        for worker in self._workers.values():
            _await(worker.submit(_nothing))
        synchronize(self._device)

    def close(self) -> None:
        for worker in self._workers.values():
            worker.close()
        synchronize(self._device)  # the compute too: it reads rows in page-locked memory
        self._workers.clear()
        self._rings.clear()
