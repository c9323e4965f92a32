"""A layer's ``forward`` under a plan tells what it tells without, and what others put there stays theirs."""

from __future__ import annotations

import copy
import functools
import inspect
import io
import pickle
from types import MethodType

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import memplan
from memplan.errors import RunError
from tests.run.test_parity import plan_for
from tests.run.test_same_again import LAYERS, Layer, Model, compare, one, planned, train
from tests.support.training import make

POLICIES = ["recompute", "keep"]


def doubled(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs) * 2

    return call


class Scaled(Layer):
    """Decorated as transformers' layers are, with a default and a keyword of its own."""

    bias = 0.5

    @doubled
    def forward(self, hidden, scale=1.0, *, shift: float = 0.25):
        return super().forward(hidden, scale) + shift


LOOKS = {
    "code": lambda forward: forward.__code__,
    "names": lambda forward: forward.__code__.co_varnames,
    "func": lambda forward: forward.__func__,
    "self": lambda forward: forward.__self__,
    "defaults": lambda forward: (forward.__defaults__, forward.__kwdefaults__),
    "wrapped": lambda forward: forward.__wrapped__,
    "globals": lambda forward: id(forward.__globals__),
    "closure": lambda forward: forward.__closure__,
    "annotations": lambda forward: forward.__annotations__,
    "class": lambda forward: (forward.__class__, isinstance(forward, MethodType), inspect.ismethod(forward)),
    "specification": inspect.getfullargspec,
    "signature": inspect.signature,
    "source": inspect.getsource,
    "file": inspect.getsourcefile,
    "unwrapped": inspect.unwrap,
    "document": inspect.getdoc,
    "names of it": lambda forward: (forward.__name__, forward.__qualname__, forward.__module__, repr(forward)),
    "all that it has": dir,
    "copied": lambda forward: copy.copy(forward) == forward,
    "decorated": lambda forward: functools.wraps(forward)(lambda: None).__qualname__,
    "bound": lambda forward: inspect.signature(functools.partial(forward, scale=2.0)),
    "hash": hash,
    "equal": lambda forward: forward == forward.__self__.forward,
}


@pytest.mark.parametrize("activations", POLICIES)
def test_all_that_can_be_looked_at_is_the_layers_own(activations):
    model = Model(Scaled)
    method = model.layers[1].forward
    expected = {name: look(method) for name, look in LOOKS.items()}
    with memplan.attach(model, planned(model, activations), checked=activations == "keep"):
        assert "forward" in vars(model.layers[1])
        found = {name: look(model.layers[1].forward) for name, look in LOOKS.items()}
        assert model.layers[1].forward == method
        assert method == model.layers[1].forward
        with pytest.raises(AttributeError):  # as of any method
            model.layers[1].forward.mark = 1
    assert found == expected
    assert not any("forward" in vars(module) for module in model.modules())


class Chooses(Model):
    """Gives a layer the keywords that its code has names for."""

    def call(self, layer, hidden, number):
        known = layer.forward.__code__.co_varnames, inspect.getfullargspec(layer.forward).args
        given = {name: 1.5 for name in ("scale", "other") if all(name in names for names in known)}
        if layer.forward.__func__ is not type(layer).forward or not inspect.ismethod(layer.forward):
            return hidden
        return layer(hidden, **given)


def test_it_is_so_where_activations_are_offloaded(tmp_path):
    model = make("llama")
    layer = model.base_model.model.model.layers[1]
    names, function = layer.forward.__code__.co_varnames, layer.forward.__func__
    with memplan.attach(model, plan_for(model, "llama", offload="all"), cache=tmp_path):
        assert "forward" in vars(layer)
        assert layer.forward.__code__.co_varnames == names
        assert layer.forward.__func__ is function


@pytest.mark.parametrize("activations", POLICIES)
def test_a_script_that_chooses_keywords_by_them_trains_the_same(activations):
    expected = train(Chooses(), one)
    model = Chooses()
    with memplan.attach(model, planned(model, activations), checked=activations == "keep"):
        found = train(model, one)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    plain = train(Model(), one)
    assert not all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def wrap_function(layer):
    """As accelerate wraps a model's forward for autocast."""
    layer.forward = MethodType(doubled(layer.forward.__func__), layer)


