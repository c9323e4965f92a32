"""Weights that were never there: what stands for them is known as such in every shape."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import memplan
from memplan.run.memory.arena import Placeholders, is_placeholder
from memplan.trainers.loading.stored import checkpoint_of, put_placeholders
from tests.support.training import CPU

CPU_DEVICE = torch.device("cpu")


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (3,), (3, 1), (1, 3), (4, 3, 1, 1), (1, 1, 4, 1)])
def test_a_placeholder_is_known_by_itself(shape):
    made = Placeholders(CPU_DEVICE).of(shape, torch.float32)
    assert is_placeholder(made)
    assert is_placeholder(nn.Parameter(made, requires_grad=False))
    assert not is_placeholder(torch.zeros(shape))


def test_nothing_is_no_placeholder():
    assert not is_placeholder(torch.zeros(0, 3))


class Layer(nn.Module):
    """A convolution of one pixel and a gate of one number, which a stride cannot tell from a placeholder."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Conv2d(8, 8, 1).requires_grad_(False)
        self.gate = nn.Parameter(torch.randn(1), requires_grad=False)
        self.adapter = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        return x + self.gate * self.mix(x) + self.adapter(x)


def test_weights_of_one_element_come_from_the_checkpoint(tmp_path):
    torch.manual_seed(0)
    whole = nn.Sequential(*(Layer() for _ in range(6)))
    save_file(whole.state_dict(), tmp_path / "model.safetensors")
    x = torch.randn(2, 8, 4, 4)
    plan = memplan.plan(whole, x, vram="1MiB", ram="1MiB", hardware=CPU, loss=lambda y: y.square().mean(),
                        pins={"0": "host", "1": "host"})  # fmt: skip
    with torch.device("meta"):
        model = nn.Sequential(*(Layer() for _ in range(6)))
    put_placeholders(model, tmp_path, CPU_DEVICE)
    for parameter, other in zip(model.parameters(), whole.parameters(), strict=True):
        if parameter.requires_grad:
            parameter.data = other.data.clone()
    with memplan.attach(model, plan, checkpoint=checkpoint_of(model), checked=True):
        assert torch.equal(model(x), whole(x))
