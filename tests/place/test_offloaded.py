"""Activations that are kept, made again or offloaded, chosen together with what stays on the device."""

from __future__ import annotations

from contextlib import suppress

import pytest
from msgspec.structs import replace

from memplan.errors import DoesNotFitError
from memplan.place.alternatives import Variants
from memplan.place.min_vram import least_vram_bytes
from memplan.place.solve import place
from memplan.program.check.judge import check
from tests.support.tables import MIB, NAMES, budgets, make_table

N = 12
KINDS = {"device": "cuda", "saved_bytes": 6 * MIB, "boundary_bytes": MIB // 8, "forward_s": 0.01, "backward_s": 0.02}


def policies(plan):
    return list(plan.policies().values())


def table_of(**changes):
    return make_table([4 * MIB] * N, **{**KINDS, "offloadable": True, **changes})


@pytest.mark.parametrize("share", [0.2, 0.4])
def test_a_link_that_is_idle_takes_them(share):
    """What recomputing would cost a third of the pass for, an idle link takes away for nothing."""
    table = table_of(link=1e10)
    least = least_vram_bytes(table, budgets(0))
    whole = max(table.device_bytes_at(access.index, {}) for access in table.accesses) + N * 4 * MIB
    given = budgets(int(least + share * (whole - least)))
    plan = place(table, given, **NAMES)
    without = place(table_of(link=1e10, offloadable=False), given, **NAMES)
    assert check(plan) == ()
    assert "offload" in policies(plan)
    assert plan.prediction.pass_s < 0.95 * without.prediction.pass_s
    assert plan.asked == {}


@pytest.mark.parametrize(("link", "share"), [(4e8, 0.4), (5e8, 0.1)])
def test_their_number_is_about_the_best(link, share):
    """No number of modules does better by much."""
    table = make_table([4 * MIB] * 24, **{**KINDS, "offloadable": True, "link": link})
    least = least_vram_bytes(table, budgets(0))
    whole = max(table.device_bytes_at(access.index, {}) for access in table.accesses) + 24 * 4 * MIB
    given = budgets(int(least + share * (whole - least)))
    variants = Variants(table, {})
    passes_s = {}
    for count in range(1, variants.most + 1):
        asked = variants.of(count)
        rows = tuple(row if row.module in asked else replace(row, offload_bytes=0) for row in table.accesses)
        with suppress(DoesNotFitError):
            plan = place(replace(table, accesses=rows), given, activations=asked, pieces=False, **NAMES)
            passes_s[count] = plan.prediction.pass_s
    chosen_s = place(table, given, pieces=False, **NAMES).prediction.pass_s
    assert chosen_s <= 1.01 * min(passes_s.values())


def test_a_link_that_binds_does_not():
    table = table_of(link=2e8)
    whole = max(table.device_bytes_at(access.index, {}) for access in table.accesses) + N * 4 * MIB
    plan = place(table, budgets(whole // 2), **NAMES)
    without = place(table_of(link=2e8, offloadable=False), budgets(whole // 2), **NAMES)
    assert plan.prediction.pass_s <= without.prediction.pass_s * (1 + 1e-9)


def test_on_the_cpu_nothing_is_offloaded_unasked():
    table = table_of(link=1e10, device="cpu")
    least = least_vram_bytes(table, budgets(0))
    assert "offload" not in policies(place(table, budgets(least + 8 * MIB), **NAMES))


def test_they_count_in_ram():
    table = table_of(link=1e10)
    least = least_vram_bytes(table, budgets(0))
    whole = max(table.device_bytes_at(access.index, {}) for access in table.accesses) + N * 4 * MIB
    rich = place(table, budgets(int(least + 0.3 * (whole - least))), **NAMES)
    assert rich.prediction.ram_parts["activations"] > 0
    poor = place(table, budgets(least + 40 * MIB, ram=N * 4 * MIB), **NAMES)
    assert poor.prediction.peaks.ram_bytes <= N * 4 * MIB


def test_the_least_is_the_least():
    table = table_of(link=1e10)
    least = least_vram_bytes(table, budgets(0))
    assert place(table, budgets(least), **NAMES).prediction.peaks.vram_bytes <= least
    with pytest.raises(DoesNotFitError) as refused:
        place(table, budgets(least - 1), **NAMES)
    assert refused.value.least_vram_bytes == least
    assert not any("activations" in tip and "any" in tip for tip in refused.value.suggestions)


def test_what_does_not_fit_names_the_way_that_was_not_looked_at():
    table = table_of(link=1e10, offloadable=False)
    with pytest.raises(DoesNotFitError) as refused:
        place(table, budgets(least_vram_bytes(table, budgets(0)) - 1), **NAMES)
    assert any('activations "any"' in tip for tip in refused.value.suggestions)
