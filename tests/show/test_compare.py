"""Two plans, or two runs, side by side."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

from memplan.cli import main
from memplan.errors import InputError
from memplan.place.solve import place
from memplan.program.page_lock import page_locked_bytes
from memplan.show.compare import compare_plans, compare_records, write_compared_files
from tests.show.plans import make_plan, make_record, pageable_plan, solve_plan
from tests.support.tables import NAMES

FIRST, SECOND = make_plan("dhhhhhhd"), make_plan("dhhddhhd", recomputed="  ^^    ", stall_s=0.01)


def test_what_changed_and_what_it_cost():
    found = compare_plans(FIRST, SECOND)
    rows = {row.what.strip(): row for row in found.rows}
    assert rows["micro-batch"].first == FIRST.prediction.pass_s
    assert rows["micro-batch"].second == SECOND.prediction.pass_s
    assert rows["waiting"].second == 0.01
    assert rows["vram peak"].first == FIRST.prediction.peaks.vram_bytes
    for tier in ("vram", "ram"):
        parts = [row for row in found.rows if row.what.startswith(f"  {tier} ")]
        peaks = [getattr(plan.prediction.peaks, f"{tier}_bytes") for plan in (FIRST, SECOND)]
        assert [sum(row.first for row in parts), sum(row.second for row in parts)] == peaks
    moved = {(m.first, m.second): m.blocks for m in found.moved}
    assert moved["host", "device"] == ("model.layers.2", "model.layers.3")
    assert moved["keep", "recompute"] == ("model.layers.1", "model.layers.2")
    assert [what for what, _, _ in found.settings] == ["vram budget"]


def test_the_same_has_no_changes():
    found = compare_plans(FIRST, FIRST)
    assert found.moved == found.settings == found.notes == ()
    assert all(row.first == row.second for row in found.rows)


def test_what_rounding_leaves_is_nothing_to_compare_with(capsys):
    few = replace(FIRST, prediction=replace(FIRST.prediction, stall_s=3e-18))
    rows = {row.what: row for row in compare_plans(few, SECOND).rows}
    assert rows["waiting"].share is None
    write_compared_files(compare_plans(few, SECOND), ("first", "second"))
    shown = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert shown["waiting"] == ["0", "s", "10.0", "ms", "new"]
    assert "waiting" not in {row.what for row in compare_plans(few, few).rows}


def test_other_settings_are_told():
    other = replace(SECOND, hardware="another", budgets=replace(SECOND.budgets, vram_bytes=1 << 40))
    settings = {what: (one, two) for what, one, two in compare_plans(FIRST, other).settings}
    assert settings["hardware"] == (f"{FIRST.hardware} (cuda)", "another (cuda)")
    assert settings["vram budget"][1] == "1.00 TiB"


def test_what_is_page_locked_in_one_alone():
    plan = pageable_plan()
    free = place(plan.table, replace(plan.budgets, page_lock_bytes=None), pieces=False, **NAMES)
    found = compare_plans(free, plan)
    assert ("page lock budget", "all of ram", "150.0 MiB") in found.settings
    (row,) = [row for row in found.rows if row.what.strip() == "pinned ram"]
    assert (row.first, row.second) == (page_locked_bytes(free), page_locked_bytes(plan))
    assert ("host", "host, pageable") in {(moved.first, moved.second) for moved in found.moved}


def test_two_runs():
    first = make_record(FIRST, pass_s=0.2)
    found = compare_records(first, replace(first, pass_s=2 * first.pass_s))
    (row,) = [row for row in found.rows if row.what == "micro-batch"]
    assert row.share == 1
    with pytest.raises(InputError, match="different models"):
        compare_records(first, replace(first, fingerprint="another"))


def test_on_the_command_line(tmp_path, capsys):
    """Plans of a real solver, since the command has them checked."""
    plan = solve_plan()
    plan.save(tmp_path / "a.json")
    replace(plan, notes=("another",)).save(tmp_path / "b.json")
    make_record(plan, pass_s=0.2).save(tmp_path / "run.json")
    first, second, run = (str(tmp_path / name) for name in ("a.json", "b.json", "run.json"))
    assert main(["report", first, second, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["what"]: row["first"] for row in found["rows"]}["micro-batch"] == plan.prediction.pass_s
    assert main(["report", run, run]) == 0
    assert "loads/micro-batch" in capsys.readouterr().out
    assert main(["report", run, first]) == 2
    assert "the plan first" in capsys.readouterr().err
    assert main(["report", run, run, "--trace", str(tmp_path / "t.json")]) == 2
    assert main(["report", first, "--trace", str(tmp_path / "t.json")]) == 0
    assert json.loads((tmp_path / "t.json").read_text())["traceEvents"]


def test_text_names_layers_by_number(capsys):
    write_compared_files(compare_plans(FIRST, SECOND), ("first", "second"))
    shown = capsys.readouterr().out
    assert shown.isascii()
    assert "host -> device: 2 blocks, 400.0 MiB, of model.layers.2-3" in shown
