"""Reads of streamed weights by what asks no class: torch's C++, and functions that look at a tensor's memory."""

from __future__ import annotations

import io
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

from memplan.errors import RunError
from tests.run.test_direct_access import X
from tests.run.test_direct_access_corners import assert_alike, attached, step, whole

pytestmark = pytest.mark.filterwarnings("ignore")  # torch's own, of nested tensors and of torch.jit


class Own(torch.Tensor):
    """A class of tensors of a script's own."""


def unasked(act):
    """Return ``act`` with torch asking no class."""

    def read(weight):
        with torch._C.DisableTorchFunctionSubclass():
            return act(weight)

    return read


def put_into(weight):
    other = torch.zeros(1)
    other.data = weight
    return other


def multiply(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x @ weight + weight.sum()


def compiled_by_script(weight):
    scripted = torch.jit.script(multiply)
    return torch.stack([scripted(X, weight) for _ in range(3)])


def saved(weight):
    file = io.BytesIO()
    torch.save(weight, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def sent(weight):
    """Return it as another process gets it."""
    return ForkingPickler.loads(ForkingPickler.dumps(weight))


def into_out(weight):
    return torch.stack([weight, weight], out=torch.empty(2, *weight.shape))


def streamed(model):
    """Return the weights of a model that are away, or would be if they were not asked for."""
    return [linear.weight for linear in model.linears if type(linear.weight) is not nn.Parameter]


READS = {
    "new_tensor": lambda w: X.new_tensor(w),
    "Tensor": lambda w: torch.Tensor(w),
    "FloatTensor": lambda w: torch.FloatTensor(w),
    "as_subclass": lambda w: w.as_subclass(Own),
    "make_subclass": lambda w: torch.Tensor._make_subclass(Own, w),
    "nested": lambda w: torch.nested.nested_tensor([w]).unbind()[0],
    "as_nested": lambda w: torch.nested.as_nested_tensor([w, w]).unbind()[1],
    "script": compiled_by_script,
    "linear_unasked": unasked(lambda w: torch._C._nn.linear(X, w)),
    "product_unasked": unasked(lambda w: X @ w),
    "item_unasked": unasked(lambda w: torch.tensor(w[0, 0].item())),
    "detach_unasked": unasked(lambda w: w.detach()),
    "clone_unasked": unasked(lambda w: w.clone()),
    "numpy_unasked": unasked(lambda w: torch.from_numpy(w.numpy())),
    "copy_unasked": unasked(lambda w: torch.zeros(w.shape).copy_(w)),
    "out_unasked": unasked(into_out),
    "numpy": lambda w: torch.from_numpy(np.asarray(w)),
    "array": lambda w: torch.from_numpy(np.array(w)),
    "dlpack": lambda w: torch.from_dlpack(w).clone(),
    "numpy_dlpack": lambda w: torch.from_numpy(np.from_dlpack(w)).clone(),
    "to_dlpack": lambda w: torch.from_dlpack(torch.utils.dlpack.to_dlpack(w)).clone(),
    "save": saved,
    "out": into_out,
    "foreach": lambda w: torch._foreach_mul([w, X], 2.0)[0],
    "vector": lambda w: parameters_to_vector([w]),
    "functional_call": lambda w: functional_call(nn.Linear(*w.shape, bias=False), {"weight": w}, (X,)),
    "einsum": lambda w: torch.einsum("ij,kj->ik", X, w),
    "ops": lambda w: torch.ops.aten.mul.Tensor(w, 2.0),
}


@pytest.mark.parametrize("more_bytes", [0, 60_000])
@pytest.mark.parametrize("name", READS)
def test_reads(name, more_bytes, tmp_path):
    """Before any forward, after one whose backward is to come, and after that: values that stay what they are."""

    def act(model):
        read = READS[name]
        found = [read(linear.weight) for linear in model.linears]
        model(x=X).square().mean()
        found += [read(linear.weight) for linear in model.linears]
        found += step(model)
        found += [read(linear.weight) for linear in model.linears]
        return [*found, *step(model)]

    assert_alike(act, tmp_path, more_bytes)


REFUSED = {
    "data": (put_into, "give it weight.data"),
    "list_unasked": (unasked(lambda w: w.tolist()), r"weight\.detach\(\)"),
    "data_unasked": (unasked(lambda w: setattr(w, "data", torch.zeros_like(X))), "other tensor's place"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reads_that_are_refused(name, tmp_path):
    read, said = REFUSED[name]
    model, handle = attached(tmp_path, 60_000)
    with handle:
        for _ in range(2):
            weights = streamed(model)
            assert weights
            for weight in weights:
                with pytest.raises(RunError, match=said):
                    read(weight)
            model(x=X)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), whole().parameters(), strict=True))


def test_weights_are_sent_to_other_processes_by_value(tmp_path):
    model, handle = attached(tmp_path)
    with handle:
        for weight in streamed(model):
            assert torch.equal(sent(weight), weight.detach())


def test_a_mode_of_a_scripts_own_sees_true_values_or_an_error(tmp_path):
    """Torch does not let Python answer for a key of the dispatcher's while such a mode is entered: it raises."""

    class Mode(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    model, handle = attached(tmp_path)
    with handle:
        for weight in streamed(model):
            expected = X @ weight
            with Mode():
                assert torch.equal(X @ weight, expected)
                with pytest.raises(RuntimeError):
                    X.new_tensor(weight)
