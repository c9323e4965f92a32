"""Files are written whole, read strictly, and refused with the reason."""

from __future__ import annotations

import json
import re

import pytest
from msgspec.structs import replace

from memplan.errors import PlanCheckError, PlanFormatError
from memplan.place.solve import place
from memplan.program.codec import SCHEMA_VERSION, decode, encode
from memplan.program.record import RunRecord
from memplan.program.schema import Plan
from tests.support.tables import MIB, NAMES, budgets, make_table


@pytest.fixture
def plan():
    return place(make_table([MIB] * 6), budgets(40 * MIB), **NAMES)


@pytest.fixture
def record(plan):
    return RunRecord(
        schema_version=SCHEMA_VERSION,
        fingerprint=plan.fingerprint,
        device="cpu",
        passes=3,
        wall_s=1.0,
        pass_s=0.3,
        stall_s=0.0,
        loads=4,
        loaded_bytes=4 * MIB,
        misses=0,
        out_of_order=0,
        learned=0,
        offloaded_bytes=0,
        offload_skipped=0,
        recoveries=0,
        vram_peak_bytes=1,
        ram_peak_bytes=2,
        blocks=(),
    )


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
        (lambda d: d.update(schema_version=1), "schema version 1, this memplan reads 2: re-create it"),
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


def test_a_path_with_a_zero_byte(plan):
    with pytest.raises(PlanFormatError, match="cannot be read"):
        Plan.load("a\0b")
    with pytest.raises(PlanFormatError, match="cannot be written"):
        plan.save("a\0b")


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_has_no_word_for_are_not_written(plan, tmp_path, number):
    with pytest.raises(PlanFormatError, match=r"prediction\.pass_s is NaN or infinite"):
        replace(plan, prediction=replace(plan.prediction, pass_s=number)).save(tmp_path / "plan.json")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "bend",
    [
        lambda data: re.sub(rb'"pass_s": [0-9.e-]+', b'"pass_s": NaN', data),
        lambda data: re.sub(rb'"pass_s": [0-9.e-]+', b'"pass_s": 1e999', data),
        lambda data: data.decode().encode("utf-16"),
        lambda data: b"\xef\xbb\xbf" + data,
        lambda data: data.replace(b'"made"', b'"\xff"', 1),
        lambda data: b"[" * 200_000,
        lambda data: b"null",
        lambda data: b"[]",
        lambda data: data + data,
    ],
)
def test_bytes_that_are_no_plan(plan, bend):
    with pytest.raises(PlanFormatError):
        decode(bend(encode(plan)), Plan, "the plan")


def test_a_file_is_left_as_it_was_where_writing_fails(plan, tmp_path, monkeypatch):
    plan.save(tmp_path / "plan.json")
    before = (tmp_path / "plan.json").read_bytes()

    def refuse(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(PlanFormatError, match="No space left"):
        replace(plan, model="other").save(tmp_path / "plan.json")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert (tmp_path / "plan.json").read_bytes() == before


def test_others_may_read_a_plan_as_the_umask_says(plan, tmp_path):
    plan.save(tmp_path / "plan.json")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "plan.json").stat().st_mode == (tmp_path / "plain").stat().st_mode
