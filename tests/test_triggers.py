"""Every access is announced before it happens, whoever checkpoints, in either order of hooks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from memplan.hooks.triggers import Triggers, in_backward


class Log:
    def __init__(self):
        self.events = []

    def forward_begins(self, module, *, in_backward):
        self.events.append(("R" if in_backward else "F") + module)
        return len(self.events)

    def forward_ends(self, module, call, *, in_backward):
        pass

    def backward_begins(self, module, call):
        self.events.append("B" + module)

    def forward_failed(self):
        pass

    def backward_ends(self):
        self.events.append("end")

    def merged(self):
        """The accesses: announcements of one access that follow each other are one."""
        accesses = []
        for event in self.events:
            access = event.replace("R", "B")
            if not accesses or accesses[-1] != access:
                accesses.append(access)
        return accesses


class Layer(nn.Module):
    """A trainable and a frozen linear; hands its second argument on, as T5 does its position bias."""

    def __init__(self, how):
        super().__init__()
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.adapter = nn.Linear(8, 8)
        self.how = how

    def forward(self, x, bias):
        return self._inside(x, bias) if self.how.startswith("inside") else self._compute(x, bias)

    def _inside(self, x, bias):
        return checkpoint(self._compute, x, bias, use_reentrant=self.how.endswith("-reentrant"))

    def _compute(self, x, bias):
        return torch.tanh(self.frozen(x) + self.adapter(x) + bias), bias


class Stack(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.how = how
        self.bias = nn.Parameter(torch.zeros(8))
        self.layers = nn.ModuleList(Layer(how) for _ in range(3))

    def forward(self, x):
        bias = self.bias * 2
        for layer in self.layers:
            if self.how.startswith("around"):
                run = partial(checkpoint, layer, use_reentrant=self.how.endswith("-reentrant"))
            else:
                run = layer
            x, bias = run(x, bias)
        return x.sum()


HOWS = ["off", "inside-reentrant", "inside-other", "around-reentrant", "around-other"]


@pytest.mark.parametrize("how", HOWS)
def test_order_of_accesses(how):
    torch.manual_seed(0)
    model, log = Stack(how), Log()
    triggers = Triggers({str(i): layer for i, layer in enumerate(model.layers)}, log)
    model(torch.randn(2, 8, requires_grad=True)).backward()
    assert log.merged() == ["F0", "F1", "F2", "B2", "B1", "B0", "end"]
    if how == "inside-other":  # the hooks are around the checkpoint: no recompute reaches them
        assert not any(event.startswith("R") for event in log.events)
    if how.startswith("around"):
        assert [event for event in log.events if event.startswith("R")] == ["R2", "R1", "R0"]
    triggers.remove()
    log.events.clear()
    model(torch.randn(2, 8, requires_grad=True)).backward()
    assert log.events == []


def test_what_is_passed_through_is_not_watched():
    """Its gradient comes when every layer's backward has begun: a trigger on it would announce a layer again, late."""
    model, log = Stack("off"), Log()
    Triggers({str(i): layer for i, layer in enumerate(model.layers)}, log)
    model(torch.randn(2, 8, requires_grad=True)).backward()
    assert [event for event in log.events if event.startswith("B")] == ["B2", "B1", "B0"]


def test_no_gradient_no_backward():
    model, log = Stack("off"), Log()
    Triggers({"0": model.layers[0]}, log)
    with torch.no_grad():
        model(torch.randn(2, 8))
    assert log.events == ["F0"]


def test_a_backward_that_raised_is_forgotten():
    model, log = Stack("off"), Log()
    Triggers({str(i): layer for i, layer in enumerate(model.layers)}, log)

    def fail(gradient):
        raise RuntimeError("stop")

    x = torch.randn(2, 8, requires_grad=True)
    x.register_hook(fail)
    with pytest.raises(RuntimeError, match="stop"):
        model(x).backward()
    log.events.clear()
    model(torch.randn(2, 8, requires_grad=True)).backward()
    assert log.merged() == ["F0", "F1", "F2", "B2", "B1", "B0", "end"]


def test_in_backward_is_seen_in_hooks_only():
    seen = []
    x = torch.ones(1, requires_grad=True)
    y = x * 2
    y.register_hook(lambda gradient: seen.append(in_backward()))
    assert not in_backward()
    y.backward()
    assert seen == [True]
