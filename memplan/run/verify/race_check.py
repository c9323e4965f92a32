"""Transfers under watch: every write to a slot and every read of it must be ordered by what was waited for.

Each actor (the compute, and each channel) has a vector clock: what it knows to be over of every actor's doings. A load
starts knowing what the compute had enqueued; a wait tells the compute what the load knew. A write that does not know of
an earlier read or write of the same bytes, or a read that does not know of the last write, may go either way on a
device that is slower or faster: it raises here, whichever way it went.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from memplan.errors import StrayReadError, TransferError
from memplan.program.schema import Channel
from memplan.run.transfer.transfer import HostSource, Source, Ticket, Transfers

COMPUTE = "compute"


@dataclass(frozen=True, slots=True)
class _Touch:
    """One read or write of a slot, at its actor's own time."""

    what: str
    actor: str
    at: int


@dataclass(slots=True)
class _Written:
    """What is known of a byte range since its last write."""

    block: int
    begin: int
    end: int
    write: _Touch
    reads: list[_Touch] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _ClockedTicket:
    inner: Ticket
    knows: dict[str, int]


class ClockedTransfers:
    """A :class:`memplan.run.transfer.transfer.Transfers` around another one, which raises where an order is left to
    chance.

    Raises TransferError naming both where a load may overtake what came before it, StrayReadError naming both where a
    read may come before its load.
    """

    def __init__(self, inner: Transfers, names: dict[int, str]) -> None:
        self._inner = inner
        self._names = names
        self._clocks: dict[str, dict[str, int]] = {COMPUTE: {}}
        self._ranges: list[_Written] = []

    def load(self, channel: Channel, block: int, source: Source, destination: torch.Tensor) -> _ClockedTicket:
        compute, mover = self._clocks[COMPUTE], self._clocks.setdefault(channel, {})
        _learn(mover, compute)
        what = f"the load of {self._names[block]}"
        if isinstance(source, HostSource):
            self._read(source.part, what, channel)
        self._write(block, destination, what, channel)
        return _ClockedTicket(self._inner.load(channel, block, source, destination), dict(mover))

    def write(self, block: int, part: torch.Tensor, what: str) -> None:
        """Note that the compute writes to a slot from now on. Raises TransferError."""
        self._write(block, part, what, COMPUTE)

    def _write(self, block: int, part: torch.Tensor, what: str, actor: str) -> None:
        knows, write = self._clocks[actor], self._touch(what, actor)
        begin, end = part.data_ptr(), part.data_ptr() + part.numel()
        kept = []
        for known in self._ranges:
            if known.end <= begin or end <= known.begin:
                kept.append(known)
                continue
            for touch in (known.write, *known.reads):
                if knows.get(touch.actor, 0) < touch.at:
                    raise TransferError(f"{write.what} may overtake {touch.what}: nothing orders the two")
        self._ranges = [*kept, _Written(block, begin, end, write)]

    def _read(self, part: torch.Tensor, what: str, actor: str) -> None:
        """Note that a channel reads what was written here, if it was. Raises StrayReadError."""
        knows, touch = self._clocks[actor], self._touch(what, actor)
        for known in self._ranges:
            if known.begin < part.data_ptr() + part.numel() and part.data_ptr() < known.end:
                if knows.get(known.write.actor, 0) < known.write.at:
                    raise StrayReadError(f"{what} may come before {known.write.what}: nothing waited for it")
                known.reads.append(touch)

    def wait(self, ticket: Ticket, block: int) -> float:
        assert isinstance(ticket, _ClockedTicket)
        stalled = self._inner.wait(ticket.inner, block)
        _learn(self._clocks[COMPUTE], ticket.knows)
        return stalled

    def read(self, block: int, how: str) -> None:
        """Note that the compute reads a streamed block now. Raises StrayReadError."""
        name = self._names[block]
        touch = self._touch(f"{name}, {how}", COMPUTE)
        for known in self._ranges:
            if known.block == block:
                if self._clocks[COMPUTE].get(known.write.actor, 0) < known.write.at:
                    raise StrayReadError(f"{touch.what}, may come before {known.write.what}: nothing waited for it")
                # The compute's doings follow one another: the last one stands for all.
                known.reads = [*(r for r in known.reads if r.actor != COMPUTE), touch]
                return
        raise StrayReadError(f"{touch.what}, but no load brought it, or another block's overwrote it")

    def device_stalls(self) -> dict[int, float]:
        return self._inner.device_stalls()

    @property
    def ring_bytes(self) -> int:
        return self._inner.ring_bytes

    def drain(self) -> None:
        self._inner.drain()
        for clock in self._clocks.values():
            _learn(self._clocks[COMPUTE], clock)

    def close(self) -> None:
        self._inner.close()

    def _touch(self, what: str, actor: str) -> _Touch:
        clock = self._clocks[actor]
        clock[actor] = clock.get(actor, 0) + 1
        return _Touch(what, actor, clock[actor])


def _learn(clock: dict[str, int], of: dict[str, int]) -> None:
    for actor, at in of.items():
        clock[actor] = max(clock.get(actor, 0), at)
