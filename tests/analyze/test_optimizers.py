"""Optimizers' bytes, against torch's own where it has them."""

from __future__ import annotations

import pytest
import torch

from memplan.analyze.optimizers import check_optimizer, state_bytes, workspace_bytes
from memplan.errors import InputError

SHAPES = [(64, 32), (32,), (3, 4, 5)]
TRAINED = [(shape, 4) for shape in SHAPES]


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("adamw", torch.optim.AdamW),
        ("adam", torch.optim.Adam),
        ("sgd", torch.optim.SGD),
        ("momentum", lambda parameters: torch.optim.SGD(parameters, momentum=0.9)),
        ("adafactor", torch.optim.Adafactor),
    ],
)
def test_state(name, make):
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
    optimizer = make(parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    tensors = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, torch.Tensor)]
    assert state_bytes(name, TRAINED) == sum(v.numel() * v.element_size() for v in tensors)


def test_eight_bits():
    assert state_bytes("adamw_8bit", [((4096, 16), 2)]) == 2 * (65536 + 4 * 256)
    assert state_bytes("adamw_8bit", [((8, 16), 4)]) == 8 * 128  # small ones stay in float32


def test_workspace():
    assert workspace_bytes("adamw", TRAINED) == 2 * 64 * 32 * 4
    assert workspace_bytes("adamw", [((8,), 4)] * 5) == 5 * 8 * 4
    assert workspace_bytes("adamw_torch_fused", TRAINED) == 0


def test_an_unknown_one():
    with pytest.raises(InputError, match=r"'adma'.*adamw"):
        check_optimizer("adma")
