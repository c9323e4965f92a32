"""What cannot go to a CUDA device by itself goes through a ring: which does, in which pieces, and what it takes of RAM.

The device's own part is in tests/device/test_transfers.py and test_gpu.py.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from msgspec.structs import replace

import memplan
from memplan.cache import checksum
from memplan.errors import TransferError
from memplan.program import page_lock
from memplan.program.check import page_locks as check_page_locks
from memplan.program.page_lock import is_ring_locked, page_locked_bytes, pageable_items, ring_bytes
from memplan.program.schema import RING_BYTES, STAGING_BYTES
from memplan.run.memory.arena import Arena
from memplan.run.memory.disk import DiskReader, Extent
from memplan.run.tiers import host_arenas, locked_blocks
from memplan.run.transfer import streams
from memplan.run.transfer.transfer import DiskSource, HostSource, is_staged
from tests.support.training import CPU, batch_of, make

SIZE = 10_000
GAP = 512
"""What lies between a block's two tensors in its layout."""


@pytest.fixture
def data():
    return np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8)


@pytest.fixture
def source_of(data, tmp_path):
    """A block's source in a file, in two extents."""
    path, reader = tmp_path / "block", DiskReader()
    path.write_bytes(data.tobytes())
    extents = tuple(
        (Extent(path=str(path), file_offset_bytes=begin, size_bytes=end - begin), begin + gap)
        for begin, end, gap in ((0, 4001, 0), (4001, SIZE, GAP))
    )
    reader.open(extent for extent, _ in extents)
    yield lambda expected: DiskSource(extents, reader, "layers.0", expected)
    reader.close()


def gathered(source, most_bytes, size):
    """Return what the pieces give, each through a buffer as the ring does it."""
    layout, buffer = np.zeros(size, np.uint8), np.empty(most_bytes, np.uint8)
    for offset, size_bytes, fill in source.pieces(most_bytes):
        fill(buffer[:size_bytes])
        layout[offset : offset + size_bytes] = buffer[:size_bytes]
    return layout


@pytest.mark.parametrize("most_bytes", [999, 4001, SIZE, 2 * SIZE])
def test_pieces_make_up_the_block(most_bytes, data, source_of):
    found = checksum()
    found.update(data.data)
    on_host, on_disk = HostSource(torch.from_numpy(data)), source_of(found.hexdigest())
    assert np.array_equal(gathered(on_host, most_bytes, SIZE), data)
    with_gap = np.concatenate([data[:4001], np.zeros(GAP, np.uint8), data[4001:]])
    assert np.array_equal(gathered(on_disk, most_bytes, SIZE + GAP), with_gap)
    assert on_disk.expected is None  # later reads need not be compared


def test_pieces_that_are_not_what_was_written(source_of):
    with pytest.raises(TransferError, match=r"layers\.0 .* whose bytes are not those that were written"):
        gathered(source_of("another"), 999, SIZE + GAP)


def test_page_locked_where_there_is_a_device_that_can_do_it(source_of, caplog):
    """Else it is said once, and what lies there goes through the ring."""
    arena = Arena(SIZE, torch.device("cpu"), pinned=True)
    assert arena.part(0, SIZE).fill_(7).sum() == 7 * SIZE
    assert arena.bytes.is_pinned() == torch.cuda.is_available()
    assert is_staged(HostSource(arena.bytes), arena.bytes) != arena.bytes.is_pinned()
    assert is_staged(source_of(None), arena.bytes)
    said = [record.message for record in caplog.records]
    assert len(said) == (not torch.cuda.is_available())
    assert all("cannot pin" in one and "(torch sees no GPU)" in one for one in said)


def with_small_rings(monkeypatch):
    """Have rings of 4 KiB: those of the tests' models would be larger than all that is on the host."""
    for module in (page_lock, check_page_locks, streams):
        monkeypatch.setattr(module, "RING_BYTES", 4096)


@pytest.mark.quick("None")
@pytest.mark.parametrize("limit", [None, 0, 400_000, 900_000])
def test_what_the_plan_has_pageable_is_not_asked_to_be_page_locked(limit, monkeypatch):
    """The choice alone: what page-locking itself does only a GPU shows."""
    with_small_rings(monkeypatch)
    machine = replace(CPU, device="cuda")
    given = {"vram": "1GiB", "ram": "1GiB", "disk": 0, "hardware": machine, "page_lock": limit, "gains": False}
    pins = dict.fromkeys(("layers.0", "layers.1", "layers.2"), "host")
    plan = memplan.plan(make("llama"), batch_of("llama"), pins=pins, activations="offload", **given)
    asked = []

    def lock(size_bytes):
        asked.append(size_bytes)
        return torch.empty(size_bytes, dtype=torch.uint8)

    monkeypatch.setattr("memplan.run.memory.arena.page_locked", lock)
    held = host_arenas(plan, torch.device("cuda"))
    assert {number: arena.size_bytes for number, arena in held.items()} == {a.id: a.size_bytes for a in plan.arenas[1:]}
    assert asked == [arena.size_bytes for arena in plan.arenas[1:] if not arena.pageable]
    assert sum(asked) + (ring_bytes(plan) if is_ring_locked(plan) else 0) == page_locked_bytes(plan)
    assert limit is None or page_locked_bytes(plan) <= limit
    assert [arena.pageable for arena in plan.arenas[1:]] == {None: [False], 0: [True]}.get(limit, [False, True])
    asked.clear()
    host_arenas(plan, torch.device("cpu"))
    assert not asked
    slow = pageable_items(plan)
    on_host = [item for item in plan.items if item.kind == "weights" and item.home == "host"]
    assert locked_blocks(plan, torch.device("cuda")) == {item.block for item in on_host if item.id not in slow}
    assert len(on_host) >= 3
    assert locked_blocks(plan, torch.device("cpu")) == set()


@pytest.mark.quick("cpu-0")
@pytest.mark.parametrize(("device", "ring_bytes"), [("cpu", 0), ("cuda", RING_BYTES)])
def test_the_ring_is_counted(device, ring_bytes):
    machine = replace(CPU, device=device)
    given = {"vram": "1GiB", "ram": "1GiB", "disk": "1GiB", "hardware": machine}
    plan = memplan.plan(make("llama"), batch_of("llama"), pins={"layers.1": "disk"}, **given)
    assert plan.staging_bytes == STAGING_BYTES + ring_bytes
    assert plan.prediction.peaks.ram_bytes >= plan.staging_bytes
