"""torch's caching allocator of a CUDA device as a value: what it reserves for allocations. No torch here.

Rules and sizes are those of ``c10/cuda/CUDACachingAllocator.cpp`` (torch 2.0 to 2.13, with its default settings: no
``expandable_segments``, no ``max_split_size_mb``). Of several streams and of the driver's own granularity nothing is
known here.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable, Iterable

from memplan.units import MIB

ROUND_BYTES = 512
"""``kMinBlockSize``: every size is rounded up to it."""
SMALL_BYTES = MIB
"""``kSmallSize``: up to it, what is asked for comes from the small pool."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""``kSmallBuffer``: segments of the small pool."""
LARGE_FROM_BYTES = 10 * MIB
"""``kMinLargeAlloc``: from it on, a segment is made for one allocation."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""``kLargeBuffer``: segments for what is between the two."""
ROUND_LARGE_BYTES = 2 * MIB
"""``kRoundLarge``: a segment of its own is rounded up to it."""


def segment_bytes(size_bytes: int) -> int:
    """Return the size of the segment that is made for an allocation which no free block holds."""
    size_bytes = _rounded(size_bytes, ROUND_BYTES)
    if size_bytes <= SMALL_BYTES:
        return SMALL_SEGMENT_BYTES
    return LARGE_SEGMENT_BYTES if size_bytes < LARGE_FROM_BYTES else _rounded(size_bytes, ROUND_LARGE_BYTES)


class _Block:
    """Bytes of a segment: in use, or free; neighbours by address."""

    __slots__ = ("after", "before", "number", "size_bytes", "small")

    def __init__(self, number: int, size_bytes: int, small: bool) -> None:
        self.number, self.size_bytes, self.small = number, size_bytes, small
        self.before: _Block | None = None
        self.after: _Block | None = None


class CachingAllocator:
    """Allocations by a key of the caller's; ``reserved_bytes`` are those of all segments, which are never given back
    unless :meth:`empty_cache` says so.
    """

    def __init__(self) -> None:
        self.reserved_bytes = self.allocated_bytes = 0
        self.most_reserved_bytes = self.most_allocated_bytes = 0
        self._used: dict[Hashable, _Block] = {}
        self._free: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        """By pool: sizes and numbers of free blocks, sorted, so that the first that is large enough fits best."""
        self._blocks: dict[int, _Block] = {}
        self._made = 0

    def allocate(self, key: Hashable, size_bytes: int) -> None:
        """Allocate for ``key``, which holds nothing; of no bytes there is no block."""
        if size_bytes <= 0:
            return
        wanted = _rounded(size_bytes, ROUND_BYTES)
        small = wanted <= SMALL_BYTES
        free = self._free[small]
        place = bisect_left(free, (wanted, -1))
        if place < len(free):
            block = self._blocks.pop(free.pop(place)[1])
        else:
            block = self._new(segment_bytes(size_bytes), small)
            self.reserved_bytes += block.size_bytes
            self.most_reserved_bytes = max(self.most_reserved_bytes, self.reserved_bytes)
        rest = block.size_bytes - wanted
        if rest >= ROUND_BYTES if small else rest > SMALL_BYTES:
            self._put(self._split(block, wanted))
        self._used[key] = block
        self.allocated_bytes += block.size_bytes
        self.most_allocated_bytes = max(self.most_allocated_bytes, self.allocated_bytes)

    def free(self, key: Hashable) -> None:
        """Give back what ``key`` holds, if anything."""
        block = self._used.pop(key, None)
        if block is None:
            return
        self.allocated_bytes -= block.size_bytes
        for other in (block.before, block.after):
            if other is not None and other.number in self._blocks:
                self._take(other)
                block.size_bytes += other.size_bytes
                if other is block.before:
                    block.before = other.before
                    if block.before is not None:
                        block.before.after = block
                else:
                    block.after = other.after
                    if block.after is not None:
                        block.after.before = block
        self._put(block)

    def empty_cache(self) -> None:
        """Give the segments back of which nothing is in use."""
        for block in list(self._blocks.values()):
            if block.before is None and block.after is None:
                self._take(block)
                self.reserved_bytes -= block.size_bytes

    def _new(self, size_bytes: int, small: bool) -> _Block:
        self._made += 1
        return _Block(self._made, size_bytes, small)

    def _split(self, block: _Block, wanted: int) -> _Block:
        rest = self._new(block.size_bytes - wanted, block.small)
        block.size_bytes = wanted
        rest.before, rest.after = block, block.after
        if block.after is not None:
            block.after.before = rest
        block.after = rest
        return rest

    def _put(self, block: _Block) -> None:
        self._blocks[block.number] = block
        insort(self._free[block.small], (block.size_bytes, block.number))

    def _take(self, block: _Block) -> None:
        del self._blocks[block.number]
        free = self._free[block.small]
        free.pop(bisect_left(free, (block.size_bytes, block.number)))


def _rounded(size_bytes: int, step: int) -> int:
    return -(-size_bytes // step) * step


PASSES = 2
"""Passes that are replayed: the second finds what the first left free."""


def fragmentation_bytes(events: Iterable[tuple[int, int]]) -> int:
    """Return what is reserved beyond what is allocated where most of either is, once passes of ``events`` repeat.

    ``events``: births and deaths in their order, each a number and the bytes, less than none for a death. What a pass
    leaves alive (gradients) goes before the next. Sizes count as they are, so what is rounded up is in it too.
    """
    passes = tuple(events)
    device = CachingAllocator()
    most_alive = 0
    for _ in range(PASSES):
        alive: dict[int, int] = {}
        now = 0
        for number, size_bytes in passes:
            if size_bytes > 0:
                device.allocate(number, size_bytes)
                alive[number] = size_bytes
            else:
                device.free(number)
                alive.pop(number, None)
            now += size_bytes
            most_alive = max(most_alive, now)
        for number in alive:
            device.free(number)
    return max(0, device.most_reserved_bytes - most_alive)
