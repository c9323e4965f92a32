"""Which kinds of devices plans are made for, and where a name that is none of them is refused."""

from __future__ import annotations

import re

import msgspec
import pytest
from msgspec.structs import replace

import memplan
from memplan import device_kinds
from memplan.errors import HardwareError, InputError, PlanCheckError, PlanMismatchError
from memplan.hardware.profile import read, save
from memplan.place.solve import place
from memplan.program.check.judge import require
from memplan.run.attach import attach
from tests.run.test_parity import plan_for
from tests.support.training import CPU, make

NAMED = re.escape("'tpu', not one of cpu, cuda, xpu")


def test_the_cpu_alone_is_not_apart():
    assert [kind for kind in device_kinds.known() if not device_kinds.is_apart(kind)] == ["cpu"]


def test_a_profile_of_no_kind_is_refused(tmp_path):
    with pytest.raises(HardwareError, match=NAMED):
        replace(CPU, device="tpu")
    save(CPU, tmp_path / "profile.json")
    raw = msgspec.json.decode((tmp_path / "profile.json").read_bytes())
    (tmp_path / "profile.json").write_bytes(msgspec.json.encode({**raw, "device": "tpu"}))
    with pytest.raises(HardwareError, match=NAMED):
        read(tmp_path / "profile.json")


def test_a_table_and_a_plan_of_no_kind_are_refused(tmp_path):
    plan = plan_for(make("llama"), "llama")
    table = replace(plan.table, device="tpu")
    with pytest.raises(InputError, match=NAMED):
        place(table, plan.budgets, workload=plan.workload, model="", fingerprint="", hardware="")
    with pytest.raises(PlanCheckError, match=NAMED):
        require(replace(plan, table=table))


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_plan_for_a_device_that_is_not_there(kind, monkeypatch):
    monkeypatch.setattr(f"torch.{kind}.is_available", lambda: False)
    model = make("llama")
    monkeypatch.setattr("tests.run.test_parity.CPU", replace(CPU, name=f"test-{kind}", device=kind))
    plan = plan_for(model, "llama")
    with pytest.raises(PlanMismatchError, match=f"made for the {kind} device of 'test-{kind}', and torch sees none"):
        attach(model, plan)
    assert memplan.handle_of(model) is None
