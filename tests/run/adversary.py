"""Transfers that do their worst within what they promise: each load at the first or at the last moment that is
legal.
"""

from __future__ import annotations

from memplan.run.memory.arena import poison
from memplan.run.transfer.transfer import CpuTransfers


class EarlyTransfers(CpuTransfers):
    """A load is over before the call that starts it returns: what is still needed in its slot is lost."""

    def load(self, channel, block, source, destination):
        ticket = super().load(channel, block, source, destination)
        ticket.result()
        return ticket


class LateTransfers(CpuTransfers):
    """A load begins when the compute waits for it: until then its slot is poison, and what is not waited for stays
    so.
    """

    def load(self, channel, block, source, destination):
        poison(destination)
        return (channel, block, source, destination)

    def wait(self, ticket, block):
        return super().wait(super().load(*ticket), block)


class LastTransfers(LateTransfers):
    """As late, but a channel's loads still run in turn: a wait brings all that were started before on its channel."""

    def __init__(self, **options):
        super().__init__(**options)
        self.queues = {}

    def load(self, channel, block, source, destination):
        ticket = super().load(channel, block, source, destination)
        self.queues.setdefault(channel, []).append(ticket)
        return ticket

    def drain(self):
        self.queues.clear()
        super().drain()

    def wait(self, ticket, block):
        stalled = 0.0
        queue = self.queues[ticket[0]]
        while any(started is ticket for started in queue):
            stalled += super().wait(queue.pop(0), block)
        return stalled


ALL = (EarlyTransfers, LateTransfers, LastTransfers)
