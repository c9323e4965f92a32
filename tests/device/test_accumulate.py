"""Micro-batches that take turns at each block, on the simulated device: copies and compute in either order."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from msgspec.structs import replace
from torch.nn.attention import SDPBackend, sdpa_kernel

from memplan.run.attach import attach_on
from tests.run import test_parity
from tests.run.test_parity import plan_for
from tests.support import devices
from tests.support.groups import in_groups, train_in_groups
from tests.support.training import CPU, assert_equal, make, train

SIM = torch.device("sim", 0)
APART = devices.Apart("sim")
batches, on_host = APART.batches, devices.at_home
PROFILE = replace(CPU, name="test-sim", device="sim")


@pytest.fixture(autouse=True)
def plans_for_a_gpu(monkeypatch):
    monkeypatch.setattr(test_parity, "CPU", PROFILE)


@cache
def whole(kind, **options):
    with sdpa_kernel(SDPBackend.MATH):
        return train(make(kind, **options), kind, steps=2, accumulation=4)


def full(*values):
    return pytest.param(*values, marks=pytest.mark.full)


@pytest.mark.parametrize("checkpointing", ["off", full("around-reentrant"), "inside-other"])
def test_the_devices_random_numbers(checkpointing, policy, monkeypatch):
    """Each micro-batch has those that it has one by one."""
    monkeypatch.setattr(torch.sim, "_initialized", True, raising=False)  # else a checkpoint keeps none of them
    options = {"dropout": 0.2, "checkpointing": checkpointing}
    torch.sim.manual_seed(5)
    with sdpa_kernel(SDPBackend.MATH):
        alone = train(make("llama", **options).to("sim"), "llama", steps=2, accumulation=4, batches=batches)
    model, loads = make("llama", **options), []
    plan = plan_for(model, "llama", share=0.4)
    torch.sim.manual_seed(5)
    with attach_on(model, in_groups(plan, 4), SIM) as handle:
        run = train_in_groups(model, "llama", handle, steps=2, accumulation=4, batches=batches, loads=loads)
        assert loads[1] == plan.prediction.loads_per_pass > 0
    assert_equal(on_host(alone), on_host(run))


@pytest.mark.parametrize(
    ("kind", "checkpointing", "share", "group", "checked"),
    [
        ("llama", "off", 0.4, 4, True),
        ("llama", "inside-other", 0.0, 2, False),
        full("llama", "around-reentrant", 0.4, 4, True),
        full("llama", "inside-reentrant", 0.0, 3, False),
        full("t5", "off", 0.4, 4, True),
        full("t5", "around-other", 0.0, 3, False),
        full("plain", "off", 0.0, 4, False),
    ],
)
def test_in_turns(kind, checkpointing, share, group, checked, policy, tmp_path):
    model, loads = make(kind, checkpointing=checkpointing), []
    plan = plan_for(model, kind, share=share)
    with attach_on(model, in_groups(plan, group), SIM, checked=checked, cache=tmp_path) as handle:
        run = train_in_groups(model, kind, handle, steps=2, accumulation=4, batches=batches, loads=loads)
        assert loads[1] == -(-4 // group) * plan.prediction.loads_per_pass > 0
        assert handle.record.misses == 0
    assert_equal(whole(kind, checkpointing=checkpointing), on_host(run))
