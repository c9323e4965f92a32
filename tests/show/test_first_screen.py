"""The first screen of a plan: twelve lines, and what people compare a plan with."""

from __future__ import annotations

import re

import msgspec
import pytest

from memplan.cost.optimizer_state import state_on_host
from memplan.place.solve import place
from memplan.program.schema import Gain
from memplan.program.whole import checkpointing_only, everything_kept
from memplan.show import first_screen
from memplan.show.first_screen import Beside
from memplan.units import GIB, MIB, format_bytes
from tests.show.plans import disk_plan, make_plan, pageable_plan, parts_plan, solve_plan
from tests.support.tables import NAMES, budgets, make_table

PLANS = {"solved": solve_plan, "disk": disk_plan, "pageable": pageable_plan, "parts": parts_plan}


@pytest.mark.parametrize("policy", ["keep", "recompute"])
@pytest.mark.parametrize("away", [False, True])
def test_the_baselines_are_what_the_solver_says_of_a_card_that_holds_everything(policy: str, away: bool) -> None:
    """With the optimizer's state on the device too, whatever the plan does with it."""
    table = make_table([40 * MIB] * 9, link=2e9, device="cuda")
    roomy = place(table, budgets(1 << 40), activations=dict.fromkeys(table.recomputable, policy), **NAMES)
    assert all(stay.begins == "always" for stay in roomy.residences)
    plan = place(state_on_host(table) if away else table, budgets(240 * MIB), pieces=False, **NAMES)
    found = everything_kept(plan) if policy == "keep" else checkpointing_only(plan)
    assert found is not None
    assert found.vram_bytes == roomy.prediction.peaks.vram_bytes
    assert found.step_s == pytest.approx(roomy.prediction.step_s, rel=1e-12)


def test_a_model_that_checkpoints_by_itself_has_one_baseline() -> None:
    plan = pageable_plan()
    assert plan.table.recomputable == ()
    assert checkpointing_only(plan) is None
    assert "checkpointing only" not in first_screen.text(plan, Beside())
    assert "everything kept" in first_screen.text(plan, Beside())


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("name", PLANS)
def test_it_is_plain_keeps_its_width_and_is_twelve_lines(name: str, width: int) -> None:
    plan = msgspec.structs.replace(PLANS[name](), least_vram_bytes=150 * MIB)
    text = first_screen.text(plan, Beside(device_bytes=12 * GIB, next_command="memplan run -- python train.py"), width)
    lines = text.splitlines()
    assert text.isascii()
    assert max(map(len, lines)) <= width
    assert all(line == line.rstrip() for line in lines)
    if width >= 80:
        assert len(lines) <= 12
    assert lines[-1] == "Next: memplan run -- python train.py"


def test_each_number_is_the_plans() -> None:
    plan = solve_plan()
    said, budget = plan.prediction, plan.budgets
    gain = Gain(of="vram", more=GIB, pass_s=said.pass_s * 0.9)
    plan = msgspec.structs.replace(plan, gains=(gain,), least_vram_bytes=123 * MIB)
    text = first_screen.text(plan, Beside(device_bytes=1 * GIB), 80)
    assert text.startswith(f"Fits rtx-4070: {format_bytes(said.peaks.vram_bytes)} of {format_bytes(budget.vram_bytes)}")
    saved_s = 0.1 * said.pass_s * plan.workload.accumulation
    assert f"1 GiB more vram saves {saved_s * 1e3:.1f} ms per step ({saved_s / said.step_s:.1%})" in text
    assert "; the minimum is 123.0 MiB." in text
    rows = {
        line[:20].strip(): re.split(r"\s{2,}", line[20:].strip())
        for line in text.splitlines()
        if line.endswith(("yes", "no"))
    }
    kept, only = everything_kept(plan), checkpointing_only(plan)
    assert only is not None
    assert list(rows) == ["memplan", "checkpointing only", "everything kept"]
    assert rows["memplan"][0] == format_bytes(said.peaks.vram_bytes)
    assert rows["checkpointing only"][0] == format_bytes(only.vram_bytes)
    assert rows["everything kept"][0] == format_bytes(kept.vram_bytes)
    for whole, name in ((kept, "everything kept"), (only, "checkpointing only")):
        assert rows[name][-1] == ("yes" if whole.vram_bytes <= GIB else "no")
    parts = re.search(r"vram in GiB: ([^.]*(?:\.\d\d[^.]*)*)\n1 GiB", text)
    assert parts is not None
    shown = sum(float(part) for part in re.findall(r"\d+\.\d\d", parts[1]))
    assert shown == pytest.approx(said.peaks.vram_bytes / GIB, abs=0.05)


def test_what_was_not_looked_at_is_not_said() -> None:
    text = first_screen.text(make_plan("dhhd"), Beside())
    assert "minimum" not in text
    assert "1 GiB more" not in text
    assert "No GPU" not in text
    assert "No GPU was found" in first_screen.text(make_plan("dhhd", device="cpu"), Beside(is_this_cpu=True))
