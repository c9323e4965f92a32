"""Reads give the file's bytes at any offset and length, and never anything else without an error."""

from __future__ import annotations

import os

import numpy as np
import pytest

from memplan.errors import CheckpointError, TransferError
from memplan.run.memory.disk import DiskReader, Extent


@pytest.fixture
def reader():
    made = DiskReader()
    yield made
    made.close()


@pytest.fixture
def file(tmp_path):
    data = np.random.default_rng(0).integers(0, 256, 9_500_001, dtype=np.uint8)
    path = tmp_path / "data.bin"
    path.write_bytes(data.tobytes())
    return path, data


@pytest.mark.parametrize(
    ("offset", "size"), [(0, 1), (1, 4095), (4096, 4096), (4095, 8_388_609), (9_500_000, 1), (0, 9_500_001), (77, 0)]
)
def test_bytes_at_any_offset(reader, file, offset, size):
    path, data = file
    extent = Extent(path=str(path), file_offset_bytes=offset, size_bytes=size)
    reader.open([extent])
    got = np.full(size, 0xFF, np.uint8)
    reader.read([(extent, got)], "a block")
    assert np.array_equal(got, data[offset : offset + size])


def test_an_extent_beyond_the_end(reader, file):
    path, data = file
    with pytest.raises(CheckpointError, match="truncated"):
        reader.open([Extent(path=str(path), file_offset_bytes=len(data), size_bytes=1)])


def test_a_missing_file(reader, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be opened"):
        reader.open([Extent(path=str(tmp_path / "none"), file_offset_bytes=0, size_bytes=1)])


def test_a_file_truncated_under_a_run(reader, file):
    path, data = file
    extent = Extent(path=str(path), file_offset_bytes=0, size_bytes=len(data))
    reader.open([extent])
    os.truncate(path, 4096)
    with pytest.raises(TransferError, match=r"layers\.3 .*has changed since training began"):
        reader.read([(extent, np.empty(len(data), np.uint8))], "the block layers.3")


def test_a_file_that_ends_early_says_where(reader, file, monkeypatch):
    path, data = file
    extent = Extent(path=str(path), file_offset_bytes=0, size_bytes=len(data))
    reader.open([extent])
    os.truncate(path, 10_000)
    monkeypatch.setattr("memplan.run.memory.disk._File.unchanged", lambda self: True)
    with pytest.raises(TransferError, match="ends at byte 10000"):
        reader.read([(extent, np.empty(len(data), np.uint8))], "the block layers.3")
