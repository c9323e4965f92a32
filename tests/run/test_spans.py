"""The traced mode: what took place when, beside what was planned; and nothing else changes."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from memplan.errors import InputError, PlanMismatchError
from memplan.program.record import RunRecord
from memplan.run.attach import attach
from memplan.show.trace import LANES, chrome_trace, write_trace
from tests.run.test_parity import plan_for
from tests.support.training import KINDS, assert_equal, batch_of, loss_of, make, train, whole_run

AT_THE_TURN = 2
"""Loads that may end in the pass before or after: one on each channel."""


def one_pass(model, kind):
    loss_of(model(**batch_of(kind))).backward()


@pytest.mark.quick("llama-plain", "gpt2-checked")
@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("kind", KINDS)
def test_it_changes_nothing_and_every_access_and_load_is_there(kind, checked, tmp_path):
    whole = whole_run(kind)
    model = make(kind)
    plan = plan_for(model, kind, tiers="all", share=0.3)
    with attach(model, plan, cache=tmp_path, traced=True, checked=checked) as handle:
        assert_equal(whole, train(model, kind))
        one_pass(model, kind)  # the pass before it is over where its successor begins
        spans = handle.record.spans
    assert min(span.start_s for span in spans) == 0
    assert all(span.end_s >= span.start_s for span in spans)
    accesses = [span.name for span in spans if span.lane == "compute"]
    planned = [f"{row.kind} {row.module}" for row in plan.table.accesses if row.kind in ("forward", "backward")]
    assert set(planned) <= set(accesses)
    assert [name for name in accesses if name.startswith("forward")] == [n for n in planned if n.startswith("forward")]
    computing = sorted((s.start_s, s.end_s) for s in spans if s.lane in ("compute", "wait"))
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(computing))
    for lane in ("h2d", "disk"):
        loads = sorted((s.start_s, s.end_s) for s in spans if s.lane == lane)
        assert all(before[1] <= after[0] for before, after in itertools.pairwise(loads))
    names = {block.name for block in plan.table.blocks}
    loads = [span.name for span in spans if span.lane in ("h2d", "disk")]
    assert set(loads) <= names
    assert abs(len(loads) - plan.prediction.loads_per_pass) <= AT_THE_TURN


def test_without_it_there_are_none(tmp_path):
    model = make("llama")
    with attach(model, plan_for(model, "llama", tiers="host", share=0.3), cache=tmp_path) as handle:
        train(model, "llama")
    assert handle.record.spans == ()


def test_the_profiler_names_what_is_read(tmp_path):
    model = make("llama")
    plan = plan_for(model, "llama", tiers="host", share=0.3)
    with attach(model, plan, cache=tmp_path, traced=True):
        one_pass(model, "llama")
        with profile(activities=[ProfilerActivity.CPU]) as seen:
            one_pass(model, "llama")
    names = {event.name for event in seen.events()}
    assert "memplan: forward model.layers.0" in names
    assert "memplan: backward model.layers.0" in names


def test_one_file_has_both(tmp_path):
    """Chrome's format: what is planned is one process, what was measured another, each load and access in both."""
    model = make("llama")
    plan = plan_for(model, "llama", tiers="host", share=0.3)
    with attach(model, plan, cache=tmp_path, traced=True) as handle:
        train(model, "llama")
        one_pass(model, "llama")
        record = handle.record
    record.save(tmp_path / "record.json")
    write_trace(tmp_path / "trace.json", plan, RunRecord.load(tmp_path / "record.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert {event["ph"] for event in events} == {"M", "X", "C"}
    by_process = {pid: [e for e in events if e["ph"] == "X" and e["pid"] == pid] for pid in (1, 2)}
    loads = {pid: sum(e["cat"] == "h2d" for e in found) for pid, found in by_process.items()}
    assert loads[1] == plan.prediction.loads_per_pass
    assert abs(loads[2] - loads[1]) <= AT_THE_TURN
    computing = sum(e["dur"] for e in by_process[1] if e["cat"] == "compute") / 1e6
    assert computing == pytest.approx(plan.prediction.compute_s)
    assert sum(e["dur"] for e in by_process[1] if e["cat"] == "wait") / 1e6 == pytest.approx(
        plan.prediction.stall_s, abs=1e-9
    )
    assert {e["tid"] for e in events if e["ph"] == "X"} <= set(range(1, len(LANES) + 1))


def test_what_cannot_be_shown(tmp_path):
    model = make("llama")
    plan = plan_for(model, "llama", tiers="host", share=0.3)
    with attach(model, plan, cache=tmp_path) as handle:
        train(model, "llama")
    with pytest.raises(InputError, match="traced=True"):
        chrome_trace(plan, handle.record)
    with pytest.raises(InputError, match="cannot be written"):
        write_trace(tmp_path / "none" / "trace.json", plan)
    other = make("gpt2")
    with pytest.raises(PlanMismatchError):
        chrome_trace(plan_for(other, "gpt2", tiers="host", share=0.3), handle.record)
    assert torch.is_grad_enabled()
