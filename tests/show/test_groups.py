"""What reports say of groups of micro-batches: figures of a group under its name, a record's brought to the same."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from memplan.place.solve import place
from memplan.program.record import RunRecord
from memplan.program.schema import SCHEMA_VERSION
from memplan.show import first_screen, log_lines, terminal
from memplan.show.compare import compare_plans
from memplan.show.first_screen import Beside
from memplan.show.html import render
from memplan.show.rows import time_rows
from memplan.show.summary import as_dict, facts, measured
from tests.support.tables import MIB, NAMES, WORKLOAD, budgets, make_table

TABLE = make_table([10 * MIB] * 8, link=5e7, saved_bytes=2 * MIB)
TABLE = replace(  # gradients of the micro-batches before are there from the first access on
    TABLE,
    lifetimes=tuple(replace(life, born=0) if life.kind == "gradients" else life for life in TABLE.lifetimes),
)
NAMED = {**NAMES, "workload": replace(WORKLOAD, accumulation=8)}


def plan_of(group):
    return place(TABLE, budgets(60 * MIB, disk=0), groups=(group,), **NAMED)


def record_of(plan, passes=80):
    """A run that took what was planned, with a group's figures shared out over its micro-batches."""
    said, groups = plan.prediction, sum(plan.groups) if plan.groups[1] < 2 else plan.groups[0] + 1
    steps = passes // plan.workload.accumulation
    return RunRecord(
        schema_version=SCHEMA_VERSION, fingerprint=plan.fingerprint, device="cpu", passes=passes, wall_s=9.0,
        pass_s=said.pass_s / plan.group, stall_s=said.stall_s / plan.group, loads=steps * groups * said.loads_per_pass,
        loaded_bytes=steps * groups * said.loaded_bytes_per_pass, misses=0, out_of_order=0, offloaded_bytes=0,
        offload_skipped=0, recoveries=0, blocks=(),
        vram_peak_bytes=said.peaks.vram_bytes, ram_peak_bytes=said.peaks.ram_bytes,
    )  # fmt: skip


@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_a_run_as_planned_has_no_error(group):
    plan = plan_of(group)
    record = record_of(plan)
    seen = measured(plan, record)
    assert seen.pass_s == pytest.approx(plan.prediction.pass_s)
    assert seen.loads_per_pass == pytest.approx(plan.prediction.loads_per_pass)
    assert seen.stall_s == pytest.approx(plan.prediction.stall_s)
    assert seen.tokens_per_s == pytest.approx(plan.workload.tokens / record.pass_s)
    for key in ("pass_s", "loads_per_pass", "loaded_bytes_per_pass", "vram_bytes"):
        assert seen.errors[key] == pytest.approx(0, abs=1e-9)
    rows = {row.label: row for row in time_rows(plan, facts(plan), seen)}
    name, short = ("micro-batch", "micro-batch") if group == 1 else (f"group of {group}", "group")
    assert rows[name].predicted == plan.prediction.pass_s == pytest.approx(rows[name].measured)
    assert rows[f"loads/{short}"].predicted == plan.prediction.loads_per_pass
    assert rows["step"].predicted == plan.prediction.step_s
    known = facts(plan)
    assert known.held_s + known.recompute_s == pytest.approx(plan.prediction.compute_s)

    # What it takes without memplan knows no groups.
    assert known.kept.step_s == pytest.approx(facts(plan_of(1)).kept.step_s)
    assert known.kept.vram_bytes == facts(plan_of(1)).kept.vram_bytes
    assert as_dict(plan, record)["group"] == group


def test_every_report_says_who_shares():
    plan, record = plan_of(4), record_of(plan_of(4))
    shared = "8 per step, 4 share each load"
    assert "8 per step, 4 share each load" in " ".join(first_screen.text(plan, Beside()).split())
    assert shared in " ".join(terminal.text(plan, record).split())
    assert shared in " ".join(log_lines.begin_lines(plan))
    assert any("loaded per group of 4" in line for line in log_lines.begin_lines(plan))
    assert any(line.startswith("group of 4 ") for line in log_lines.end_lines(plan, record, None))
    page = render.text(plan, record, (), None)
    for part in (
        "group of 4, measured",
        "The group of 4 in time",
        "Memory along the group of 4",
        "loads per group of 4",
        shared,
    ):
        assert part in page
    alone = plan_of(1)
    for text in (first_screen.text(alone, Beside()), terminal.text(alone, None), render.text(alone, None, (), None)):
        assert "share each load" not in text
        assert "group of" not in text


def test_two_plans_are_compared_by_micro_batch():
    one, two = plan_of(1), plan_of(4)
    found = compare_plans(one, two)
    assert ("micro-batches that share a load", "1", "4") in found.settings
    rows = {row.what: row for row in found.rows}
    assert rows["micro-batch"].first == one.prediction.pass_s
    assert rows["micro-batch"].second == pytest.approx(two.prediction.pass_s / 4)
    assert rows["loads/micro-batch"].second == pytest.approx(two.prediction.loads_per_pass / 4)
