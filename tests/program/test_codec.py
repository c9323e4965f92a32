"""Files are written whole, read strictly, and refused with the reason."""

from __future__ import annotations

import json

import pytest

from memplan.errors import PlanCheckError, PlanFormatError
from memplan.place.solve import place
from memplan.program.record import RunRecord
from memplan.program.schema import Plan
from tests.tables import MIB, NAMES, budgets, make_table


@pytest.fixture
def plan():
    return place(make_table([MIB] * 6), budgets(40 * MIB), **NAMES)


@pytest.fixture
def record(plan):
    return RunRecord(
        schema_version=1, fingerprint=plan.fingerprint, device="cpu", passes=3, wall_s=1.0, pass_s=0.3, stall_s=0.0,
        loads=4, loaded_bytes=4 * MIB, misses=0, off_sequence=0, vram_peak_bytes=1, ram_peak_bytes=2, blocks=(),
    )  # fmt: skip


def test_what_is_saved_is_loaded(plan, record, tmp_path):
    plan.save(tmp_path / "plan.json")
    record.save(tmp_path / "record.json")
    assert Plan.load(tmp_path / "plan.json") == plan
    assert RunRecord.load(tmp_path / "record.json") == record
    first = (tmp_path / "plan.json").read_bytes()
    plan.save(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").read_bytes() == first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["plan.json", "record.json"]


def edited(plan, tmp_path, edit):
    plan.save(tmp_path / "plan.json")
    data = json.loads((tmp_path / "plan.json").read_text())
    edit(data)
    (tmp_path / "plan.json").write_text(json.dumps(data))
    return tmp_path / "plan.json"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.update(schema_version=2), "schema version 2, this memplan reads 1"),
        (lambda d: d.pop("schema_version"), "no schema_version"),
        (lambda d: d.update(extra=1), "extra"),
        (lambda d: d.pop("items"), "items"),
        (lambda d: d["budgets"].update(vram_bytes="6GiB"), "vram_bytes"),
        (lambda d: d["budgets"].update(ram_bytes=-1), "negative size or time at budgets.ram_bytes"),
        (lambda d: d["table"].update(disk_bytes_per_s=None), "disk_bytes_per_s"),
        (lambda d: d["items"][0].update(home="attic"), "attic"),
    ],
)
def test_edits_that_make_no_plan(plan, tmp_path, edit, message):
    with pytest.raises(PlanFormatError, match=message):
        Plan.load(edited(plan, tmp_path, edit))


def test_an_edit_that_breaks_the_budget(plan, tmp_path):
    with pytest.raises(PlanCheckError, match="of vram are needed"):
        Plan.load(edited(plan, tmp_path, lambda d: d["budgets"].update(vram_bytes=MIB)))


@pytest.mark.parametrize("keep", [0, 1, 100, -2])
def test_truncated(plan, tmp_path, keep):
    plan.save(tmp_path / "plan.json")
    data = (tmp_path / "plan.json").read_bytes()
    (tmp_path / "plan.json").write_bytes(data[:keep])
    with pytest.raises(PlanFormatError):
        Plan.load(tmp_path / "plan.json")


def test_paths_that_cannot_be_used(plan, tmp_path):
    with pytest.raises(PlanFormatError, match="cannot be read"):
        Plan.load(tmp_path / "none.json")
    with pytest.raises(PlanFormatError, match="cannot be written"):
        plan.save(tmp_path / "no" / "folder" / "plan.json")
