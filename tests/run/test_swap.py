"""``torch.utils.swap_tensors`` on frozen weights while they are streamed: as without a plan, or refused by memplan."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import memplan
from memplan.errors import RunError
from tests.run.test_same_again import Model, one, planned, train


def other(model):
    values = torch.randn(48, 16, generator=torch.Generator().manual_seed(5))
    return nn.Parameter(values, requires_grad=False)


def swap(model):
    weight, given = model.layers[1].up.weight, other(model)
    torch.utils.swap_tensors(weight, given)
    return [weight, given]


def swap_two_of_the_model(model):
    weights = [model.layers[index].up.weight for index in (1, 2)]
    torch.utils.swap_tensors(*weights)
    return weights


def swap_second(model):
    weight, given = model.layers[1].up.weight, other(model)
    torch.utils.swap_tensors(given, weight)
    given.mul_(2)
    return [weight, given]


def swap_there_and_back(model):
    weight, given = model.layers[1].up.weight, other(model)
    for _ in range(2):
        torch.utils.swap_tensors(weight, given)
        weight.mul_(2)
    return [weight, given]


def swap_with_itself(model):
    weight = model.layers[1].up.weight
    torch.utils.swap_tensors(weight, weight)
    return [weight]


def swap_others(model):
    made = [torch.ones(2), torch.zeros(3)]
    torch.utils.swap_tensors(*made)
    return made


@pytest.mark.parametrize(
    "act", [swap, swap_two_of_the_model, swap_second, swap_there_and_back, swap_with_itself, swap_others]
)
def test_values_are_exchanged(act):
    def run(model):
        found = train(model, one, passes=1)
        with torch.no_grad():
            held = act(model)
        return [*found, *train(model, one), *(tensor.detach().clone() for tensor in held)], held

    expected, _ = run(Model())
    model = Model()
    with memplan.attach(model, planned(model)):
        found, held = run(model)
    after = [tensor.detach().clone() for tensor in held]
    for values in (found, [*found[: -len(after)], *after]):
        assert all(torch.equal(a, b) for a, b in zip(expected, values, strict=True))


@pytest.mark.parametrize(
    "given",
    [
        lambda: torch.ones(48, 16),
        lambda: nn.Parameter(torch.ones(48, 16)),
        lambda: nn.Parameter(torch.ones(16, 48), requires_grad=False),
        lambda: nn.Parameter(torch.ones(48, 16).double(), requires_grad=False),
    ],
)
def test_what_is_of_another_kind_is_refused(given):
    model = Model()
    with memplan.attach(model, planned(model)):
        expected = train(model, one)
        with pytest.raises(RunError, match="swap_tensors was given a frozen weight"):
            torch.utils.swap_tensors(model.layers[1].up.weight, given())
        assert all(torch.equal(a, b) for a, b in zip(expected, train(model, one), strict=True))


def test_what_a_graph_has_saved_is_refused():
    model = Model()
    with memplan.attach(model, planned(model, activations="keep")):
        loss = model(torch.ones(3, 8))
        with pytest.raises(RunError, match="one that a graph has saved"):
            swap(model)
        loss.backward()
