"""Reads of streamed weights by what asks no class: torch's C++, and functions that look at a tensor's memory."""

from __future__ import annotations

import copy
import io
from multiprocessing.reduction import ForkingPickler

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.utils import parameters_to_vector
from torch.utils._python_dispatch import TorchDispatchMode

import memplan
from memplan.errors import ModelError, RunError
from memplan.run.attach import attach
from tests.run.test_direct_access import X, plan_of
from tests.run.test_direct_access_corners import assert_alike, attached, step, whole
from tests.run.test_parity import plan_for
from tests.support import families, inside, quantized
from tests.support.training import batch_of

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


@pytest.mark.quick("new_tensor-0", "FloatTensor-0", "array-0", "dlpack-0", "numpy_dlpack-0", "ops-0")
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


# ---- transforms ------------------------------------------------------------------------------------------------------


def trained(model):
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def loss_with(model, adapters, x=X):
    return functional_call(model, adapters, (), {"x": x}).square().mean()


def forward_derivative(model):
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(x=forward_ad.make_dual(X, X))).tangent


def mapped_gradient(model):
    for parameter in model.parameters():
        parameter.grad = None
    torch.vmap(lambda x: model(x=x[None]))(X).square().mean().backward()
    return model.adapters[0].weight.grad


TRANSFORMS = {
    "grad": lambda m: torch.func.grad(lambda p: loss_with(m, p))(trained(m)),
    "mapped_grad": lambda m: torch.vmap(torch.func.grad(lambda p, x: loss_with(m, p, x[None])), (None, 0))(
        trained(m), X
    ),
    "vjp": lambda m: torch.func.vjp(lambda x: m(x=x), X),
    "jvp": lambda m: torch.func.jvp(lambda x: m(x=x), (X,), (X,)),
    "jacrev": lambda m: torch.func.jacrev(lambda x: m(x=x).square().mean())(X),
    "jacfwd": lambda m: torch.func.jacfwd(lambda x: m(x=x).square().mean())(X),
    "hessian": lambda m: torch.func.hessian(lambda x: m(x=x).square().mean())(X),
}


@pytest.mark.quick("grad", "mapped_grad", "vjp", "jacrev", "jacfwd", "hessian")
@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_of_a_forward_are_refused(name, tmp_path):
    model, handle = attached(tmp_path)
    with handle:
        with pytest.raises(RunError, match=r"within torch\.func"):
            TRANSFORMS[name](model)
        found = step(model)
    assert all(torch.equal(one, other) for one, other in zip(found, step(whole()), strict=True))


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_forward_derivatives_are_right(activations, tmp_path):
    assert_alike(lambda model: [forward_derivative(model), *step(model)], tmp_path, activations=activations)


def test_a_mapped_forward_is_right_or_refused(tmp_path):
    assert_alike(lambda model: [mapped_gradient(model), *step(model)], tmp_path, activations="keep")
    model, handle = attached(tmp_path, activations="recompute")
    with handle:
        with pytest.raises(RunError, match=r"within torch\.vmap"):
            mapped_gradient(model)
        with torch.no_grad():
            found = torch.vmap(lambda x: model(x=x[None]))(X)
    other = whole()
    assert torch.equal(found, torch.vmap(lambda x: other(x=x[None]))(X))


# ---- what was taken before attach ------------------------------------------------------------------------------------

TOLD = "old memory still"


@pytest.mark.quick("<lambda>0")
@pytest.mark.parametrize(
    "take", [lambda m: m.state_dict(), lambda m: m.linears[0].weight.data, lambda m: m.linears[0].weight[3:5]]
)
def test_what_was_taken_before_attach_is_told_of(take, tmp_path, caplog):
    model = whole()
    plan, taken = plan_of(model), take(model)
    with memplan.attach(model, plan, cache=tmp_path):
        assert taken is not None
        assert caplog.text.count(TOLD) == 1
        assert "layers.0.0.weight" in caplog.text


def test_nothing_is_told_where_nothing_was_taken(tmp_path, caplog):
    model = whole()
    model.state_dict()
    optimizer = torch.optim.AdamW(model.adapters.parameters())
    step(model)
    optimizer.step()
    with memplan.attach(model, plan_of(model), cache=tmp_path):
        assert TOLD not in caplog.text


def share_a_buffer(model):
    model.register_buffer("first", model.linears[0].weight.data[:2])


def share_an_attribute(model):
    model.kept = [model.linears[0].weight.detach()]


def share_with_what_is_trained(model):
    model.adapters[0].weight.data = model.linears[0].weight.data


@pytest.mark.parametrize("share", [share_a_buffer, share_with_what_is_trained])
def test_memory_that_the_model_shares_with_a_frozen_weight_is_refused(share, tmp_path):
    model = whole()
    plan = plan_of(model)
    share(model)
    with pytest.raises(ModelError, match=r"memory of the frozen weight layers\.0\.0\.weight"):
        memplan.attach(model, plan, cache=tmp_path)
    step(model)


