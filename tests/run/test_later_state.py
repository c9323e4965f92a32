"""What a recomputed layer changes only after the plan was made: once, as without a plan, or refused."""

from __future__ import annotations

import gc
import random

import numpy
import pytest
import torch

import memplan
from memplan.errors import RunError
from memplan.state.process_state import positions
from tests.run.test_late_hooks import GIVEN, ROWS, WIDTH, Layer, Model, assert_alike, loss, planned, train


class Later(Layer):
    """What no trace sees: it comes with the second pass."""

    begins = 1

    def __init__(self):
        super().__init__()
        self.step = 0
        self.calls, self.scale, self.log, self.held = 0, 1.0, [], {"n": 0}

    def forward(self, x):
        if self.step >= self.begins:
            self.calls += 1
            self.log.append(self.calls)
            self.held["n"] += 1
            self.scale = self.scale * 0.9
            self.found = x.shape[0] + self.calls
            x = x * self.scale + len(self.log) + self.held["n"]
        return super().forward(x)


def next_step(model, step):
    for layer in model.layers:
        layer.step = step + 1


def test_attributes_that_change_later():
    assert_alike(lambda model: None, Later, each=next_step)


class Draws(Later):
    def __init__(self):
        super().__init__()
        self.generator = torch.Generator().manual_seed(3)

    def forward(self, x):
        if self.step >= self.begins:
            x = x * torch.rand(x.shape, generator=self.generator)
        return super().forward(x)


def test_a_generator_of_its_own():
    assert_alike(lambda model: None, Draws, each=next_step)


class DrawsElsewhere(Later):
    draw = staticmethod(random.random)

    def forward(self, x):
        if self.step >= self.begins:
            x = x * float(self.draw())
        return Layer.forward(self, x)


@pytest.mark.parametrize("draw", [random.random, numpy.random.rand])
def test_numbers_that_no_trace_sees_being_drawn_are_refused(draw):
    kind = type("DrawsElsewhere", (DrawsElsewhere,), {"draw": staticmethod(draw)})
    model = Model(kind)
    with (
        memplan.attach(model, planned(model)),
        pytest.raises(RunError, match="drew Python's or NumPy's random numbers"),
    ):
        train(model, next_step)


@pytest.mark.parametrize(
    "draw",
    [random.random, lambda: random.getrandbits(1), lambda: random.gauss(0, 1), numpy.random.rand, numpy.random.randn],
)
def test_each_draw_is_seen(draw):
    for _ in range(2000):  # once round each generator's numbers and more
        before = positions()
        assert positions() == before
        draw()
        after = positions()
        draw()
        assert before != after or after != positions()  # a pair of normal numbers is drawn at once


class Given(Later):
    def forward(self, x, generator):
        if self.step >= self.begins:
            x = x * torch.rand(x.shape, generator=generator)
        return super().forward(x)


def test_a_generator_that_is_given():
    whole, model, generator = Model(Given), Model(Given), torch.Generator()
    batch = {"x": torch.rand(ROWS, WIDTH), "generator": generator}
    plan = memplan.plan(model, batch, loss=loss, vram="1GiB", **GIVEN)
    expected = train(whole, next_step, generator=generator.manual_seed(2))
    position = generator.get_state()
    with memplan.attach(model, plan):
        found = train(model, next_step, generator=generator.manual_seed(2))
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.equal(generator.get_state(), position)


class Averages(Later):
    def __init__(self):
        super().__init__()
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x):
        if self.step >= self.begins:
            self.average.lerp_(x.detach().mean(0), 0.1)
        return super().forward(x + self.average)


class Rebinds(Averages):
    def forward(self, x):
        if self.step >= self.begins:
            self.average = self.average * 0.9 + 0.1 * x.detach().mean(0)
        return Layer.forward(self, x + self.average)


def test_a_buffer_that_is_rebound_later():
    assert_alike(lambda model: None, Rebinds, each=next_step)


@pytest.mark.parametrize("vram", [None, "1GiB"], ids=["streamed", "pinned"])
def test_a_buffer_that_is_written_to_later_is_refused(vram):
    model = Model(Averages)
    with memplan.attach(model, planned(model, vram)), pytest.raises(RunError, match="wrote in place to a buffer"):
        train(model, next_step)


class Registers(Later):
    """A hook of its own, at its second call."""

    where = "itself"

    def __init__(self):
        super().__init__()
        self.registered, self.seen = False, []

    def forward(self, x):
        if self.step >= self.begins and not self.registered:
            self.registered = True
            module, seen = self if self.where == "itself" else self.down, self.seen
            module.register_forward_hook(lambda module, args, output: (seen.append(1), output * 2)[1])
        return Layer.forward(self, x)


