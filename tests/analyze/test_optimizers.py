"""Optimizers' bytes, against the real ones: what they keep, and what lives for a moment of a step."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from bitsandbytes import optim as bnb
from transformers.optimization import Adafactor

from memplan.analyze.blocks.optimizers import check_optimizer, state_bytes, workspace_bytes
from memplan.errors import InputError
from memplan.model.live_storages import StorageLedger

MIXED = [(256, 64), (128, 512), (64,), (32, 7, 5), (100, 50)]
"""Two of them too small for 8 bits, the largest after the second largest."""
ONE = [(128, 512), (8,)]
"""A loop over the first needs more than a copy of all."""
ALIKE = [(16, 96), (96, 16)] * 4
TORCH = torch.optim


WAYS = {
    "adamw": {"loop": partial(TORCH.AdamW, foreach=False), "foreach": partial(TORCH.AdamW, foreach=True)},
    "adam": {"loop": partial(TORCH.Adam, foreach=False), "foreach": partial(TORCH.Adam, foreach=True)},
    "adamw_foreach": {"foreach": partial(TORCH.AdamW, foreach=True)},
    "adamw_torch_fused": {"fused": partial(TORCH.AdamW, fused=True)},
    "sgd": {"loop": partial(TORCH.SGD, foreach=False), "foreach": partial(TORCH.SGD, foreach=True)},
    "momentum": {
        "loop": partial(TORCH.SGD, momentum=0.9, foreach=False),
        "foreach": partial(TORCH.SGD, momentum=0.9, foreach=True),
    },
    "adagrad": {"loop": partial(TORCH.Adagrad, foreach=False), "foreach": partial(TORCH.Adagrad, foreach=True)},
    "rmsprop": {"loop": partial(TORCH.RMSprop, foreach=False), "foreach": partial(TORCH.RMSprop, foreach=True)},
    "adafactor_torch": {
        "loop": partial(TORCH.Adafactor, foreach=False),
        "foreach": partial(TORCH.Adafactor, foreach=True),
    },
    "adafactor": {"trainer": partial(Adafactor, scale_parameter=False, relative_step=False, lr=1e-3)},
    "adamw_8bit": {"bitsandbytes": partial(bnb.AdamW, optim_bits=8)},
    "paged_adamw_8bit": {"bitsandbytes": partial(bnb.AdamW, optim_bits=8, is_paged=True)},
    "paged_adamw_32bit": {"bitsandbytes": partial(bnb.AdamW, optim_bits=32, is_paged=True)},
    "ademamix": {"bitsandbytes": partial(bnb.AdEMAMix, optim_bits=32)},
    "ademamix_8bit": {"bitsandbytes": partial(bnb.AdEMAMix, optim_bits=8)},
    "lion_32bit": {"bitsandbytes": partial(bnb.Lion, optim_bits=32)},
    "lion_8bit": {"bitsandbytes": partial(bnb.Lion, optim_bits=8)},
    "paged_lion_8bit": {"bitsandbytes": partial(bnb.Lion, optim_bits=8, is_paged=True)},
    "rmsprop_bnb": {"bitsandbytes": partial(bnb.RMSprop, optim_bits=32)},
    "rmsprop_bnb_8bit": {"bitsandbytes": partial(bnb.RMSprop, optim_bits=8)},
}
"""How those that make it do so, by name: each way of torch's."""


def counted(make, shapes, dtype):
    """Return the bytes of the state, and those alive for a moment of the second step, by a count of live storages."""
    parameters = [torch.nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes]
    optimizer = make(parameters)
    for _ in range(2):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 0.01
        ledger = StorageLedger.of_training(torch.nn.ParameterList(parameters), optimizer)
        before = ledger.live_bytes
        with ledger:
            optimizer.step()
    state = {
        held.untyped_storage()._cdata: held.untyped_storage().nbytes()
        for values in optimizer.state.values()
        for held in values.values()
        if isinstance(held, torch.Tensor)
    }
    return sum(state.values()), ledger.peak_bytes - before


@pytest.mark.each_value
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shapes", [MIXED, ONE, ALIKE], ids=["mixed", "one", "alike"])
@pytest.mark.parametrize("name", WAYS)
def test_is_as_the_real_one(name, shapes, dtype):
    trained = [(shape, dtype.itemsize) for shape in shapes]
    found = [counted(make, shapes, dtype) for make in WAYS[name].values()]
    assert {state for state, _ in found} == {state_bytes(name, trained)}
    # A few scalars beside: of the norm of a parameter and of the step.
    most = max(moment for _, moment in found)
    assert most <= workspace_bytes(name, trained) + 64
    assert workspace_bytes(name, trained) <= most * 1.02 + 64


def test_names_of_one_optimizer():
    trained = [((4096, 16), 2)]
    for names in (
        ("adamw_8bit", "adamw_bnb_8bit"),
        ("adamw", "adamw_torch", "adamw_hf"),
        ("lion_32bit", "paged_lion_32bit"),
    ):
        assert len({(state_bytes(name, trained), workspace_bytes(name, trained)) for name in names}) == 1


def test_nothing_trained():
    assert state_bytes("adamw_8bit", []) == workspace_bytes("adamw", []) == 0


def test_an_unknown_one():
    with pytest.raises(InputError, match=r"'adma'.*adamw"):
        check_optimizer("adma")
