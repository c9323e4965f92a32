"""Transfers by streams: which way each source goes, and that all of it comes in time."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from memplan.program.schema import RING_BYTES
from memplan.run.memory.arena import Arena
from memplan.run.memory.page_lock import page_locked
from memplan.run.transfer.streams import StreamTransfers
from memplan.run.transfer.transfer import HostSource
from tests.run.test_staging import GAP, SIZE, data, source_of  # noqa: F401

SIM = torch.device("sim", 0)


@pytest.mark.parametrize("is_ring_locked", [True, False])
def test_each_source_goes_its_own_way(is_ring_locked, data, source_of, policy, monkeypatch):  # noqa: F811
    """On one channel pinned sources and pageable ones in turn."""
    arena, staged = Arena(4 * (SIZE + GAP), SIM), []
    transfers = StreamTransfers(SIM, poisoned=True, is_ring_locked=is_ring_locked)
    stage = transfers._stage
    monkeypatch.setattr(transfers, "_stage", lambda *args: (staged.append(args[1]), stage(*args)))
    fast = page_locked(SIZE).copy_(torch.from_numpy(data[::-1].copy()))
    slow = torch.from_numpy(data.copy())
    sources = [HostSource(fast), HostSource(slow), HostSource(fast), source_of(None)]
    there = [arena.part(block * (SIZE + GAP), SIZE + GAP * (block == 3)) for block in range(4)]
    tickets = [
        transfers.load("h2d" if block < 3 else "disk", block, sources[block], there[block]) for block in range(4)
    ]
    for block, ticket in enumerate(tickets):
        transfers.wait(ticket, block)
    came = [part.cpu() for part in there]
    for block, source in enumerate(sources[:3]):
        assert torch.equal(came[block], source.part)
    assert np.array_equal(came[3][4001 + GAP :].numpy(), data[4001:])
    assert sorted(staged) == ([1, 3] if is_ring_locked else [3])
    assert transfers.ring_bytes == RING_BYTES * len(staged)
    assert all(ring[0][0].is_pinned() == is_ring_locked for ring in transfers._rings.values())
    transfers.close()
