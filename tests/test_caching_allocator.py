"""The caching allocator as a value: sizes that torch's documentation and source state, and what a replay comes to."""

from __future__ import annotations

from memplan.model.caching_allocator import CachingAllocator, fragmentation_bytes, segment_bytes
from memplan.units import KIB, MIB


def test_segments_are_those_of_torch() -> None:
    assert segment_bytes(1) == segment_bytes(MIB) == 2 * MIB
    assert segment_bytes(MIB + 1) == segment_bytes(10 * MIB - 512) == 20 * MIB
    assert segment_bytes(10 * MIB) == 10 * MIB
    assert segment_bytes(11 * MIB) == 12 * MIB


def test_a_free_block_is_split_and_joined_again() -> None:
    device = CachingAllocator()
    device.allocate("a", 40 * MIB)
    device.free("a")
    device.allocate("b", 12 * MIB)
    device.allocate("c", 28 * MIB)
    assert (device.reserved_bytes, device.allocated_bytes) == (40 * MIB, 40 * MIB)
    device.free("b")
    device.allocate("d", 13 * MIB)  # does not fit where b was
    assert device.reserved_bytes == 54 * MIB
    device.free("c")
    device.allocate("e", 40 * MIB)  # b and c are one again
    assert device.reserved_bytes == 54 * MIB


def test_what_is_small_comes_from_a_pool_of_its_own() -> None:
    device = CachingAllocator()
    for key in range(4):
        device.allocate(key, 512 * KIB)
    assert device.reserved_bytes == 2 * MIB
    device.allocate("large", 2 * MIB)
    assert device.reserved_bytes == 22 * MIB
    for key in range(4):
        device.free(key)
    device.empty_cache()
    assert device.reserved_bytes == 20 * MIB


def test_the_rest_of_a_large_block_below_a_mebibyte_stays_with_it() -> None:
    device = CachingAllocator()
    device.allocate("a", 12 * MIB)
    device.free("a")
    device.allocate("b", 11 * MIB)
    assert device.allocated_bytes == 12 * MIB


def test_longer_steps_find_no_room_in_what_shorter_ones_left() -> None:
    """Why a batch of growing lengths reserves so much more than its longest: nothing of before is large enough."""
    device = CachingAllocator()
    for length in range(10, 20, 2):
        device.allocate("logits", length * MIB)
        device.free("logits")
    assert device.reserved_bytes == sum(range(10, 20, 2)) * MIB


def test_fragmentation_is_what_is_reserved_beyond_what_is_alive() -> None:
    whole = [(1, 20 * MIB), (2, 20 * MIB), (1, -20 * MIB), (3, 30 * MIB), (2, -20 * MIB), (3, -30 * MIB)]
    assert fragmentation_bytes(whole) == 20 * MIB  # 1's segment is of no use to 3
    assert fragmentation_bytes([(1, 20 * MIB), (1, -20 * MIB)]) == 0
    left = [(1, 20 * MIB)]  # a gradient, which goes before the next pass
    assert fragmentation_bytes(left) == 0
