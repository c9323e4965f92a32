"""Files that the ranks of a node read together: what one has read, the others take from a ring that they share.

Under DDP ranks load the same blocks in the same order, at almost the same time. The ring has the last pieces that were
read, known by file, place and size. Who wants one that is there takes it; who wants another makes an entry, reads the
file straight into it, and whoever comes meanwhile waits for that one read.

[Note: no rank needs another one] A plain collective load deadlocks where ranks do unlike things (uneven micro-batches,
an evaluation on one of them). Here a frozen weight's bytes are the same whenever they were read, so that what is found
is right in any order, and each wait has an end: for a read that another rank has begun, until that is done, or its
process has ended; for room, until the ranks that are behind have taken the oldest entry as often as the others have, or
take nothing for a while. Such a rank is not waited for again before it takes something; nor is one that has gone past
the entry. Who gives up reads the file by itself.

[Note: a rank that dies with the lock] Locks of a file's bytes (``lockf``) go with the process that has them, and a fork
of it has none. What is changed under the lock is seen by the number of the first or the last entry, written at the end:
what was begun and not finished never was.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from memplan.ranks.session import Session, is_gone
from memplan.ranks.shared_memory import shared
from memplan.units import align_up

Key = tuple[int, int, int, int, int]
"""What identifies bytes: the file's device, inode and time of change (ns), where they are in it and how many."""

_Waited = dict[int, tuple[int, int]]
"""For which ranks a thread waits: how many entries they had taken by then, and when that was (ns)."""

_ENTRIES = 256
_READING, _THERE, _FAILED = 0, 1, 2
_PATIENCE_NS = 2_000_000_000
"""How long a rank that takes nothing is waited for; a quarter of it after each time in vain, twice that after so many
entries that it takes.
"""
_HITS = 16
_MOST_IMPATIENCE = 20 * _HITS
_ORDER = 4
"""A rank's threads take entries out of order by so many at most."""
_DEADLINE_S = 60.0
_LOCK_DEADLINE_S = 5.0
_POLL_S, _LAST_POLL_S = 0.0003, 0.005
"""Who waits long looks less often: the thread that trains needs the interpreter too."""


class _LostError(Exception):
    """The lock cannot be had: its process is stopped."""