def test_memory_that_an_attribute_holds_is_told_of(tmp_path, caplog):
    model = whole()
    plan = plan_of(model)
    share_an_attribute(model)
    with memplan.attach(model, plan, cache=tmp_path):
        assert TOLD in caplog.text
        assert all(torch.equal(one, other) for one, other in zip(step(model), step(whole()), strict=True))


# ---- writes ----------------------------------------------------------------------------------------------------------


def test_a_state_dict_inside_materialise_has_what_was_written_there(tmp_path):
    def act(model):
        with memplan.materialise(model):
            for linear in model.linears:
                linear.weight.data = linear.weight.data * 2
                linear.bias.mul_(3)
            state = model.state_dict()
            found = [value.clone() for value in state.values()]
        found += step(model)
        for value in state.values():
            value.mul_(0.9)
        return [*found, *step(model), *(value.clone() for value in model.state_dict().values())]

    assert_alike(act, tmp_path)


@pytest.mark.each_value
@pytest.mark.parametrize("write", [lambda w: w.mul_(0.5), lambda w: w.data.mul_(0.5), lambda w: w.detach().zero_()])
@pytest.mark.parametrize("last", [2, 3])
def test_weights_that_are_given_the_same_data_stay_the_same(write, last, tmp_path):
    def act(model):
        one, other = model.linears[2], model.linears[3]
        one.weight.data = other.weight.data
        found = step(model)
        write(model.linears[last].weight)
        return [*found, *step(model), one.weight.detach().clone(), other.weight.detach().clone()]

    assert_alike(act, tmp_path)


def test_what_a_weight_was_given_is_written_to_later(tmp_path):
    def act(model):
        given = [torch.ones(linear.weight.shape) for linear in model.linears]
        for linear, data in zip(model.linears, given, strict=True):
            linear.weight.data = data
        found = step(model)
        for data in given:
            data.mul_(0.01)
        return [*found, *step(model)]

    assert_alike(act, tmp_path)


def halving(write):
    def act(model):
        for linear in model.linears:
            linear.register_full_backward_hook(lambda module, given, came: (write(module.weight), None)[1])
        return [*step(model), *step(model)]

    return act


@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_a_hook_of_the_backward_that_writes_to_data(activations, tmp_path):
    assert_alike(halving(lambda weight: weight.data.mul_(0.5)), tmp_path, activations=activations)


def test_a_hook_of_the_backward_that_writes(tmp_path):
    act = halving(lambda weight: weight.mul_(0.5))
    assert_alike(act, tmp_path, activations="keep")
    model, handle = attached(tmp_path, activations="recompute")
    with handle, pytest.raises(RunError, match="or in its backward by what reads them there"):
        act(model)


@pytest.mark.parametrize(
    "made",
    [
        lambda: torch.randn(64, 128)[:, ::2],
        lambda: torch.randn(1, 64).expand(64, 64),
        lambda: torch.randn(64, 70)[:, :64],
    ],
)
def test_weights_with_gaps_are_refused(made, tmp_path):
    model = whole()
    model.linears[1].weight = nn.Parameter(made(), requires_grad=False)
    plan = plan_of(model)
    with pytest.raises(ModelError, match=r"layers\.1\.0\.weight has gaps in its memory"):
        memplan.attach(model, plan, cache=tmp_path)
    model.linears[1].weight.data = model.linears[1].weight.data.contiguous()
    expected = step(model)
    with memplan.attach(model, plan, cache=tmp_path):
        assert all(torch.equal(one, other) for one, other in zip(step(model), expected, strict=True))


def test_int8_weights_that_are_given_other_data_are_refused(tmp_path):
    """[Trap] bitsandbytes goes on with what its module keeps of the old ones."""
    model = quantized.make("int8")
    with attach(model, plan_for(model, "llama", share=0.0), cache=tmp_path) as handle:
        model(**batch_of("llama"))
        names = {row.name for one in inside.streamed(handle) for row in one.rows}
        weights = [p for p in model.parameters() if p.dtype == torch.int8]
        assert names
        assert weights
        with pytest.raises(RunError, match="bitsandbytes computes with what its module keeps"):
            weights[0].data = weights[0].data * 2


def test_a_copy_of_a_layer_is_refused_with_what_peft_does_it_for(tmp_path):
    model, handle = attached(tmp_path)
    with handle, pytest.raises(RunError, match="modules_to_save"):
        copy.deepcopy(model)


def test_a_model_that_is_loaded_beside_is_as_ever(tmp_path):
    """Torch has a table of the functions that make tensors, which may be made while a model is under a plan."""
    from torch.utils import _device

    makers = {
        name: getattr(torch, name) for name in ("tensor", "as_tensor", "asarray", "empty", "zeros", "full", "arange")
    }
    expected = families.make("llama", "float32")
    model = whole()
    with memplan.attach(model, plan_of(model), cache=tmp_path):
        assert {name: getattr(torch, name) for name in makers} == makers
        _device._device_constructors.cache_clear()
        beside = families.make("llama", "float32")
    later = families.make("llama", "float32")
    for loaded in (beside, later):
        for (name, true), found in zip(expected.named_buffers(), loaded.buffers(), strict=True):
            assert torch.equal(true, found), name
