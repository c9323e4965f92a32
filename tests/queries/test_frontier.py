"""Memory against time: never slower with more, and the least that is fast enough."""

from __future__ import annotations

import itertools
import json

import pytest

import memplan
from memplan.case import case_of
from memplan.cli import main
from memplan.errors import InputError, TooSlowError
from memplan.queries.frontier import budgets_of, ends_of, least_for, require_speed
from memplan.request import Request
from tests.queries.small import config_of
from tests.support.training import CPU

GIVEN = {"adapter": {"rank": 4}, "hardware": CPU, "ram": "1GiB", "vram": "1GiB"}
SHAPE = (2, 16)


@pytest.fixture(scope="module")
def case():
    return case_of(Request.of(config_of("llama"), SHAPE, GIVEN))


def test_each_point_is_faster_than_all_cheaper_ones():
    points = memplan.frontier(config_of("llama"), SHAPE, points=9, **GIVEN)
    assert len(points) > 2
    for cheaper, dearer in itertools.pairwise(points):
        assert dearer.vram_bytes > cheaper.vram_bytes
        assert dearer.step_s < cheaper.step_s
    assert all(point.bound_s <= point.pass_s * (1 + 1e-9) for point in points)
    assert all(point.peak_bytes <= point.vram_bytes for point in points)


def test_from_the_least_that_works_to_what_holds_everything(case):
    budgets = budgets_of(case, 5)
    assert budgets[0] == case.least_vram_bytes()
    with pytest.raises(memplan.DoesNotFitError) as refused:
        case.place(vram_bytes=budgets[0] - 1)
    assert refused.value.least_vram_bytes == budgets[0]
    assert case.place(vram_bytes=budgets[0]).prediction.peaks.vram_bytes <= budgets[0]
    whole = case.place(vram_bytes=budgets[-1])
    assert whole.prediction.loads_per_pass == 0
    assert set(whole.policies().values()) == {"keep"}
    assert case.place(vram_bytes=budgets[0]).prediction.pass_s > whole.prediction.pass_s


def test_the_least_for_a_speed(case):
    low, high = budgets_of(case, 2)
    slow, fast = (case.place(vram_bytes=size).prediction.step_s for size in (low, high))
    wanted = (slow + fast) / 2
    found = least_for(case, ends_of(case), wanted)
    assert found.step_s <= wanted
    assert case.place(vram_bytes=found.vram_bytes - (high - low) // 64).prediction.step_s > wanted * 0.98
    assert least_for(case, ends_of(case), slow * 2).vram_bytes == low
    assert least_for(case, ends_of(case), fast * 0.5) is None


def test_what_is_too_slow_says_what_would_do(case):
    low, high = budgets_of(case, 2)
    slow, fast = (case.place(vram_bytes=size).prediction.step_s for size in (low, high))
    with pytest.raises(TooSlowError, match="of vram would do") as refused:
        memplan.plan(config_of("llama"), SHAPE, **{**GIVEN, "vram": low}, max_step_s=(slow + fast) / 2)
    assert low < refused.value.least_vram_bytes <= high
    assert refused.value.step_s == slow
    plan = case.place(vram_bytes=low)
    with pytest.raises(TooSlowError, match="no vram would do"):
        require_speed(case, plan, fast / 2)
    with pytest.raises(InputError, match="more than 0"):
        require_speed(case, plan, 0)
    require_speed(case, plan, slow)


def test_without_ram_nothing_leaves_the_device():
    case = case_of(Request.of(config_of("llama"), SHAPE, {**GIVEN, "ram": 0, "disk": 0}))
    frozen = sum(block.size_bytes for block in case.table.blocks)
    assert case.least_vram_bytes() > frozen


COMMAND = ["smollm2-135m", "--seq", "64", "--hardware", "rtx-4090", "--ram", "8GiB"]


def test_on_the_command_line(capsys):
    assert main(["frontier", *COMMAND, "--points", "4", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    assert points == sorted(points, key=lambda point: point["vram_bytes"])
    assert main(["frontier", *COMMAND, "--points", "4"]) == 0
    shown = capsys.readouterr().out
    assert "####" in shown
    assert shown.count("iB") >= len(points)
    assert main(["plan", *COMMAND, "--vram", f"{points[0]['vram_bytes']}B", "--max-step-s", "1e-6"]) == 1
    assert "no vram would do" in capsys.readouterr().err
    assert main(["plan", *COMMAND, "--max-step-s", "-1"]) == 2
    assert main(["frontier", *COMMAND, "--points", "1"]) == 2


def test_other_ways_and_rows_on_the_command_line(capsys, tmp_path):
    assert main(["frontier", *COMMAND, "--points", "3", "--json"]) == 0
    points = json.loads(capsys.readouterr().out)["points"]
    budget = f"{(points[0]['vram_bytes'] + points[-1]['vram_bytes']) // 2}B"
    table = tmp_path / "rows.csv"
    assert main(["plan", *COMMAND, "--vram", budget, "--compare", "--csv", str(table), "--json"]) == 0
    ways = json.loads(capsys.readouterr().out)["ways"]
    assert len(ways) == 5
    ours = ways.pop("memplan")
    assert all(way is None or way["pass_s"] >= ours["pass_s"] * (1 - 1e-9) for way in ways.values())
    assert any(way is not None for way in ways.values())
    lines = table.read_text().splitlines()
    assert lines[0].startswith("block,name,kind,bytes,home")
    assert len(lines) > 30
    assert {line.split(",")[4] for line in lines[1:]} <= {"device", "host"}
    assert main(["plan", *COMMAND, "--vram", budget, "--compare"]) == 0
    assert "accelerate's device map" in capsys.readouterr().out
    assert main(["plan", *COMMAND, "--csv", str(tmp_path / "no" / "rows.csv")]) == 2
