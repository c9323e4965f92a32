"""Models of which nothing is trained, under a plan in checked mode: what is trained beside them, and gradients of what
goes in.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.errors import DoesNotFitError
from memplan.model.calls import Call, Step
from tests.support.training import CPU, make

IDS = torch.arange(32).view(2, 16)


def plan_of(model, batch):
    options = {"ram": "64MiB", "hardware": CPU, "gains": False, "pins": {"head": "host"}}
    try:
        return memplan.plan(model, batch, vram=1, **options)
    except DoesNotFitError as error:
        return memplan.plan(model, batch, vram=error.least_vram_bytes, **options)


def beside(model):
    """A network that takes over the forwards of some layers."""
    torch.manual_seed(1)
    sides = nn.ModuleList(nn.Linear(48, 48, bias=False) for _ in range(3))
    for layer, side in zip(model.layers[1:4], sides, strict=True):
        layer.forward = lambda x, before=layer.forward, side=side: before(x) + side(x) * 0.1
    return list(sides.parameters()), lambda: model(IDS).square().mean(), IDS


def before(model):
    """What goes in is trained, and enters by layers within."""
    hidden = nn.Parameter(torch.randn(2, 16, 48, generator=torch.Generator().manual_seed(1)))

    def loss():
        x = hidden * 1.0
        for layer in model.layers:
            x = layer(x)
        return (x @ model.head.weight.T).square().mean()

    call = Call.of("layers.0", (hidden,), {})
    return [hidden], loss, Step(calls=(call,), reads_rest=True)


def trained(way, *, planned):
    model = make("plain").requires_grad_(False)
    parameters, loss, batch = way(model)
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    handle = memplan.attach(model, plan_of(model, batch), checked=True) if planned else None
    losses = []
    for _ in range(4):
        value = loss()
        value.backward()
        optimizer.step()
        losses.append((value.item(), [parameter.grad.clone() for parameter in parameters]))
        optimizer.zero_grad()
    if handle is not None:
        assert handle.record.loaded_bytes > 0
        assert handle.read_directly() == (("head",) if way is before else ())
        handle.detach()
    return losses, parameters


@pytest.mark.parametrize("way", [beside, before])
def test_gradients_are_the_same(way):
    (whole, one), (run, other) = trained(way, planned=False), trained(way, planned=True)
    assert [value for value, _ in run] == [value for value, _ in whole]
    for (_, gradients), (_, wanted) in zip(run, whole, strict=True):
        assert all(map(torch.equal, gradients, wanted))
    assert all(map(torch.equal, one, other))
