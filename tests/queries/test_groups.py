"""Groups of micro-batches from outside: the option, what is asked beside a plan, the figures of large models."""

from __future__ import annotations

import json

import pytest
from msgspec.structs import replace

import memplan
from benchmarks import groups as large
from memplan.case import again, case_of_plan
from memplan.cli import main
from memplan.errors import DoesNotFitError, InputError
from memplan.hardware.profile import save
from memplan.program.check.judge import check
from memplan.queries.compare import compare
from memplan.request import DEFAULT_GROUP
from tests.queries.small import config_of
from tests.support.training import CPU, _figure

SLOW = replace(CPU, name="slow-link", device="cuda", host_to_device_bytes_per_s=_figure(2e6), operator_s=None)
"""A device whose link takes longer for everything than the compute."""

ASKED = {
    "ram": "1GiB", "hardware": SLOW, "adapter": {"rank": 4, "targets": "all-linear"}, "accumulation": 8,
    "gains": False, "dtype": "float32",
}  # fmt: skip


def least_of(group):
    with pytest.raises(DoesNotFitError) as caught:
        memplan.plan(config_of("llama"), (1, 32), vram=1, group=group, **ASKED)
    return caught.value.least_vram_bytes


def plan_of(group, vram=None, **more):
    vram = least_of(1) + 200_000 if vram is None else vram
    return memplan.plan(config_of("llama"), (1, 32), vram=vram, group=group, **{**ASKED, **more})


def test_the_option():
    assert DEFAULT_GROUP == 1
    one = memplan.plan(config_of("llama"), (1, 32), vram=least_of(1) + 200_000, **ASKED)
    assert one == plan_of(1)
    chosen, two = plan_of("auto"), plan_of(2)
    assert (one.group, two.group) == (1, 2)
    assert chosen.group > 1
    assert chosen.prediction.step_s <= two.prediction.step_s < one.prediction.step_s
    assert check(chosen) == ()


def test_what_cannot_be_grouped():
    with pytest.raises(InputError, match="groups of 2 micro-batches were asked for, but activations were to be"):
        plan_of(2, activations="offload")
    assert plan_of("auto", vram="1GiB", activations="offload").group == 1
    assert plan_of("auto", vram="1GiB").group == 1  # nothing is loaded
    least = {group: least_of(group) for group in (1, 8, "auto")}
    assert least["auto"] == least[1] < least[8]


def test_a_plan_beside_others():
    """No other way knows groups; a smaller budget makes them smaller; a gain is one of the group."""
    plan = plan_of("auto", gains=True)
    others = compare(plan)
    assert list(others)[:2] == ["memplan", "memplan, no groups"]
    assert (others["memplan"].group, others["memplan, no groups"].group) == (plan.group, 1)
    assert others["memplan, no groups"].step_s == pytest.approx(plan_of(1).prediction.step_s, rel=0.01)
    assert {way.group for name, way in others.items() if way is not None and name != "memplan"} == {1}
    assert case_of_plan(plan).groups == (plan.group,)
    assert plan.gains
    assert all(gain.pass_s < plan.prediction.pass_s for gain in plan.gains)
    assert plan.least_vram_bytes == least_of(1)
    smaller = again(plan, least_of(1) + 2048)
    assert smaller.group < plan.group
    assert smaller.prediction.peaks.vram_bytes <= least_of(1) + 2048
    assert again(plan_of(1), plan.budgets.vram_bytes).group == 1


def test_what_each_vram_buys():
    """Every point has the group that is best there; all on the device there is none."""
    asked = {**ASKED, "group": "auto"}
    del asked["gains"]
    points = memplan.frontier(config_of("llama"), (1, 32), points=5, **asked)
    alone = memplan.frontier(config_of("llama"), (1, 32), points=5, **{**asked, "group": 1})
    assert points[-1].group == 1
    assert any(point.group > 1 for point in points)
    assert {point.group for point in alone} == {1}
    for point in alone:
        assert min(p.step_s for p in points if p.vram_bytes <= point.vram_bytes) <= point.step_s * 1.001
    del asked["adapter"]
    found = memplan.fit(config_of("llama"), (1, 32), rank=4, vram=least_of(1) + 200_000, quantizations=False, **asked)
    assert found.asked.group > 1
    assert found.least.vram_bytes == least_of(1)
    assert found.whole.group == 1


def test_the_slowest_step_that_will_do():
    plan = plan_of(3, accumulation=8)
    said = plan.prediction
    with pytest.raises(memplan.TooSlowError) as caught:
        plan_of(3, max_step_s=said.step_s / 1e3)
    assert caught.value.step_s == said.step_s


def test_on_the_command_line(tmp_path, capsys):
    save(SLOW, tmp_path / "slow.json")
    config_of("llama").save_pretrained(tmp_path)
    command = ["plan", str(tmp_path), "--seq", "32", "--ram", "1GiB", "--hardware", str(tmp_path / "slow.json")]
    command += ["--lora-rank", "4", "--dtype", "float32", "--accumulation", "8", "--vram", f"{least_of(1) + 200_000}B"]
    assert main([*command, "--group", "auto", "--json"]) == 0
    chosen = json.loads(capsys.readouterr().out)
    assert chosen["group"] > 1
    assert main([*command, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["group"] == 1
    assert main([*command, "--group", "2"]) == 0
    assert "8 per step, 2 share each load" in " ".join(capsys.readouterr().out.split())
    assert main([*command, "--group", "half"]) == 2
    assert "neither a number of micro-batches nor auto" in capsys.readouterr().err


@pytest.mark.full
@pytest.mark.parametrize(("case", "most"), [(large.CASES[0], 1.15), (large.CASES[1], 1.25)], ids=["8b", "70b"])
def test_large_models_wait_no_more(case, most):
    """From shapes alone, on an RTX 4090: docs/log.md has the figures."""
    alone, shared = (large.figures(large.planned(case, group)) for group in (1, "auto"))
    assert alone["of_compute"] > 2.5
    assert shared["of_compute"] <= most
    assert shared["step_s"] <= most * alone["compute_s"]
