"""Which layers are taken apart for their experts, and into what."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from memplan.analyze.trace.trace import analyze
from memplan.hooks.triggers import modules_by_name
from tests.analyze.steps import real_order
from tests.support.routed import DEPTH, EXPERTS, Layer, Routed, batch_of, make
from tests.support.training import loss_of


def kinds_of(graph):
    return {block.name: block.kind for block in graph.blocks}


def analyzed(model, kind="routed", shape=(1, 4)):
    return analyze(model, batch_of(kind, shape=shape), loss=loss_of)


def test_experts_attention_and_what_is_shared_are_blocks_of_their_own():
    graph = analyzed(make())
    expected = {}
    for layer in (f"layers.{index}" for index in range(DEPTH)):
        expected |= {f"{layer}.before": "other", f"{layer}.attention": "layer", f"{layer}.between": "other"}
        expected |= {f"{layer}.mlp.router": "other", f"{layer}.mlp.shared": "layer"}
        expected |= {f"{layer}.mlp.experts.{index}": "expert" for index in range(EXPERTS)}
    assert kinds_of(graph) == {"embed": "embedding", **expected, "head": "head"}
    assert not any(block.pinned_because for block in graph.blocks)
    assert all(block.stack == "layers" for block in graph.blocks if block.name.startswith("layers."))
    assert set(graph.recomputable) == {name for name, kind in expected.items() if kind in ("layer", "expert")}
    assert any(f"{DEPTH * EXPERTS} experts are loaded only where they are chosen" in note for note in graph.notes)


@pytest.mark.parametrize("kind", ["nllb", "switch"])
def test_experts_of_transformers(kind):
    """Their layers without experts stay whole; the list that a layer is in Switch is taken apart. They move their
    router to where it is in each forward, and name experts by numbers; the model is as it was.
    """
    model = make(kind)
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    kinds = kinds_of(analyzed(model, kind))
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    experts = {name for name, found in kinds.items() if found == "expert"}
    assert len(experts) == 8
    assert all(".experts.expert_" in name for name in experts)
    dense = "model.encoder.layers.0" if kind == "nllb" else "encoder.block.0"
    assert kinds[dense] == "layer"
    assert not any(name.startswith(dense + ".") for name in kinds)


def test_every_expert_is_called_in_order_where_there_are_tokens_enough():
    """And the sequence is that of a real step in which each expert gets some."""
    model, batch = make(), batch_of("routed", shape=(2, 24))
    graph = analyze(model, batch, loss=loss_of)
    modules = {a.module: modules_by_name(model)[a.module] for a in graph.accesses if a.module}
    seen = [(a.kind, a.module) for a in graph.accesses if a.module]
    assert seen == real_order(model, batch, modules, loss_of)


class Soft(Layer):
    """Every expert gets every token."""

    def forward(self, x):
        return x + sum(expert(self.between(x)) for expert in self.mlp.experts)


class Scaled(Layer):
    """Reads much of its own: were it taken apart, that would have to stay on the device."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.ones(1024, 48), requires_grad=False)

    def forward(self, x):
        return super().forward(x * self.table[: x.shape[1]])


class Unlike(Layer):
    """Nothing to choose from: its two parts are not alike."""

    def __init__(self):
        super().__init__()
        self.mlp.experts = nn.ModuleList([self.mlp.experts[0], nn.Linear(48, 48)])

    def forward(self, x):
        x = x + self.attention(self.before(x))
        best = self.mlp.router(x).topk(1).indices  # decides, but about other things
        return x + self.mlp.experts[1](self.mlp.experts[0](x)) * (best > 0)


@pytest.mark.parametrize("kind", [Soft, Scaled, Unlike])
def test_other_layers_stay_whole(kind):
    torch.manual_seed(0)
    model = Routed()
    model.layers = nn.ModuleList(kind() for _ in range(2))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name)
    graph = analyzed(model)
    assert [name for name, found in kinds_of(graph).items() if found == "layer"] == ["layers.0", "layers.1"]


@pytest.mark.quick("inside-other")
@pytest.mark.parametrize("checkpointing", ["inside-other", "around-reentrant"])
def test_parts_of_a_checkpointed_layer_are_read_twice_in_backward(checkpointing):
    """All but the last, which runs again just before its backward; and so they are in a real step."""
    model, batch = make(checkpointing=checkpointing), batch_of("routed", shape=(2, 24))
    graph = analyze(model, batch, loss=loss_of)
    backwards = Counter(a.module for a in graph.accesses if a.kind == "backward")
    assert {backwards[f"layers.1.mlp.experts.{index}"] for index in range(EXPERTS)} == {2}
    assert backwards["layers.1.mlp.shared"] == (2 if checkpointing == "inside-other" else 1)
    assert not any(block.pinned_because for block in graph.blocks)
    assert graph.recomputable == ()
    modules = {a.module: modules_by_name(model)[a.module] for a in graph.accesses if a.module}
    seen = [(a.kind, a.module) for a in graph.accesses if a.module]
    assert seen == real_order(model, batch, modules, loss_of)
