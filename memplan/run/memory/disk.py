"""Reading blocks from files: the checkpoint's own safetensors by offset, or block files packed once.

Reads bypass the page cache where the file system lets them (O_DIRECT), in pieces, by several threads at once, through
a bounce buffer each: the staging that the plan counts in ``ram``.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import re
import threading
import weakref
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from msgspec import Struct
from numpy.typing import NDArray

from memplan.errors import CheckpointError, TransferError
from memplan.program.schema import STAGING_BYTES
from memplan.ranks.shared_reads import SharedReads
from memplan.run.transfer.worker import Job
from memplan.units import align_up

_READERS = 4
_PAGE_BYTES = 4096
_BOUNCE_BYTES = STAGING_BYTES // _READERS

Bytes = NDArray[np.uint8]


class Extent(Struct, frozen=True, kw_only=True):
    """Where one tensor's bytes lie in a file."""

    path: str
    file_offset_bytes: int
    size_bytes: int


class _File:
    """An open file and what it was when it was opened."""

    def __init__(self, path: str) -> None:
        self.path = path
        try:
            self.buffered = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"weights were to be read from {path}, which cannot be opened: {error.strerror}"
            ) from None
        self.direct: int | None = None
        try:
            self.direct = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_DIRECT", 0))
        except OSError as error:
            if error.errno != errno.EINVAL:
                os.close(self.buffered)
                raise
        stat = os.fstat(self.buffered)
        self.size_bytes, self._changed_ns = stat.st_size, stat.st_mtime_ns
        self.identity = stat.st_dev, stat.st_ino, stat.st_mtime_ns

    def unchanged(self) -> bool:
        stat = os.fstat(self.buffered)
        return (stat.st_size, stat.st_mtime_ns) == (self.size_bytes, self._changed_ns)

    def close(self) -> None:
        os.close(self.buffered)
        if self.direct is not None:
            os.close(self.direct)


@dataclass(frozen=True, slots=True)
class _Span:
    """Whole pages of a file around bytes that are asked for. ``skipped_bytes`` come before these; ``needed_bytes``:
    up to their end.
    """

    begin: int
    size_bytes: int
    skipped_bytes: int
    needed_bytes: int

    @staticmethod
    def around(file: _File, offset: int, size_bytes: int) -> _Span:
        begin = offset // _PAGE_BYTES * _PAGE_BYTES
        end = min(align_up(offset + size_bytes, _PAGE_BYTES), align_up(file.size_bytes, _PAGE_BYTES))
        return _Span(begin, end - begin, offset - begin, offset - begin + size_bytes)


class Reading:
    """A read that was begun."""

    def __init__(self, pieces: Sequence[Job], what: str) -> None:
        self._pieces = pieces
        self._what = what

    def wait(self) -> None:
        """Return when all of it is there. Raises TransferError where a file cannot be read."""
        failure: OSError | EOFError | None = None
        for piece in self._pieces:
            try:
                piece.result()
            except (OSError, EOFError) as error:
                failure = failure or error
        if failure is not None:
            raise TransferError(f"{self._what} could not be read: {failure}; check the disk and the file") from failure


