"""What memplan adds to a pass in the steady state, by counters: loads as planned, one copy each, and no operator at
all.

No operator means no allocation, no copy and no synchronisation by torch on the thread that computes: parameters are
pointed, and the copies are a worker's. (On a CUDA device the profiler's proof is in test_gpu.)
"""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import memplan
from benchmarks import overhead
from memplan.run.attach import attach
from memplan.run.transfer import transfer
from tests.run.test_parity import plan_for
from tests.support.leftovers import started_since, threads
from tests.support.training import KINDS, batch_of, loss_of, make


class Operators(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen[str(func)] += 1
        return func(*args, **(kwargs or {}))


def one_pass(model, kind):
    loss_of(model(**batch_of(kind))).backward()


def counted(model, kind):
    for _ in range(2):
        one_pass(model, kind)
    with Operators() as operators:
        one_pass(model, kind)
        one_pass(model, kind)
    return operators.seen


@pytest.mark.each_value
@pytest.mark.parametrize("tiers", ["host", "all"])
@pytest.mark.parametrize("kind", KINDS)
def test_no_operator_is_memplans(kind, tiers, tmp_path):
    whole = counted(make(kind), kind)
    model = make(kind)
    plan = plan_for(model, kind, tiers=tiers, share=0.9)
    # A planned recompute runs forwards again, as it should: here only what streaming itself adds is looked at.
    assert all(policy.activations == "keep" for policy in plan.activations)
    assert any(item.home != "device" for item in plan.items)
    with attach(model, plan, cache=tmp_path):
        planned = counted(model, kind)
    assert planned == whole


@pytest.mark.parametrize("kind", KINDS)
def test_loads_and_copies_and_threads_are_as_planned(kind, tmp_path, monkeypatch):
    model = make(kind)
    plan = plan_for(model, kind)
    fills, pieces = [], []
    fill, copy = transfer.CpuTransfers._fill, transfer.copy_bytes
    monkeypatch.setattr(
        transfer.CpuTransfers, "_fill", staticmethod(lambda source, to: (fills.append(to.nbytes), fill(source, to)))
    )
    monkeypatch.setattr(transfer, "copy_bytes", lambda to, of: (pieces.append(to.nbytes), copy(to, of)))
    with attach(model, plan, cache=tmp_path) as handle:
        one_pass(model, kind)
        one_pass(model, kind)
        before, alive = handle.record.loads, threads()
        for _ in range(4):
            one_pass(model, kind)
        record = handle.record
        assert record.loads - before == 4 * plan.prediction.loads_per_pass
        assert record.misses == record.out_of_order == 0
        assert not started_since(alive)
    host = {item.size_bytes for item in plan.items if item.home == "host"}
    assert len(fills) == record.loads
    assert len(pieces) == sum(block.loads for block in record.blocks if plan.home_of(block.block) == "host"), (
        "one copy a load"
    )
    assert set(pieces) <= host


def test_calls_a_block_and_sweep():
    """Time is another's on a machine that others use; the calls that memplan's own code makes are not."""
    model, batch = overhead.build(), torch.randn(overhead.ROWS, overhead.WIDTH)
    with memplan.attach(model, overhead.planned(model, batch)) as handle:
        for _ in range(6):
            overhead.step(model, batch)
        calls = overhead.calls_of(model, batch)
        assert handle.record.misses == 0
    sweeps = 2 * overhead.DEPTH
    assert calls["call"] <= 37 * sweeps
    assert calls["c_call"] <= 42 * sweeps
