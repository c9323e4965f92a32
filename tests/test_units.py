"""Sizes are parsed strictly and rounded the safe way."""

from __future__ import annotations

import pytest

from memplan.errors import InputError, MemplanError, SizeError
from memplan.units import GIB, align_up, format_bytes, format_seconds, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 * GIB),
        ("12GB", 12 * 10**9),
        ("1.5 MiB", 1572864),
        ("0B", 0),
        (" 7 kb ", 7000),
        (123, 123),
        (9.9, 9),
        ("24G", 24 * GIB),
        ("24g", 24 * GIB),
        ("1.5T", 3 << 39),
        ("512m", 1 << 29),
        ("24Gi", 24 * GIB),
        ("24gb", 24 * 10**9),
        ("24 GB", 24 * 10**9),
    ],
)
def test_sizes_are_bytes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "bad", ["12 apples", "GiB", "", "-1GiB", "1e3MiB", "12", "nan", float("nan"), float("inf"), -1, True, None, []]
)
def test_what_is_no_size_is_refused(bad):
    with pytest.raises(SizeError, match="is not a size") as caught:
        parse_size(bad, "vram")
    assert str(caught.value).startswith("vram was given as")
    assert isinstance(caught.value, (InputError, MemplanError, ValueError))


@pytest.mark.parametrize(("bad", "meant"), [("24", "24GiB"), (" 7.5 ", "7.5GiB"), ("25769803776", "25769803776B")])
def test_a_unit_that_is_missing_is_proposed(bad, meant):
    """Bytes and GiB are both meant by a number alone; an int from Python is bytes."""
    with pytest.raises(SizeError, match=f"its unit is missing, did you mean {meant}\\?"):
        parse_size(bad)


def test_rounding_is_up():
    assert [align_up(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


def test_there_are_never_zero_bytes_where_there_are_some():
    assert format_bytes(1) == "1 B"
    assert format_bytes(1536) == "1.5 KiB"
    assert format_bytes(3 * GIB) == "3.00 GiB"
    assert format_bytes(1002 << 20) == "0.98 GiB"
    assert format_bytes(1482 * GIB) == "1.45 TiB"
    assert format_seconds(11400) == "3 h 10 min"
    assert format_seconds(4e-5) == "40 µs"
    assert format_seconds(4.2e-7) == "420 ns"
    assert format_seconds(0) == format_seconds(3e-18) == "0 s"
