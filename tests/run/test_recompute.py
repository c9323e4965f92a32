"""A recomputed layer draws the random numbers that it drew, wherever its arguments lie and however they are given."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.hooks import recompute


def on_a_card():
    with FakeTensorMode():
        return torch.empty(2, device="cuda")


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, x, scale=1.0, **others):
        return nn.functional.dropout(self.linear(x), 0.5) * scale


@pytest.mark.parametrize(
    ("args", "kwargs", "count"),
    [
        ((), {"x": on_a_card(), "mask": on_a_card()}, 1),
        ((), {"x": (on_a_card(), torch.ones(1))}, 1),
        ((on_a_card(),), {"mask": on_a_card()}, 0),
        ((torch.ones(1),), {"x": on_a_card()}, 1),
        ((), {"x": torch.ones(1), "y": torch.ones(1, device="meta"), "z": 3}, 0),
    ],
)
def test_a_device_that_keywords_alone_lie_on_is_shown(args, kwargs, count, monkeypatch):
    """Torch keeps the random states of the devices that it finds in positional arguments."""
    found = recompute.on_other_devices(args, kwargs)
    assert [tensor.device.type for tensor in found] == ["cuda"] * count
    module, seen = Layer(), []
    module.forward = lambda *given, **named: (given, named)

    def checkpoint(run, *given, use_reentrant, **named):
        seen.append(given)
        return run(*given, **named)

    monkeypatch.setattr(recompute, "checkpoint", checkpoint)
    recompute.wrap(module)
    given, named = module(*args, **kwargs)
    assert len(given) == len(args)
    assert named.keys() == kwargs.keys()
    assert len(seen[0]) == len(args) + (count > 0)
    assert not count or seen[0][0][0].device.type == "cuda"


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("named", [False, True], ids=["by place", "by name"])
def test_it_drops_out_what_it_dropped_out(named, device):
    module = Layer().to(device)
    x = torch.randn(4, 8, device=device)
    gradients = []
    for wrapped in (False, True):
        undo = recompute.wrap(module) if wrapped else None
        torch.manual_seed(3)
        made = module(x=x) if named else module(x)
        torch.rand(5, device=device)  # the state is another by the backward
        made.square().sum().backward()
        gradients.append(module.linear.weight.grad)
        module.zero_grad()
        if undo is not None:
            undo()
    assert torch.equal(*gradients)
