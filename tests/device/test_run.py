"""memplan on the simulated device: bit-identical to the CPU's whole run, whichever of copies and compute goes first.

Plans are made for a CUDA device, so that homes are pinned and disk loads staged; the device's memory is apart, what is
freed is poisoned, and a missing wait gives NaN or an old weight under one of the two extremes.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from msgspec.structs import replace
from torch.nn.attention import SDPBackend, sdpa_kernel

from memplan.run.attach import attach_on
from tests.device.test_sim import batches, on_host
from tests.run import test_parity
from tests.run.test_parity import assert_forwards, plan_for
from tests.support.training import CPU, assert_equal, make, train

SIM = torch.device("sim", 0)
CUDA = replace(CPU, name="test-cuda", device="cuda")


@pytest.fixture(autouse=True)
def plans_for_a_gpu(monkeypatch):
    monkeypatch.setattr(test_parity, "CPU", CUDA)


@cache
def whole(kind, **options):
    """What the CPU computes, with the attention that a device without kernels of its own takes."""
    with sdpa_kernel(SDPBackend.MATH):
        return train(make(kind, **options), kind)


def planned(kind, tmp_path, *, checked=False, plan=None, share=0.4, offload=(), tiers="all", **options):
    """Train under a plan, compare, and return the handle of the run, which has ended."""
    model = make(kind, **options)
    plan = plan or plan_for(model, kind, share=share, offload=offload, tiers=tiers)
    with attach_on(model, plan, SIM, checked=checked, cache=tmp_path) as handle:
        run = train(model, kind, batches=batches)
    assert_equal(whole(kind, **options), on_host(run))
    again = {policy.module for policy in plan.activations if policy.activations == "recompute"}
    assert_forwards(whole(kind, **options), run, again, steps=3)
    return handle


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "checked"])
@pytest.mark.parametrize("share", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["llama", pytest.param("t5", marks=pytest.mark.full)])
def test_streamed(kind, share, checked, policy, tmp_path):
    handle = planned(kind, tmp_path, share=share, checked=checked)
    assert handle.record.loads > 0


@pytest.mark.parametrize("offload", [("model.layers.1", "model.layers.3"), "all"], ids=["some", "all"])
def test_offloaded_activations(offload, policy, tmp_path):
    handle = planned("llama", tmp_path, share=0.2, offload=offload, checked=True)
    assert handle.record.offloaded_bytes > 0
