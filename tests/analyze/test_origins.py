"""What is made of frozen weights alone is found in a trace, and counted where it outlives the access that made it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

import memplan
from memplan.analyze.trace.trace import analyze
from memplan.cost.build import cost_table
from tests.support import families
from tests.support.training import CPU, batch_of

WIDTH = 64


class Layer(nn.Module):
    """One trained scale, one frozen matrix, and a way to derive from it what the product reads."""

    def __init__(self, derive):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH), requires_grad=False)
        self.a = nn.Parameter(torch.randn(WIDTH, 2))
        self.b = nn.Parameter(torch.randn(2, WIDTH))
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("table", torch.ones(WIDTH))
        self.derive = derive

    def forward(self, x):
        weight = self.derive(self, x)
        return (x * self.scale).to(weight.dtype) @ weight


class Stack(nn.Module):
    def __init__(self, derive):
        super().__init__()
        self.layers = nn.ModuleList(Layer(derive) for _ in range(3))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x).float()
        return x


def into_a_new(layer, x):
    made = torch.empty(WIDTH, WIDTH)
    made.copy_(layer.weight)
    return made


DERIVED = {
    "cast": (lambda layer, x: layer.weight.to(torch.bfloat16), 2),
    "merged": (lambda layer, x: layer.weight + layer.a @ layer.b, 4),
    "scaled by a buffer": (lambda layer, x: layer.weight * layer.table, 4),
    "transposed": (lambda layer, x: layer.weight.t().contiguous(), 4),
    "written to what was empty": (into_a_new, 4),
    "twice over": (lambda layer, x: (layer.weight.double() * 2).float(), 4),
}
NOT_DERIVED = {
    "the weight": lambda layer, x: layer.weight,
    "a view": lambda layer, x: layer.weight.t()[:, :],
    "of the batch too": lambda layer, x: layer.weight * x.mean(),
    "of what is trained alone": lambda layer, x: layer.a @ layer.b,
    "rows": lambda layer, x: layer.weight[torch.arange(WIDTH)],
    "its shape": lambda layer, x: torch.ones_like(layer.weight),
}


def weight_copy_bytes(model, batch):
    graph = analyze(model, batch)
    rows = cost_table(graph, CPU).accesses
    assert all(row.weight_copy_bytes == 0 for row in rows if row.kind != "forward")
    return [row.weight_copy_bytes for row in rows if row.kind == "forward"], graph.notes


@pytest.mark.parametrize("name", DERIVED)
def test_derived(name):
    derive, element_bytes = DERIVED[name]
    found, _ = weight_copy_bytes(Stack(derive), torch.randn(5, WIDTH, requires_grad=True))
    assert found == [element_bytes * WIDTH * WIDTH] * 3


@pytest.mark.parametrize("name", NOT_DERIVED)
def test_not_derived(name):
    found, notes = weight_copy_bytes(Stack(NOT_DERIVED[name]), torch.randn(5, WIDTH, requires_grad=True))
    assert found == [0] * 3
    assert not any("copies" in note for note in notes)


def test_what_ends_within_its_access_is_not_counted():
    found, _ = weight_copy_bytes(
        Stack(lambda layer, x: layer.weight + 0 * layer.weight.to(torch.bfloat16).sum()),
        torch.randn(5, WIDTH, requires_grad=True),
    )
    assert found == [4 * WIDTH * WIDTH] * 3


@pytest.mark.full
def test_casts_of_a_layer_under_autocast_are_its_matrices_in_half():
    """The caller's autocast and the same by name. The norms are not cast."""
    model, batch = families.make("llama", "autocast"), batch_of("llama")
    with torch.autocast("cpu", torch.bfloat16):
        within = analyze(model, batch)
    assert within == analyze(model, batch, autocast="bf16")
    # What autocast keeps for a second use (casts of the adapter) goes when it is left: only the loss outlives the
    # backward.
    last = len(within.accesses) - 1
    assert sum(life.size_bytes for life in within.lifetimes if life.kind == "activations" and life.last == last) == 4
    layer = next(block for block in within.blocks if block.name == "model.layers.1")
    matrices = [tensor.size_bytes for tensor in layer.tensors if len(tensor.shape) == 2]
    access = next(a for a in within.accesses if a.kind == "forward" and a.module == layer.name)
    assert access.weight_copy_bytes == sum(matrices) // 2
    total = sum(a.weight_copy_bytes for a in within.accesses)
    (note,) = [note for note in within.notes if "copies of frozen weights" in note]
    assert f"{total / 1024:.1f} KiB" in note
    assert "casts to bfloat16" in note
    assert "load the base in bfloat16" in note


@pytest.mark.full
def test_a_plan_from_a_configuration_knows_the_autocast_that_it_is_made_in():
    config = LlamaConfig(
        hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, vocab_size=96, use_cache=False
    )  # fmt: skip
    options = {"adapter": {"rank": 4}, "dtype": "fp32", "vram": "1GiB", "ram": "1GiB", "hardware": CPU}
    with torch.autocast("cpu", torch.bfloat16):
        within = memplan.plan(config, (2, 16), **options)
        assert torch.is_autocast_enabled("cpu")
    assert within == memplan.plan(config, (2, 16), autocast="bf16", **options)
    assert any(row.weight_copy_bytes for row in within.table.accesses)


def test_merged_experts():
    """An adapter on fused experts: each merged matrix is saved, since the product's other side wants a gradient."""
    graph = analyze(families.make("mixtral-experts", "float32"), batch_of("llama"))
    layer = next(block for block in graph.blocks if block.name == "model.layers.1")
    experts = [tensor.size_bytes for tensor in layer.tensors if "experts" in tensor.name]
    access = next(a for a in graph.accesses if a.kind == "forward" and a.module == layer.name)
    assert access.weight_copy_bytes == sum(experts)
    assert not any("load the base" in note for note in graph.notes)


def test_where_the_model_checkpoints_itself_no_copies_live_on():
    model = families.make("llama", "autocast", "inside-other")
    graph = analyze(model, batch_of("llama"), autocast="bf16")
    assert not any(a.weight_copy_bytes for a in graph.accesses if a.module.startswith("model.layers"))
