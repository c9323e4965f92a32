"""Kinds of adapters on plain modules: planned, attached and trained as without a plan."""

from __future__ import annotations

import warnings

import pytest
import torch
from peft import BOFTConfig, LoraConfig, ShiraConfig, get_peft_model
from torch import nn

import memplan
from tests.support.training import CPU

WIDTH, STEPS = 64, 3


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x):
        x = x + self.attention(x, x, x)[0]
        return x + self.down(torch.relu(self.up(x)))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(4))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


KINDS = {
    "attention": lambda: LoraConfig(r=4, target_modules=["attention"], init_lora_weights=False),
    "attention-and-linear": lambda: LoraConfig(r=4, target_modules=["attention", "up"], init_lora_weights=False),
    "shira": lambda: ShiraConfig(r=2, target_modules=["up", "down"], random_seed=1, init_weights=False),
    "boft": lambda: BOFTConfig(boft_block_size=8, boft_dropout=0.1, target_modules=["up", "down"], init_weights=False),
}


def make(kind):
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # BOFT looks for a compiler
        return get_peft_model(Model(), KINDS[kind]()).train()


def loss(output):
    return output.square().mean()


def train(model):
    torch.manual_seed(2)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.001)
    losses = []
    for _ in range(STEPS):
        value = loss(model(x=torch.rand(3, 8, WIDTH)))
        value.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(value.item())
    return losses


@pytest.mark.quick("attention", "attention-and-linear", "shira")
@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", KINDS)
def test_the_least_vram(kind):
    given = {"ram": "64MiB", "hardware": CPU, "gains": False, "loss": loss}
    whole, model, batch = make(kind), make(kind), {"x": torch.rand(3, 8, WIDTH)}
    with pytest.raises(memplan.DoesNotFitError) as caught:
        memplan.plan(model, batch, vram="1KiB", **given)
    plan = memplan.plan(model, batch, vram=caught.value.least_vram_bytes, **given)
    assert any(item.home == "host" for item in plan.items)
    expected = train(whole)
    with memplan.attach(model, plan):
        assert train(model) == expected
    assert all(value == value for value in expected)
    one, other = model.state_dict(), whole.state_dict()
    assert all(torch.equal(one[name], value) for name, value in other.items())


def test_parameters_that_lora_replaces_are_the_same_ones_after_planning():
    model = make("attention")
    base = model.base_model.model.layers[0].attention.base_layer
    held = base.in_proj_weight, base.out_proj.base_layer.weight
    plan = memplan.plan(
        model, {"x": torch.rand(3, 8, WIDTH)}, vram="1GiB", ram="1GiB", hardware=CPU, loss=loss, gains=False
    )
    assert base.in_proj_weight is held[0]
    assert base.out_proj.base_layer.weight is held[1]
    assert not [t.name for block in plan.table.blocks for t in block.tensors if "attention" in t.name]
    replaced = sum(p.nbytes for p in (*held, base.in_proj_bias, base.out_proj.base_layer.bias))
    lora = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert {row.kind: row.size_bytes for row in plan.table.fixed}["adapters"] == 4 * replaced + lora
