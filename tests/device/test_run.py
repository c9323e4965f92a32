"""How often the host waits for the simulated device under a plan. What is computed there: tests/run/test_gpu.py."""

from __future__ import annotations

import pytest
import torch

from memplan.hooks.same_again import FIRST
from memplan.run.attach import attach
from tests.device import backend
from tests.run.test_parity import plan_for
from tests.support.training import make


def waits_of(apart, model, warm):
    """How often the host waits by the end of a forward, of its backward and of the step, after some others."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for seed in range(warm + 1):
        batch = apart.batches("llama", seed)
        backend.forget_waits()
        loss = model(**batch).loss
        forward = backend.waits()
        loss.backward()
        backward = backend.waits()
        optimizer.step()
        step = backend.waits()
        optimizer.zero_grad()
    return forward, backward, step


@pytest.mark.parametrize("tiers", ["host", "all"])
@pytest.mark.parametrize("offload", ["all", pytest.param((), marks=pytest.mark.full)], ids=["offloaded", "kept"])
def test_the_host_waits_no_more_than_for_a_whole_model(offload, tiers, apart, tmp_path):
    """With pinned homes; what comes from the disk is waited for by the ring's own thread alone."""
    warm = 1 if offload else FIRST + 1  # layers that run again are compared at once at first
    expected = waits_of(apart, make("llama").to(apart.device), 0)
    model = make("llama")
    plan = plan_for(model, "llama", tiers=tiers, offload=offload)
    with attach(model, plan, cache=tmp_path) as handle:
        found = waits_of(apart, model, warm)
        assert handle.record.loads > 0
    for before, now in zip(expected, found, strict=True):
        assert {**now, "event": 0} == before
        assert now["event"] == 0 or tiers == "all"