def wrap_method(layer):
    method = layer.forward
    layer.forward = lambda *args, **kwargs: method(*args, **kwargs) * 2


class Doubles(ModelHook):
    def post_forward(self, module, output):
        return output * 2


WRAPS = {
    "function": wrap_function,
    "method": wrap_method,
    "accelerate": lambda layer: add_hook_to_module(layer, Doubles()),  # before attach it is refused
}


@pytest.mark.parametrize("activations", POLICIES)
@pytest.mark.parametrize(
    ("way", "since"),
    [*((way, "while attached") for way in WRAPS), ("function", "before"), ("method", "before")],
)
def test_what_others_put_around_a_forward_stays(way, since, activations):
    whole, model = Model(), Model()
    for layer in whole.layers:
        WRAPS[way](layer)
    expected = train(whole, one)
    plan = planned(model, activations)
    put = [functools.partial(WRAPS[way], layer) for layer in model.layers]
    if since == "before":
        [each() for each in put]
    with memplan.attach(model, plan, checked=activations == "keep"):
        if since != "before":
            [each() for each in put]
        found = train(model, one)
    later = train(model, one)
    for values in (found, later):
        assert all(torch.equal(a, b) for a, b in zip(expected, values, strict=True))


def test_what_others_take_off_while_attached_does_not_come_back():
    model = Model()
    for layer in model.layers:
        wrap_method(layer)
    plain = train(Model(), one)
    with memplan.attach(model, planned(model)):
        for layer in model.layers:
            layer.forward = MethodType(Layer.forward, layer)
        found = train(model, one)
    for values in (found, train(model, one)):
        assert all(torch.equal(a, b) for a, b in zip(plain, values, strict=True))


def test_accelerate_takes_its_own_off_again():
    model = Model()
    plain = train(Model(), one)
    with memplan.attach(model, planned(model)):
        for layer in model.layers:
            add_hook_to_module(layer, Doubles())
            remove_hook_from_module(layer)
        found = train(model, one)
    assert not any("forward" in vars(module) for module in model.modules())
    for values in (found, train(model, one)):
        assert all(torch.equal(a, b) for a, b in zip(plain, values, strict=True))


def test_a_forward_that_was_taken_while_attached_is_the_layers_afterwards():
    model, x = Model(), torch.randn(3, 16)
    expected = model.layers[0](x)
    with memplan.attach(model, planned(model)):
        forward = model.layers[0].forward
        direct = forward(x)
    assert torch.equal(direct, expected)
    assert torch.equal(forward(x), expected)


class Factor(Layer):
    factor = 1.0

    def forward(self, hidden):
        return super().forward(hidden) * self.factor


class Mixed(Model):
    """Of one layer nothing is frozen: it may be copied under a plan."""

    def __init__(self):
        super().__init__(Factor)
        self.layers[1].requires_grad_(True)


def saved(layer):
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "copy": copy.copy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
    "save": saved,
}


@pytest.mark.parametrize("way", COPIES)
def test_a_copy_of_a_layer_computes_by_itself_or_is_refused(way):
    x = torch.randn(3, 16)

    def act(model):
        found = train(model, one, passes=1)
        made = COPIES[way](model.layers[1])
        made.factor = 3.0
        if way != "copy":
            with torch.no_grad():
                made.down.weight.mul_(2)
        out = made(x)
        out.sum().backward()
        found += [out.detach(), *(p.grad for p in made.parameters() if p.grad is not None)]
        made.zero_grad()
        assert not made._forward_hooks
        assert not made._forward_pre_hooks
        return [*found, *train(model, one, passes=1)]

    expected = act(Mixed())
    model = Mixed()
    pins = {f"layers.{index}": "host" for index in range(LAYERS) if index != 1}
    with memplan.attach(model, planned(model, pins=pins)):
        with pytest.raises(RunError, match="copied or pickled"):
            COPIES[way](model.layers[0])
        found = act(model)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_torch_compile_of_what_calls_no_layer_is_as_ever():
    compare(Model, lambda model, batch: one(model, torch.compile(lambda x: x * 2, backend="eager")(batch)))