class RegistersInside(Registers):
    where = "inside"


class RegistersAtOnce(RegistersInside):
    begins = 0


@pytest.mark.parametrize("kind", [Registers, RegistersInside])
def test_a_forward_that_registers_a_hook_is_refused(kind):
    model = Model(kind)
    with memplan.attach(model, planned(model)), pytest.raises(RunError, match="registered a hook within itself"):
        train(model, next_step)


def test_a_forward_that_registers_a_hook_at_its_first_call_is_not_recomputed():
    whole, model, batch = Model(RegistersAtOnce), Model(RegistersAtOnce), {"x": torch.rand(ROWS, WIDTH)}
    with pytest.raises(memplan.InputError, match=r"cannot be recomputed: it changes layers\.0\.(seen|down)"):
        planned(model)
    expected = train(whole)
    with memplan.attach(model, memplan.plan(model, batch, loss=loss, vram="1GiB", **{**GIVEN, "activations": None})):
        found = train(model)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert [layer.seen for layer in model.layers] == [layer.seen for layer in whole.layers]


# ---- trained parameters ----------------------------------------------------------------------------------------------


def write_alias(parameter, _):
    parameter.data.mul_(1.5)


def write_view_of_an_alias(parameter, _):
    parameter.data.view(-1)[:2].zero_()


def write_an_alias_of_an_alias(parameter, _):
    parameter.data.detach().mul_(1.5)


def set_twice(parameter, _):
    before = parameter.data_ptr()
    for _ in range(4):
        parameter.data = parameter.data * 1.01
        if parameter.data_ptr() == before:
            break


def write_an_older_alias(_, older):
    older.mul_(1.5)


@pytest.mark.parametrize(
    "write", [write_alias, write_view_of_an_alias, write_an_alias_of_an_alias, set_twice, write_an_older_alias]
)
def test_trained_parameters_that_are_written_to_by_data_before_backward_are_refused(write):
    model = Model(Layer)
    trained = next(p for p in model.layers[2].parameters() if p.requires_grad)
    before = vars(torch.nn.Parameter).get("data")
    with memplan.attach(model, planned(model)):
        older = trained.data
        found = loss(model(torch.rand(ROWS, WIDTH)))
        write(trained, older)
        with pytest.raises(RunError, match="written to between its forward and its backward"):
            found.backward()
    assert vars(torch.nn.Parameter).get("data") is before


@pytest.mark.parametrize("kind", ["fused", "foreach", "bitsandbytes", "own"])
def test_a_step_between_a_forward_and_its_backward_is_refused(kind):
    class Own(torch.optim.Optimizer):
        def step(self):
            for parameter in self.param_groups[0]["params"]:
                parameter.data.add_(parameter.grad, alpha=-0.1)

    model = Model(Layer)
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "bitsandbytes":
        optimizer = pytest.importorskip("bitsandbytes").optim.AdamW8bit(trained, lr=0.1, min_8bit_size=1)
    else:
        optimizer = Own(trained, {}) if kind == "own" else torch.optim.AdamW(trained, lr=0.1, **{kind: True})
    with memplan.attach(model, planned(model)):
        first, second = (loss(model(torch.rand(ROWS, WIDTH))) for _ in range(2))
        first.backward()
        optimizer.step()
        with pytest.raises(RunError, match="written to between its forward and its backward"):
            second.backward()


def test_what_is_read_of_trained_parameters_or_written_elsewhere_is_no_write():
    def between_steps(model):
        def write(module, args):
            for parameter in module.parameters():
                if parameter.requires_grad:
                    parameter.data.mul_(0.9)
                    parameter.data = parameter.data.clone()

        model.register_forward_pre_hook(write)

    assert_alike(between_steps)
    model = Model(Layer)
    with memplan.attach(model, planned(model)):
        found = loss(model(torch.rand(ROWS, WIDTH)))
        for parameter in model.parameters():
            if parameter.requires_grad:
                for _ in range(40):
                    copy = parameter.data.clone()
                copy.zero_()
        found.backward()


def test_nothing_is_watched_once_the_model_is_dropped():
    before = vars(torch.nn.Parameter).get("data")
    model = Model(Layer)
    memplan.attach(model, planned(model))
    assert isinstance(vars(torch.nn.Parameter)["data"], property)
    del model
    gc.collect()
    assert vars(torch.nn.Parameter).get("data") is before
