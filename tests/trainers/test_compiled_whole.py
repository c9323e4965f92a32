"""What torch.compile makes of a waiting model tells of itself, once, when it is first trained; a layer does not."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule

from memplan.trainers import compiled_whole
from memplan.trainers.compiled_whole import serve_compiled
from memplan.trainers.loading.deferred_placement import wait


@pytest.fixture
def told(monkeypatch):
    for kind, name in ((OptimizedModule, "__init__"), (nn.Module, "compile")):
        monkeypatch.setattr(kind, name, getattr(kind, name))  # as they are again afterwards
    found = []
    serve_compiled(OptimizedModule, found.append)
    return found


def compiled(model, in_place):
    if not in_place:
        return torch.compile(model, backend="eager")
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize("in_place", [False, True])
def test_told_once_at_the_first_call_with_gradients(told, in_place):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    wait(model, lambda *given: None)
    made, value = compiled(model, in_place), torch.ones(1, 3)
    with torch.no_grad():
        before = made(value)
    assert told == []
    for _ in range(2):
        assert torch.equal(made(value), before)
    assert told == [model]


@pytest.mark.parametrize("in_place", [False, True])
def test_layers_of_a_waiting_model_are_left_alone(told, in_place):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    wait(model, lambda *given: None)
    layer = compiled(model[0], in_place)
    layer(torch.ones(1, 3))
    assert told == []


@pytest.mark.parametrize("in_place", [False, True])
def test_a_model_under_a_plan_is_told_of_at_its_first_call(told, monkeypatch, in_place):
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    handle = SimpleNamespace(model=model)
    monkeypatch.setattr(compiled_whole, "handle_of", lambda module: handle if module is model else None)
    made = compiled(model, in_place)
    with torch.no_grad():
        made(torch.ones(1, 3))
    assert told == [model]
