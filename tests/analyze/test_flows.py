"""Models of which nothing is trained, and gradients that go through them all the same."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import nn

from memplan.analyze.trace.trace import analyze
from memplan.errors import ModelError
from memplan.hooks.flows import gradients_flow
from memplan.model.calls import Call
from tests.support.training import make

IDS = torch.arange(32).view(2, 16)
SIDES: list[nn.Module] = []


def frozen():
    return make("plain").requires_grad_(False)


def side():
    return nn.Linear(48, 48, bias=False)


def by_closure(layer, trained):
    before = layer.forward
    layer.forward = lambda x: before(x) + trained(x)


def by_hook(layer, trained):
    layer.register_forward_hook(lambda module, args, output: output + trained(args[0]))


def by_global(layer, trained):
    SIDES[:] = [trained]
    before = layer.forward
    layer.forward = lambda x: before(x) + SIDES[0](x)


class Network:
    """No module: it has lists."""

    def __init__(self, layer, trained):
        self.parts, self.before = [{"side": trained}], layer.forward
        layer.forward = self.run

    def run(self, x):
        return self.before(x) + self.parts[0]["side"](x)


@pytest.mark.parametrize("take_over", [by_closure, by_hook, by_global, Network])
def test_what_is_trained_beside_it_counts_and_is_left_as_it_was(take_over):
    model, trained = frozen(), side()
    take_over(model.layers[2], trained)
    held = trained.weight.grad = torch.ones_like(trained.weight)
    version = held._version
    assert gradients_flow(model, IDS)
    graph = analyze(model, Call(IDS), optimizer="sgd")
    assert {fixed.kind: fixed.size_bytes for fixed in graph.fixed}["adapters"] == 2 * 48 * 48 * 4
    assert any("1 parameters beside the model are trained" in note for note in graph.notes)
    backwards = [access.module for access in graph.accesses if access.kind == "backward"]
    assert backwards == ["head", "layers.5", "layers.4", "layers.3", "layers.2"]
    assert trained.weight.grad is held
    assert held._version == version
    assert torch.equal(held, torch.ones_like(held))


def test_what_is_trained_before_it_counts():
    model, prompt = frozen(), nn.Parameter(torch.randn(16, 48))
    hidden = (prompt * 2).expand(2, -1, -1)
    graph = analyze(model.layers[0], Call(hidden), optimizer="sgd")
    assert {fixed.kind: fixed.size_bytes for fixed in graph.fixed}["adapters"] == 2 * 16 * 48 * 4
    assert prompt.grad is None


def test_frozen_networks_that_take_over_train_nothing():
    model = frozen()
    by_closure(model.layers[2], side().requires_grad_(False))
    assert not gradients_flow(model, IDS)
    with pytest.raises(ModelError, match="nothing to train"):
        analyze(model, Call(IDS))


def test_a_network_that_takes_no_part_is_said_so():
    model, kept = frozen(), side()
    model.layers[2].forward = lambda x: x.relu() if kept else x
    with pytest.raises(ModelError, match="no tensor that a gradient reaches"):
        analyze(model, Call(IDS))


@pytest.mark.parametrize("kind", ["module", "view", "leaf"])
def test_gradients_of_what_nobody_finds_are_as_they_were(kind):
    """A weak reference leads to what is trained beside the model: its gradients are real before and after."""
    model, trained = make("plain"), side()
    leaf = torch.randn(48, requires_grad=True)
    held = weakref.ref(trained), weakref.ref(leaf)

    def output_of(module, args, output):
        if kind == "module":
            return output + held[0]()(args[0])
        return output + (held[0]().weight.t()[0] if kind == "view" else held[1]()[:48])

    model.layers[1].register_forward_hook(output_of)
    trained.weight.grad = torch.full_like(trained.weight, 3.0)
    analyze(model, Call(IDS))
    assert torch.equal(trained.weight.grad, torch.full_like(trained.weight, 3.0))
    assert leaf.grad is None