class DiskReader:
    """Reads extents into memory. One for a run; ``close`` ends its threads and files.

    [Note: a checkpoint that changed under a plan] Every read checks that the file is as it was at attach; nothing is
    mapped, so that a truncated file is an error and not a SIGBUS.
    """

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="memplan-disk")
        self._files: dict[str, _File] = {}
        self._local = threading.local()
        self._bounce_bytes = _BOUNCE_BYTES
        self._shared: SharedReads | None = None
        self._counting = threading.Lock()
        self.read_bytes = 0
        """What this process itself has read from files."""
        weakref.finalize(self, _close, self._files)

    def share(self, ring: SharedReads, rank_bytes: int) -> None:
        """Have reads that are ``shared`` from now on go through the ring of several ranks, whose ``rank_bytes`` are
        taken off this reader's own buffers: nothing may have been read yet.
        """
        self._shared = ring
        self._bounce_bytes = (STAGING_BYTES - rank_bytes) // _READERS

    def open(self, extents: Iterable[Extent]) -> None:
        """Open the files and check that each extent lies within its file. Raises CheckpointError."""
        for extent in extents:
            if extent.path not in self._files:
                self._files[extent.path] = _File(extent.path)
            size_bytes = self._files[extent.path].size_bytes
            if extent.file_offset_bytes + extent.size_bytes > size_bytes:
                raise CheckpointError(
                    f"{extent.path} has {size_bytes} bytes, but weights were to be read up to byte "
                    f"{extent.file_offset_bytes + extent.size_bytes}: the file is truncated; fetch it again"
                )

    def read(self, extents: Iterable[tuple[Extent, Bytes]], what: str, *, shared: bool = False) -> None:
        """Fill each destination (uint8, of the extent's size) from its extent; ``what`` names the block in errors.
        ``shared``: the other ranks of a node are about to read the same.

        Raises TransferError where a file has changed or cannot be read.
        """
        self.begin(extents, what, shared=shared).wait()

    def begin(self, extents: Iterable[tuple[Extent, Bytes]], what: str, *, shared: bool = False) -> Reading:
        """Start what ``read`` does, behind what was begun before. Raises TransferError where a file has changed."""
        pieces = []
        checked: dict[str, _File] = {}
        most_bytes = self._bounce_bytes - 2 * _PAGE_BYTES
        read = self._piece if self._shared is None or not shared else self._shared_piece
        for extent, destination in extents:
            file = checked.get(extent.path) or checked.setdefault(extent.path, self._unchanged(extent, what))
            for start in range(0, extent.size_bytes, most_bytes):
                stop = min(start + most_bytes, extent.size_bytes)
                pieces.append(Job(read, file, extent.file_offset_bytes + start, destination[start:stop]))
                self._pool.submit(pieces[-1].run)
        return Reading(pieces, what)

    def mapped(self, extent: Extent, what: str) -> Bytes:
        """Return an extent mapped into memory, privately: nothing is read before it is looked at.

        For what may never be looked at (the entries of a ``state_dict``). Raises TransferError as ``read`` does.
        """
        file = self._unchanged(extent, what)
        begin = extent.file_offset_bytes // mmap.ALLOCATIONGRANULARITY * mmap.ALLOCATIONGRANULARITY
        skipped = extent.file_offset_bytes - begin
        if extent.size_bytes == 0:
            return np.empty(0, np.uint8)
        pages = mmap.mmap(file.buffered, skipped + extent.size_bytes, access=mmap.ACCESS_COPY, offset=begin)
        return np.frombuffer(pages, np.uint8, extent.size_bytes, skipped)

    def _unchanged(self, extent: Extent, what: str) -> _File:
        file = self._files[extent.path]
        if not file.unchanged():
            raise TransferError(
                f"{what} was to be read from {extent.path}, which has changed since training began: "
                "stop, restore the file, and resume from the last checkpoint of the adapter"
            )
        return file

    def _piece(self, file: _File, offset: int, destination: Bytes) -> None:
        span = _Span.around(file, offset, len(destination))
        buffer = memoryview(self._bounce())
        self._fetch(file, span, buffer)
        copy_bytes(destination, np.frombuffer(buffer, np.uint8, len(destination), span.skipped_bytes))

    def _shared_piece(self, file: _File, offset: int, destination: Bytes) -> None:
        assert self._shared is not None
        span = _Span.around(file, offset, len(destination))

        def use(buffer: memoryview) -> None:
            copy_bytes(destination, np.frombuffer(buffer, np.uint8, len(destination), span.skipped_bytes))

        key = (*file.identity, offset, len(destination))
        if not self._shared.read(key, span.size_bytes, partial(self._fetch, file, span), use):
            self._piece(file, offset, destination)

    def _fetch(self, file: _File, span: _Span, buffer: memoryview) -> None:
        """Read a span into the beginning of a buffer that starts at a page."""
        got = self._first(file, buffer[: span.size_bytes], span.begin)
        while got < span.needed_bytes:  # the file's end, or a file system that reads short
            count = os.preadv(file.buffered, [buffer[got : span.needed_bytes]], span.begin + got)
            if count == 0:
                raise EOFError(f"{file.path} ends at byte {span.begin + got}")
            got += count
        with self._counting:
            self.read_bytes += span.needed_bytes

    @staticmethod
    def _first(file: _File, buffer: memoryview, begin: int) -> int:
        if file.direct is not None:
            try:
                return os.preadv(file.direct, [buffer], begin)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
        return os.preadv(file.buffered, [buffer], begin)

    def _bounce(self) -> mmap.mmap:
        buffer: mmap.mmap | None = getattr(self._local, "buffer", None)
        if buffer is None:
            buffer = self._local.buffer = mmap.mmap(-1, self._bounce_bytes)
        return buffer

    def close(self) -> None:
        """End the threads and close the files."""
        self._pool.shutdown(wait=True)  # a piece that is cancelled would be waited for in vain
        if self._shared is not None:
            self._shared.leave()
            self._shared = None
        _close(self._files)


def _close(files: dict[str, _File]) -> None:
    while files:
        files.popitem()[1].close()


_SMAPS = Path("/proc/self/smaps")
_HEAD = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ")


def written_pages(mapped: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return those of tensors in private mappings of files that lie near a page that was written to; all where nobody
    says.
    """
    try:
        lines = _SMAPS.read_text(errors="surrogateescape").splitlines()
    except OSError:
        return list(mapped)
    spans: list[tuple[int, int]] = []
    begin = end = 0
    for line in lines:
        head = _HEAD.match(line)
        if head:
            begin, end = int(head[1], 16), int(head[2], 16)
        elif line.startswith(("Anonymous:", "Swap:")) and int(line.split()[1]):
            spans.append((begin, end))
    found = []
    for tensor in mapped:
        first = tensor.data_ptr()
        last = first + tensor.untyped_storage().nbytes()
        if any(first < end and begin < last for begin, end in spans):
            found.append(tensor)
    return found


def copy_bytes(destination: Bytes, source: Bytes) -> None:
    """Copy on this thread alone, without the interpreter lock (torch's copy would start a second team of threads)."""
    assert destination.nbytes == source.nbytes
    ctypes.memmove(destination.ctypes.data, source.ctypes.data, source.nbytes)
