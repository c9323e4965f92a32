"""Bringing bytes to a slot: one small interface, two implementations.

``CpuTransfers``: the compute device is the CPU; a channel is a worker thread, a ticket a future. For a device with
streams see :mod:`memplan.run.transfer.streams`.

Start and wait are a pair: ``load`` starts a transfer and never blocks; ``wait`` makes the compute wait for it.
A load may overwrite its slot at once on the CPU, where compute is done when the host says so; elsewhere the copy
stream first waits for all the compute that was enqueued when the load was started. [Note: slot overwritten while read]
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import torch

from memplan.cache import checksum
from memplan.errors import TransferError
from memplan.program.schema import Channel
from memplan.run.memory.arena import poison
from memplan.run.memory.disk import Bytes, DiskReader, Extent, copy_bytes
from memplan.run.transfer.interrupts import defer_sigint
from memplan.run.transfer.worker import Job, Worker
from memplan.run.verify.spans import Spans

DEADLINE_S = 600
"""No wait for a block is longer: what hangs is heard."""


Piece = tuple[int, int, Callable[[Bytes], None]]
"""Where bytes go in a block's layout, how many they are, and what fills as many with them."""


class HostSource:
    """A block's bytes in the host arena. ``handed_out``: the same, as who may write to them gets them; None: ``part``
    itself is written to.
    """

    def __init__(self, part: torch.Tensor, handed_out: torch.Tensor | None = None) -> None:
        self.part = part
        self.handed_out = handed_out

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

    def read(self, destination: Bytes, *, shared: bool = False) -> None:
        """Fill the block's layout; ``shared`` as for the reader. Raises TransferError."""
        self.reader.read(
            ((extent, destination[offset : offset + extent.size_bytes]) for extent, offset in self.extents),
            f"the block {self.block}",
            shared=shared,
        )
        if self.expected is not None:
            found = checksum()
            found.update(destination.data)
            self.verify(found.hexdigest())

    def pieces(self, most_bytes: int) -> Iterator[Piece]:
        """Yield the block's layout piece by piece, without what lies between its tensors; ranks read them together.

        Its first read is compared with its checksum once the last piece was read. Raises TransferError.
        """
        found = checksum() if self.expected is not None else None

        def read(destination: Bytes, part: Extent) -> None:
            self.reader.read([(part, destination)], f"the block {self.block}", shared=True)
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


def await_job(load: Job) -> float:
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


def nothing() -> None:
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
            source.read(destination, shared=True)

    def wait(self, ticket: Ticket, block: int) -> float:
        assert isinstance(ticket, Job)
        if ticket.done():
            ticket.result()
            return 0.0
        return await_job(ticket)

    def device_stalls(self) -> dict[int, float]:
        return {}

    @property
    def ring_bytes(self) -> int:
        return 0

    def drain(self) -> None:
        for worker in self._channels.values():
            await_job(worker.submit(nothing))

    def close(self) -> None:
        for worker in self._channels.values():
            worker.close()
        self._channels.clear()
        self._arrays.clear()
