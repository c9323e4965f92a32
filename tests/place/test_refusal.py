"""What is said where nothing fits: which tier is short, and changes that make it fit, the cheapest first, each of them
true.
"""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from memplan.cost.chunked import chunked_loss
from memplan.errors import DoesNotFitError
from memplan.place.min_vram import least_vram_bytes
from memplan.place.solve import place
from memplan.program.schema import STAGING_BYTES
from memplan.units import ALIGNMENT_BYTES
from tests.place.test_solve import tables
from tests.support.tables import MIB, NAMES, budgets, make_table

X = 10 * MIB


def refused(table, given_budgets, **options):
    with pytest.raises(DoesNotFitError) as caught:
        place(table, given_budgets, **{**NAMES, **options})
    return caught.value


def rest_of(table):
    return max(table.device_bytes_at(access.index, {}) for access in table.accesses)


def test_ram_that_lacks_is_asked_for_before_vram():
    """Twelve blocks, room for four of them on the device: eight and what streams through it must be in RAM, of which
    there is half.
    """
    table = make_table([X] * 12, recomputable=False)
    asked = budgets(rest_of(table) + 4 * X, ram=5 * X, disk=0)
    error = refused(table, asked)
    ram, vram = error.least_ram_bytes, error.least_vram_bytes
    assert ram == 9 * X  # three stay beside one slot
    assert vram == rest_of(table) + 8 * X  # seven stay beside one slot
    assert "of vram needs at least 90.0 MiB of ram; the budget is 50.0 MiB" in error.asked
    assert [tip.split(" (")[0] for tip in error.suggestions[:3]] == [
        "give a disk budget of at least 60.0 MiB",  # three lie in RAM, beside 16 MiB of staging
        "give at least 90.0 MiB of ram",
        f"give at least {vram / MIB:.1f} MiB of vram",
    ]
    place(table, replace(asked, disk_bytes=60 * MIB), **NAMES)
    refused(table, replace(asked, disk_bytes=60 * MIB - 1))
    assert f"vram ({vram} bytes)" in str(error)
    place(table, replace(asked, ram_bytes=ram), **NAMES)
    refused(table, replace(asked, ram_bytes=ram - 1))


def test_vram_that_lacks_is_said_in_bytes():
    table = make_table([X] * 12, recomputable=False)
    asked = budgets(rest_of(table) // 2)
    error = refused(table, asked)
    assert error.least_ram_bytes is error.least_disk_bytes is None
    assert error.suggestions[0] == f"give at least {format_of(error)} of vram ({error.least_vram_bytes} bytes)"
    assert "needs at least" in error.asked


def format_of(error):
    return re.search(r"at least (\S+ \S+) of vram \(", str(error))[1]


def test_both_lack():
    """More vram alone does, and so does less of it with more RAM, which is cheaper."""
    table = make_table([X] * 40, recomputable=False)
    asked = budgets(rest_of(table) // 2, ram=X, disk=0)
    error = refused(table, asked)
    assert error.least_ram_bytes is None
    found = re.fullmatch(r"give at least .* of vram and .* of ram \((\d+) and (\d+) bytes\)", error.suggestions[0])
    vram, ram = int(found[1]), int(found[2])
    assert vram < error.least_vram_bytes
    place(table, replace(asked, vram_bytes=vram, ram_bytes=ram), **NAMES)
    refused(table, replace(asked, vram_bytes=vram, ram_bytes=ram - 1))
    assert f"vram ({error.least_vram_bytes} bytes)" in error.suggestions[1]
    assert len(re.findall(r"vram \((\d+) bytes\)", str(error))) == 1


def test_a_loss_in_chunks_where_the_loss_is_the_peak():
    table = make_table([X] * 12, recomputable=False)
    at = next(row.index for row in table.accesses if row.kind == "loss")
    rows = tuple(replace(row, transient_bytes=400 * MIB) if row.index == at else row for row in table.accesses)
    table = replace(table, accesses=rows)
    tokens = 4096
    workload = replace(NAMES["workload"], tokens=tokens)
    chunked = chunked_loss(table, tokens)
    needed = least_vram_bytes(chunked, budgets(0))
    error = refused(table, budgets(needed), workload=workload)
    assert error.suggestions[0].startswith(
        "compute the loss in chunks of 1024 tokens (loss='chunked', in fewer), which needs at least"
    )
    assert place(chunked, budgets(needed), **NAMES)
    less = refused(table, budgets(needed - MIB), workload=workload)
    assert "in chunks of 1024 tokens (loss='chunked', in fewer), and give at least about" in less.suggestions[0]
    assert not any("chunks" in tip for tip in refused(table, budgets(needed)).suggestions)  # of 512 tokens: one chunk


def test_adapters_that_take_most_are_named():
    table = make_table([X] * 12, recomputable=False)
    large = tuple(replace(row, size_bytes=300 * MIB) if row.kind == "adapters" else row for row in table.fixed)
    error = refused(replace(table, fixed=large), budgets(1))
    assert "fewer of its targets" not in error.suggestions[0]  # they alone would not make it fit in one byte
    assert any("fewer of its targets" in tip for tip in error.suggestions)
    error = refused(replace(table, fixed=large), budgets(200 * MIB))
    assert "fewer of its targets" in error.suggestions[0]
    assert sum("fewer of its targets" in tip for tip in error.suggestions) == 1


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    table=tables(),
    vram=st.integers(0, 60 * MIB),
    ram=st.sampled_from([0, MIB, STAGING_BYTES - 1, 40 * MIB]),
    disk=st.sampled_from([None, 0, MIB]),
)
def test_what_is_told_makes_it_fit(table, vram, ram, disk):
    asked = budgets(vram, ram, disk)
    try:
        place(table, asked, **NAMES)
    except DoesNotFitError as error:
        told = error
    else:
        return
    if told.least_ram_bytes is not None:
        assert told.least_ram_bytes > ram
        place(table, replace(asked, ram_bytes=told.least_ram_bytes), **NAMES)
        refused(table, replace(asked, ram_bytes=max(ram, told.least_ram_bytes - ALIGNMENT_BYTES - 1)))
    if told.least_disk_bytes is not None:
        place(table, replace(asked, disk_bytes=told.least_disk_bytes), **NAMES)
    if told.least_vram_bytes is not None:
        assert f"vram ({told.least_vram_bytes} bytes)" in str(told)
