"""Hooks that came after the plan, within layers that it recomputes: called once, as without a plan, or refused."""

from __future__ import annotations

import collections

import pytest
import torch
from torch import nn
from torch.nn.modules import module as torchs

import memplan
from memplan.errors import RunError
from tests.support.training import CPU

WIDTH, ROWS, LAYERS, STEPS = 64, 512, 4, 3
GIVEN = {"ram": "64MiB", "hardware": CPU, "gains": False, "activations": "recompute"}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh(), nn.Linear(2 * WIDTH, WIDTH)
        for linear in (self.up, self.down):
            linear.requires_grad_(False)
        self.lora = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        return x + self.down(self.act(self.up(x))).sin() + 0.1 * self.lora(x)


class Model(nn.Module):
    def __init__(self, kind=Layer):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(WIDTH, WIDTH, bias=False)
        self.layers = nn.ModuleList(kind() for _ in range(LAYERS))

    def forward(self, x, **more):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x, **more)
        return x


def loss(output):
    return output.square().mean()


def train(model, each=lambda model, step: None, **more):
    """Return every loss and every gradient."""
    torch.manual_seed(4)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    found = []
    for step in range(STEPS):
        value = loss(model(x=torch.rand(ROWS, WIDTH), **more))
        each(model, step)
        value.backward()
        found += [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step(), optimizer.zero_grad()
    return found


def planned(model, vram=None):
    batch = {"x": torch.rand(ROWS, WIDTH)}
    if vram is None:
        with pytest.raises(memplan.DoesNotFitError) as caught:
            memplan.plan(model, batch, loss=loss, vram="1KiB", **GIVEN)
        vram = caught.value.least_vram_bytes
    plan = memplan.plan(model, batch, loss=loss, vram=vram, **GIVEN)
    assert {*plan.policies().values()} == {"recompute"}
    return plan


def assert_alike(late, kind=Layer, *, before=False, vram=None, each=lambda model, step: None, checked=False):
    """``late(model)`` changes a model, and returns what holds what came of that. ``before``: between plan and
    attach.
    """
    whole, model = Model(kind), Model(kind)
    kept = late(whole)
    expected = train(whole, each)
    plan = planned(model, vram)
    if before:
        held = late(model)
    with memplan.attach(model, plan, checked=checked):
        if not before:
            held = late(model)
        found = train(model, each)
    assert len(found) == len(expected)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert repr(held) == repr(kept)
    for one, other in zip(model.modules(), whole.modules(), strict=True):
        plain = [{n: v for n, v in m.__dict__.items() if isinstance(v, (int, float, list, dict))} for m in (one, other)]
        for name in ("_parameters", "_forward_hooks", "_forward_pre_hooks"):
            plain[0].pop(name, None), plain[1].pop(name, None)
        assert len(one._forward_hooks) == len(other._forward_hooks)
        assert repr({n: v for n, v in plain[0].items() if "hooks" not in n and not n.startswith("_")}) == repr(
            {n: v for n, v in plain[1].items() if "hooks" not in n and not n.startswith("_")}
        )


def inside(model, *names):
    """Modules in the layers, or the layers themselves."""
    for layer in model.layers:
        for name in names or ("up", "act", "down", "lora"):
            yield getattr(layer, name) if name else layer


# ---- hooks that nothing comes of
# ---------------------------------------------------------------------------------------


def counts(model):
    seen = collections.Counter()
    for module in inside(model, "", "up", "act", "down", "lora"):
        kind = type(module).__name__

        def pre(module, args, kwargs, kind=kind):
            seen[kind + " begins"] += 1

        def post(module, args, output, kind=kind):
            seen[kind] += 1

        module.register_forward_pre_hook(pre, with_kwargs=True)
        module.register_forward_hook(post, prepend=True)
    return seen


def averages(model):
    average = torch.zeros(2 * WIDTH)
    for module in inside(model, "act"):
        module.register_forward_hook(
            lambda module, args, output: (average.lerp_(output.detach().mean(0), 0.1), None)[1]
        )
    return average


def logs_and_returns_what_it_was_given(model):
    log = []
    for module in inside(model):
        module.register_forward_pre_hook(lambda module, args: (log.append(len(args)), args)[1])
        module.register_forward_hook(lambda module, args, output: (log.append(output.mean().item()), output)[1])
    return log


class Statistics:
    def __init__(self):
        self.calls, self.largest = 0, 0.0

    def hook(self, module, args, output):
        self.calls += 1
        self.largest = max(self.largest, output.abs().max().item())

    def __repr__(self):
        return f"{self.calls} {self.largest}"


def bound_methods(model):
    held = Statistics()
    for module in inside(model):
        module.register_forward_hook(held.hook, always_call=True)
    return held


def cells(model):
    calls = 0

    def hook(module, args, output):
        nonlocal calls
        calls += 1

    for module in inside(model):
        module.register_forward_hook(hook)
    return _Cell(hook)


class _Cell:
    def __init__(self, function):
        self.function = function

    def __repr__(self):
        return repr(self.function.__closure__[0].cell_contents)


def one_shot_count(model):
    seen = []

    def hook(module, args, output):
        seen.append(1)
        handles.pop(id(module)).remove()

    handles = {id(module): module.register_forward_hook(hook) for module in inside(model)}
    return seen


def attributes(model):
    """Of the module itself: those are put back after the second run."""

    def hook(module, args, output):
        module.calls = getattr(module, "calls", 0) + 1
        module.scale = 1 + module.calls
        return output * module.scale

    for module in inside(model, "act"):
        module.register_forward_hook(hook)
    return None


def sums_that_autograd_saves_for(model):
    """Of a graph that goes at once, and of one that stays."""
    sums = []
    for module in inside(model, "act"):
        module.register_forward_hook(lambda module, args, output: sums.append(output.exp().pow(2).mean()))
    return sums


def backward_hooks(model):
    seen = []
    for module in inside(model, "", "up", "act", "lora"):
        module.register_full_backward_hook(lambda module, given, gradients: seen.append("after"))
        module.register_full_backward_pre_hook(lambda module, gradients: seen.append("before"))
    return seen


ONCE = [
    counts,
    averages,
    logs_and_returns_what_it_was_given,
    bound_methods,
    cells,
    one_shot_count,
    attributes,
    backward_hooks,
    sums_that_autograd_saves_for,
]


@pytest.mark.each_value
@pytest.mark.parametrize("before", [False, True], ids=["attached", "before"])
@pytest.mark.parametrize("late", ONCE, ids=lambda late: late.__name__)
def test_they_are_called_once(late, before):
    assert_alike(late, before=before)


def test_what_a_hook_keeps_is_part_of_the_loss():
    def run(model):
        kept, found = [], []
        for module in inside(model, "act"):
            module.register_forward_hook(lambda module, args, output: kept.append(output.exp().mean()))
            module.register_forward_hook(lambda module, args, output: output * output.sigmoid())
        for _ in range(STEPS):
            torch.manual_seed(1)
            value = loss(model(x=torch.rand(ROWS, WIDTH))) + 0.1 * sum(kept)
            kept.clear()
            model.zero_grad()
            value.backward()
            found += [value.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        return found

    expected, model = run(Model()), Model()
    with memplan.attach(model, planned(model)):
        found = run(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_pinned_layers():
    assert_alike(counts, vram="1GiB")


def test_global_hooks():
    def run(model):
        seen = collections.Counter()
        handles = [
            torchs.register_module_forward_hook(lambda module, args, output: seen.update([type(module).__name__])),
            torchs.register_module_forward_pre_hook(lambda module, args: seen.update(["before"])),
        ]
        try:
            return train(model), seen
        finally:
            for handle in handles:
                handle.remove()

    expected, once = run(Model())
    model = Model()
    with memplan.attach(model, planned(model)):
        found, counted = run(model)
    assert counted == once
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


# ---- hooks that the layer computes with
# --------------------------------------------------------------------------------


def returns_a_value(model):
    for module in inside(model, "act", "lora"):
        module.register_forward_hook(lambda module, args, output: output * 1.5)
        module.register_forward_pre_hook(lambda module, args, kwargs: ((args[0] + 1,), kwargs), with_kwargs=True)


def writes_in_place(model):
    for module in inside(model, "up"):
        module.register_forward_hook(lambda module, args, output: (output.mul_(0.5), None)[1])


def writes_by_data(model):
    for module in inside(model, "up"):
        module.register_forward_hook(lambda module, args, output: (output.data.mul_(0.5), None)[1])


def one_shot_value(model):
    def hook(module, args, output):
        handles[id(module)].remove()
        return output * 2

    handles = {id(module): module.register_forward_hook(hook) for module in inside(model, "act")}


def sets_what_the_forward_reads(model):
    def hook(module, args):
        module.weight_scale = args[0].detach().mean()
        return args

    for module in inside(model, "lora"):
        module.register_forward_pre_hook(hook)
        module.register_forward_hook(lambda module, args, output: output * module.weight_scale)


def scales_by_what_it_finds(model):
    for module in inside(model, "act", "lora"):
        module.register_forward_hook(lambda module, args, output: output * output.sigmoid().mean() + output.tanh())


AGAIN = [
    scales_by_what_it_finds,
    returns_a_value,
    writes_in_place,
    writes_by_data,
    one_shot_value,
    sets_what_the_forward_reads,
]


@pytest.mark.parametrize("late", AGAIN, ids=lambda late: late.__name__)
def test_the_second_run_has_what_they_do(late):
    assert_alike(late)


@pytest.mark.quick(
    "scales_by_what_it_finds",
    "returns_a_value",
    "writes_in_place",
    "writes_by_data",
    "sets_what_the_forward_reads",
    "counts",
    "sums_that_autograd_saves_for",
)
@pytest.mark.parametrize("late", [*AGAIN, counts, sums_that_autograd_saves_for], ids=lambda late: late.__name__)
def test_in_the_checked_mode(late):
    assert_alike(late, checked=True)


def test_hooks_that_are_gone_by_the_backward():
    """As PEFT's, which registers some for the time of one forward."""

    def late(model):
        def before(module, args):
            for part in inside(model, "act"):
                handles.append(part.register_forward_hook(lambda module, args, output: output * 3))

        def after(module, args, output):
            while handles:
                handles.pop().remove()

        handles = []
        model.register_forward_pre_hook(before)
        model.register_forward_hook(after)

    assert_alike(late)


def test_hooks_that_come_before_the_backward():
    def each(model, step):
        for module in inside(model, "act"):
            module.register_forward_hook(lambda module, args, output: output * 1.1)

    assert_alike(lambda model: None, each=each)


# ---- what is refused
# ---------------------------------------------------------------------------------------------------


def value_and_count(model):
    seen = []
    for module in inside(model, "act"):
        module.register_forward_hook(lambda module, args, output: (seen.append(1), output * 2)[1])


def value_and_average(model):
    average = torch.zeros(())
    for module in inside(model, "act"):
        module.register_forward_hook(lambda module, args, output: output - average.lerp_(output.detach().mean(), 0.1))


def value_and_cell(model):
    calls = 0

    def hook(module, args, output):
        nonlocal calls
        calls += 1
        return output / calls

    for module in inside(model, "act"):
        module.register_forward_hook(hook)


def one_takes_what_the_other_keeps(model):
    kept = {}
    for module in inside(model, "up"):
        module.register_forward_hook(lambda module, args, output: kept.update(mean=output.detach().mean()))
    for module in inside(model, "act"):
        module.register_forward_hook(lambda module, args, output: output * kept["mean"])


def writes_to_a_weight(model):
    for module in inside(model, "down"):
        module.register_forward_pre_hook(lambda module, args: (module.weight.data.mul_(0.99), None)[1])


def writes_to_a_weight_itself(model):
    def hook(module, args):
        with torch.no_grad():
            module.weight.mul_(0.99)

    for module in inside(model, "down"):
        module.register_forward_pre_hook(hook)


def writes_to_a_weight_later(model):
    calls = []

    def hook(module, args):
        calls.append(1)
        if len(calls) > LAYERS:
            with torch.no_grad():
                module.weight.mul_(0.99)

    for module in inside(model, "down"):
        module.register_forward_pre_hook(hook)


def registers_another(model):
    def hook(module, args):
        if not seen:
            model.layers[0].down.register_forward_hook(lambda module, args, output: seen.append(1))

    seen = []
    model.layers[0].act.register_forward_pre_hook(hook)


REFUSED = [
    value_and_count, value_and_average, value_and_cell, one_takes_what_the_other_keeps, writes_to_a_weight,
    writes_to_a_weight_itself, writes_to_a_weight_later, registers_another,
]  # fmt: skip


@pytest.mark.each_value
@pytest.mark.parametrize("vram", [None, "1GiB"], ids=["streamed", "pinned"])
@pytest.mark.parametrize("late", REFUSED, ids=lambda late: late.__name__)
def test_refused(late, vram):
    model = Model()
    with memplan.attach(model, planned(model, vram)):
        late(model)
        with pytest.raises(RunError, match=r'activations=.*"keep"'):
            train(model)


@pytest.mark.parametrize("late", [value_and_count, value_and_average], ids=lambda late: late.__name__)
def test_a_plan_that_knows_them_recomputes_none_of_their_layers(late):
    model = Model()
    late(model)
    with pytest.raises(memplan.InputError, match="cannot be recomputed"):
        planned(model)