class SharedReads:
    """The ring, as one rank sees it."""

    def __init__(self, descriptor: int, size_bytes: int, *, place: int, ranks: int) -> None:
        """``descriptor``: a file of ``size_bytes`` zeros, as :func:`shared_reads` makes it. ``place``: which of its
        node's ``ranks`` this is.
        """
        self._place, self._ranks = place, ranks
        self._descriptor = os.dup(descriptor)
        self._end = weakref.finalize(self, os.close, self._descriptor)
        self._thread_lock = threading.Lock()
        self._is_lost = False
        held = np.frombuffer(mmap.mmap(self._descriptor, size_bytes, flags=mmap.MAP_SHARED), np.uint8)
        words = held[: _control_bytes(ranks)].view(np.int64)
        self._bytes = held[_control_bytes(ranks) :]
        parts = iter(np.split(words, np.cumsum(_sizes(ranks))))
        self._bounds = next(parts)
        """The number of the first entry, and of the one that comes after the last; how many uses there were."""
        self._keys = next(parts).reshape(_ENTRIES, 5)
        self._begins, self._spans, self._states, self._owners, self._orders = (next(parts) for _ in range(5))
        self._takes = next(parts).reshape(_ENTRIES, ranks)
        """How often each rank has taken an entry."""
        self._copying = next(parts).reshape(_ENTRIES, ranks)
        """How many threads of each rank are at it."""
        self._pids, self._absent, self._taken, self._newest, self._impatience = (next(parts) for _ in range(5))
        """By rank: its process, 0 once it has left; whether it is not waited for; how many entries it has taken, and
        the newest use of them; how much patience with it is shortened.
        """
        self._pids[place] = os.getpid()

    def read(
        self, key: Key, span_bytes: int, fetch: Callable[[memoryview], None], use: Callable[[memoryview], None]
    ) -> bool:
        """Have ``use`` called with ``span_bytes`` that ``fetch`` has written, here or on another rank.

        Returns False where the caller is to read by itself. Raises what ``fetch`` raises.
        """
        if self._is_lost or span_bytes > len(self._bytes) // 2:
            return False
        try:
            found = self._entry(key, align_up(span_bytes, mmap.PAGESIZE))
        except _LostError:
            self._is_lost = True
            return False
        if found is None:
            return False
        entry, is_own = found
        begin = int(self._begins[entry]) % len(self._bytes)
        room = self._bytes[begin : begin + span_bytes].data
        try:
            if is_own:
                self._fill(entry, room, fetch)
            elif not self._has_come(entry):
                return False
            use(room)
        finally:
            with self._thread_lock:
                self._copying[entry, self._place] -= 1
        return True

    def leave(self) -> None:
        """Have the others not wait for this rank any more. Its threads must have ended."""
        self._pids[self._place] = 0
        self._is_lost = True
        self._end()

    def _fill(self, entry: int, room: memoryview, fetch: Callable[[memoryview], None]) -> None:
        state = _FAILED
        try:
            fetch(room)
            state = _THERE
        finally:
            try:
                with self._locked():
                    self._states[entry] = state
            except _LostError:
                self._states[entry], self._is_lost = _FAILED, True

    def _has_come(self, entry: int) -> bool:
        """Wait until an entry that another thread reads is there; return False where it does not come."""
        until, polls = time.monotonic() + _DEADLINE_S, 0
        while self._states[entry] == _READING:
            polls += 1
            if polls % 100 == 0 and (self._is_gone(int(self._owners[entry])) or time.monotonic() > until):
                return False
            time.sleep(_POLL_S)
        try:
            with self._locked():  # what was written before its state is seen after it
                return bool(self._states[entry] == _THERE)
        except _LostError:
            self._is_lost = True
            return False

    def _entry(self, key: Key, span_bytes: int) -> tuple[int, bool] | None:
        """Return an entry that others do not overwrite before this thread is done with it, and whether this thread is
        to read it; None where there is no room.
        """
        until = time.monotonic() + _DEADLINE_S
        waited: _Waited = {}
        pause = _POLL_S
        while time.monotonic() < until:
            with self._locked():
                entry = self._found(key)
                if entry is not None:
                    self._absent[self._place] = 0
                    self._impatience[self._place] = max(0, int(self._impatience[self._place]) - 1)
                    self._take(entry)
                    return entry, False
                if not self._is_in_front():
                    return None  # nobody would take it
                begin = self._room(span_bytes, waited)
                if begin is not None:
                    return self._made(key, begin, span_bytes), True
            time.sleep(pause)
            pause = min(1.5 * pause, _LAST_POLL_S)
        return None

    def _is_in_front(self) -> bool:
        """Whether this rank is not behind another one, as far as that is known."""
        return bool(self._absent[self._place] or self._newest[self._place] + _ORDER >= self._newest.max())

    def _found(self, key: Key) -> int | None:
        for entry in np.flatnonzero((self._keys == key).all(1)):
            number = self._number(int(entry))
            if number is not None and self._states[entry] != _FAILED:
                return int(entry)
        return None

    def _number(self, entry: int) -> int | None:
        """Return the number of what is in an entry's place, or None where nothing is."""
        first, last = map(int, self._bounds[:2])
        number = first + (entry - first) % _ENTRIES
        return number if number < last else None

    def _take(self, entry: int) -> None:
        """Note that this rank takes an entry: the first to do so for another time makes a use of it."""
        others = self._takes[entry].max()
        self._takes[entry, self._place] += 1
        takes = self._takes[entry, self._place]
        self._copying[entry, self._place] += 1
        self._taken[self._place] += 1
        if takes == self._takes[entry].max():
            if takes > others:
                self._orders[entry] = self._bounds[2]
                self._bounds[2] += 1
            self._newest[self._place] = max(self._newest[self._place], self._orders[entry])

    def _made(self, key: Key, begin: int, span_bytes: int) -> int:
        """Make an entry, after the last."""
        entry = int(self._bounds[1]) % _ENTRIES
        self._keys[entry] = key
        self._begins[entry], self._spans[entry] = begin, span_bytes
        self._states[entry], self._owners[entry] = _READING, self._place
        self._takes[entry] = 0
        self._copying[entry] = 0
        self._bounds[1] += 1
        self._take(entry)
        return entry

    def _room(self, span_bytes: int, waited: _Waited) -> int | None:
        """Return where so many bytes may be written, counted on from round to round; None as long as others need what
        is there.
        """
        size = len(self._bytes)
        while True:
            first, last = map(int, self._bounds[:2])
            if first == last:
                return 0
            newest, oldest = (last - 1) % _ENTRIES, first % _ENTRIES
            begin = int(self._begins[newest] + self._spans[newest])
            if begin % size + span_bytes > size:
                begin = align_up(begin, size)
            if begin + span_bytes - int(self._begins[oldest]) <= size and last - first < _ENTRIES:
                return begin
            if not self._is_done_with(oldest, waited):
                return None
            self._bounds[0] += 1

    def _is_done_with(self, entry: int, waited: _Waited) -> bool:
        """Whether an entry may go: nobody copies from it, and nobody who is waited for will come for it."""
        if any(self._copying[entry, rank] and not self._is_gone(rank) for rank in range(self._ranks)):
            return False
        most = self._takes[entry].max()
        behind = [
            rank
            for rank in range(self._ranks)
            if self._takes[entry, rank] < most
            and not self._absent[rank]
            and self._newest[rank] <= self._orders[entry] + _ORDER
            and not self._is_gone(rank)
        ]
        now, late = time.monotonic_ns(), 0
        for rank in behind:
            count, since = waited.get(rank, (-1, now))
            if count != self._taken[rank]:
                waited[rank] = int(self._taken[rank]), now
            elif now - since > _PATIENCE_NS >> int(self._impatience[rank]) // _HITS:
                self._absent[rank] = 1
                self._impatience[rank] = min(int(self._impatience[rank]) + 2 * _HITS, _MOST_IMPATIENCE)
                late += 1
        return late == len(behind)

    def _is_gone(self, rank: int) -> bool:
        pid = int(self._pids[rank])
        return pid == 0 or (rank != self._place and is_gone(pid))

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Keep the other ranks' threads, and this one's, from changing entries. Raises _LostError."""
        with self._thread_lock:
            until = time.monotonic() + _LOCK_DEADLINE_S
            while True:
                try:
                    fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > until:
                        raise _LostError from None
                    time.sleep(_POLL_S / 10)
            try:
                yield
            finally:
                fcntl.lockf(self._descriptor, fcntl.LOCK_UN)


def shared_reads(ranks: Session, rank_bytes: int) -> SharedReads | None:
    """Return the ring of this node's ranks, ``rank_bytes`` (of whole pages) for each; None where they cannot share
    memory. Every rank calls this. Raises RankError.
    """
    count = len(ranks.node)
    made = partial(SharedReads, place=ranks.place, ranks=count)
    return shared(ranks, _control_bytes(count) + count * rank_bytes, made)


def _sizes(ranks: int) -> tuple[int, ...]:
    """Return how many numbers each part of what is written of the entries has."""
    return 3, 5 * _ENTRIES, *[_ENTRIES] * 5, *[ranks * _ENTRIES] * 2, *[ranks] * 5


def _control_bytes(ranks: int) -> int:
    return align_up(8 * sum(_sizes(ranks)), mmap.PAGESIZE)
