"""The planned pass as a trace: without a record, with counters of memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from memplan.cli import main
from memplan.program.memory_timeline import timeline
from memplan.program.schema import Plan
from memplan.program.timeline import timeline_of
from memplan.show.trace import chrome_trace
from tests.show.plans import disk_plan, parts_plan, solve_plan

PLANS = {"solved": solve_plan, "disk": disk_plan, "parts": parts_plan}


@pytest.fixture(params=PLANS)
def plan(request: pytest.FixtureRequest) -> Plan:
    return PLANS[request.param]()


def counted(plan: Plan, name: str) -> list[tuple[float, dict[str, int]]]:
    """Return a counter's values with their times in seconds."""
    events = chrome_trace(plan)["traceEvents"]
    return [(e["ts"] / 1e6, e["args"]) for e in events if e["ph"] == "C" and e["name"] == name]


def test_counters_are_the_plans_memory(plan: Plan) -> None:
    peaks, moments, line = plan.prediction.peaks, timeline(plan), timeline_of(plan)
    for tier, peak in (("vram", peaks.vram_bytes), ("ram", peaks.ram_bytes)):
        by_kind, whole = counted(plan, f"{tier} by kind (bytes)"), counted(plan, f"{tier} (bytes)")
        assert [value["all kinds"] for _, value in whole] == [sum(value.values()) for _, value in by_kind]
        assert max(value["all kinds"] for _, value in whole) == peak
        assert [time_s for time_s, _ in whole] == pytest.approx([*line.access_start_s, max(line.access_end_s)])
        for (_, value), moment in zip(by_kind, moments, strict=False):
            assert value.items() <= getattr(moment, tier).items()
        assert all(any(value[kind] for _, value in by_kind) for kind in by_kind[0][1])


def test_times_of_a_counter_never_go_back(plan: Plan) -> None:
    times_s = [time_s for time_s, _ in counted(plan, "vram (bytes)")]
    assert times_s == sorted(times_s)


def test_the_command_writes_a_planned_pass_without_a_record(tmp_path: Path) -> None:
    plan = solve_plan()
    plan.save(tmp_path / "plan.json")
    assert main(["report", str(tmp_path / "plan.json"), "--trace", str(tmp_path / "trace.json")]) == 0
    assert json.loads((tmp_path / "trace.json").read_text()) == json.loads(json.dumps(chrome_trace(plan)))
