"""Frozen layers that change their own state in forward: trained under the least vram as without a plan."""

from __future__ import annotations

import collections
import contextvars
import functools
import os
import random

import numpy
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import memplan
from memplan.errors import InputError, ModelError
from tests.support.training import CPU

WIDTH, ROWS, LAYERS, STEPS = 64, 512, 6, 3
"""So many rows that activations outweigh weights: a recompute would pay."""
GIVEN = {"ram": "64MiB", "hardware": CPU, "gains": False}


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


class Norm(Layer):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, x):
        return self.norm(super().forward(x))


class Instance(Layer):
    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm1d(WIDTH, track_running_stats=True)

    def forward(self, x):
        return self.norm(super().forward(x).T[None])[0].T


class Spectral(Layer):
    def __init__(self):
        super().__init__()
        nn.utils.spectral_norm(self.up)


class Parametrized(Layer):
    def __init__(self):
        super().__init__()
        nn.utils.parametrizations.spectral_norm(self.up)


class Codebook(Layer):
    """The average of what it saw, written in place; and in a new tensor."""

    def __init__(self, in_place=True):
        super().__init__()
        self.in_place = in_place
        self.register_buffer("average", torch.zeros(WIDTH))

    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            if self.in_place:
                self.average.lerp_(y.mean(0), 0.1)
            else:
                self.average = self.average * 0.9 + 0.1 * y.mean(0)
        return y + self.average


class Rebound(Codebook):
    def __init__(self):
        super().__init__(in_place=False)


class Plain(Layer):
    """What is no buffer, in an object that is no module."""

    def __init__(self):
        super().__init__()
        self.held = {"average": torch.zeros(WIDTH)}

    def forward(self, x):
        y = super().forward(x)
        self.held["average"] = self.held["average"] * 0.9 + 0.1 * y.detach().mean(0)
        return y + self.held["average"]


class Counter(Layer):
    def __init__(self):
        super().__init__()
        self.calls = [0]

    def forward(self, x):
        self.calls[0] += 1
        return super().forward(x) / self.calls[0]


class Recent(Layer):
    """The last of what it saw."""

    def __init__(self):
        super().__init__()
        self.recent = collections.deque(maxlen=2)

    def forward(self, x):
        self.recent.append(x.detach().mean(0))
        return super().forward(x + self.recent[0])


class Drawn(Layer):
    """Random numbers that a checkpoint does not keep."""

    def __init__(self, source="torch"):
        super().__init__()
        self.source, self.torch = source, torch.Generator().manual_seed(2)
        self.numpy = numpy.random.default_rng(2)

    def forward(self, x):
        if self.source == "torch":
            return super().forward(x) * torch.rand(x.shape, generator=self.torch)
        scale = {"numpy": self.numpy.random, "python": random.random, "global": numpy.random.rand}[self.source]()
        return super().forward(x) * scale


class Projected(Layer):
    """Its frozen weight, written to before it is read."""

    def __init__(self):
        super().__init__()
        self.up.register_forward_pre_hook(lambda module, args: (module.weight.data.mul_(0.99), None)[1])


class Pointed(Layer):
    """Its frozen weight, pointed to other memory."""

    def forward(self, x):
        self.up.weight.data = self.up.weight.data * 0.99
        return super().forward(x)


CONTEXT = contextvars.ContextVar("calls", default=0)


class Counted(Layer):
    """Calls, in what is no list and no number."""

    def __init__(self, where):
        super().__init__()
        self.where, self.kinds, self.order = where, collections.Counter(), collections.OrderedDict(a=1.0, b=2.0, c=3.0)

    def forward(self, x):
        if self.where == "counter-object":
            self.kinds.update(["calls"])
            return super().forward(x) / self.kinds["calls"]
        if self.where == "order":
            self.order.move_to_end(next(iter(self.order)))
            return super().forward(x) / next(iter(self.order.values()))
        if self.where == "context":
            CONTEXT.set(CONTEXT.get() + 1)
            return super().forward(x) / CONTEXT.get()
        os.environ["MEMPLAN_TEST"] = str(int(os.environ["MEMPLAN_TEST"]) + 1)
        return super().forward(x) / int(os.environ["MEMPLAN_TEST"])


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(32, WIDTH, max_norm=1.0)

    def forward(self, x):
        return self.table((x.abs() * 1000).long().sum(1) % 32)


KINDS = {
    "batch-norm": Norm,
    "instance-norm": Instance,
    "spectral": Spectral,
    "parametrized": Parametrized,
    "codebook": Codebook,
    "rebound": Rebound,
    "plain": Plain,
    "counter": Counter,
    "recent": Recent,
    "torch": Drawn,
    "numpy": lambda: Drawn("numpy"),
    "python": lambda: Drawn("python"),
    "global": lambda: Drawn("global"),
    "projected": Projected,
    "pointed": Pointed,
    "max-norm": Table,
    **{where: functools.partial(Counted, where) for where in ("counter-object", "order", "context", "environment")},
}
PINNED = ("projected", "pointed", "max-norm")


class Model(nn.Module):
    def __init__(self, kind, checkpointed=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(KINDS[kind]() for _ in range(LAYERS)).requires_grad_(False)
        self.adapters = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS))
        self.checkpointed = checkpointed

    def forward(self, x):
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            y = x + 0.1 * adapter(x)
            x = y + (checkpoint(layer, y, use_reentrant=False) if self.checkpointed else layer(y))
        return x


def loss(output):
    return output.square().mean()


def train(model):
    random.seed(4), numpy.random.seed(4), torch.manual_seed(4), CONTEXT.set(0)
    os.environ["MEMPLAN_TEST"] = "0"
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(STEPS):
        value = loss(model(x=torch.rand(ROWS, WIDTH)))
        value.backward()
        optimizer.step(), optimizer.zero_grad()
        losses.append(value.item())
    return losses


def held(model):
    """What the layers hold beside their state_dict."""
    plain = [
        (getattr(m, "calls", None), getattr(m, "held", None), list(getattr(m, "recent", ()))) for m in model.layers
    ]
    return repr(plain)


def planned(model, **options):
    """A plan of the least vram."""
    batch = {"x": torch.rand(ROWS, WIDTH)}
    with pytest.raises(memplan.DoesNotFitError) as caught:
        memplan.plan(model, batch, loss=loss, vram="1KiB", **GIVEN, **options)
    return memplan.plan(model, batch, loss=loss, vram=caught.value.least_vram_bytes, **GIVEN, **options)


def assert_trains_alike(kind, checkpointed=False, **options):
    whole, model = Model(kind, checkpointed), Model(kind, checkpointed)
    plan = planned(model, **options)
    handle = memplan.attach(model, plan)
    losses = train(model)
    handle.detach()
    assert losses == train(whole)
    expected, found = whole.state_dict(), model.state_dict()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert held(model) == held(whole)
    return plan


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    monkeypatch.setenv("MEMPLAN_TEST", "0")


@pytest.mark.quick(
    "batch-norm",
    "instance-norm",
    "codebook",
    "rebound",
    "plain",
    "counter",
    "torch",
    "numpy",
    "python",
    "global",
    "projected",
    "pointed",
    "max-norm",
    "context",
    "environment",
)
@pytest.mark.parametrize("kind", KINDS)
def test_the_least_vram(kind):
    plan = assert_trains_alike(kind)
    assert "recompute" not in plan.policies().values()
    if kind != "max-norm":  # which has no backward
        note = next(note for note in plan.notes if "never recomputed" in note)
        assert note.startswith(
            f"{LAYERS} layers are never recomputed, since that would change their state twice: layers.0"
        )
    streamed = [item for item in plan.items if item.home != "device"]
    assert bool(streamed) == (kind not in PINNED)
    if kind in PINNED:
        assert all("written to in the forward" in block.pinned_because for block in plan.table.blocks)


def test_a_layer_without_a_state_is_recomputed(monkeypatch):
    monkeypatch.setitem(KINDS, "none", Layer)
    assert "recompute" in assert_trains_alike("none").policies().values()


@pytest.mark.parametrize("kind", ["batch-norm", "parametrized", "counter", "torch"])
def test_offloaded(kind):
    plan = assert_trains_alike(kind, activations="offload")
    assert {*plan.policies().values()} == {"offload"}


@pytest.mark.parametrize("kind", ["batch-norm", "counter", "codebook"])
def test_checkpointed_by_the_model_itself(kind):
    assert_trains_alike(kind, checkpointed=True)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("batch-norm", r"layers\.2 cannot be recomputed: it writes to layers\.2\.norm\.num_batches_tracked \(by "
                       r"add_\)"),
        ("counter", r"layers\.2 cannot be recomputed: it changes layers\.2\.calls"),
        ("rebound", r"layers\.2 cannot be recomputed: it reads layers\.2\.average and puts another in its place"),
        ("projected", r"layers\.2 cannot be recomputed: it writes to layers\.2\.up\.weight \(by mul_\)"),
    ],
)  # fmt: skip
def test_a_recompute_that_is_asked_for_is_refused(kind, reason):
    batch = {"x": torch.rand(ROWS, WIDTH)}
    with pytest.raises(InputError, match=reason):
        memplan.plan(Model(kind), batch, loss=loss, vram="1GiB", activations={"layers.2": "recompute"}, **GIVEN)
    with pytest.raises(InputError, match="cannot be recomputed"):
        memplan.plan(Model(kind), batch, loss=loss, vram="1GiB", activations="recompute", **GIVEN)


class Wide(Model):
    """A block that only some batches go through."""

    def __init__(self):
        super().__init__("batch-norm")
        self.wide = nn.Linear(WIDTH, 8 * WIDTH).requires_grad_(False)

    def forward(self, x, through=False):
        x = super().forward(x)
        return self.wide(x) if through else x


@pytest.mark.parametrize("tier", ["host", "disk"])
def test_a_pinned_block_that_no_planned_access_reads_is_brought_when_it_is_read(tier, tmp_path):
    model, batch = Wide(), {"x": torch.rand(ROWS, WIDTH)}
    plan = memplan.plan(model, batch, loss=loss, vram="1GiB", disk="1GiB", pins={"wide": tier}, **GIVEN)
    (wide,) = (block.id for block in plan.table.blocks if block.name == "wide")
    assert plan.home_of(wide) == tier
    expected = Wide()(**batch, through=True)
    with memplan.attach(model, plan, cache=tmp_path):
        assert torch.equal(model(**batch, through=True), expected)


def test_a_smaller_plan_of_a_plan_does_not_either():
    plan = planned(Model("batch-norm"))
    roomy = memplan.plan(Model("batch-norm"), {"x": torch.rand(ROWS, WIDTH)}, loss=loss, vram="1GiB", **GIVEN)
    assert memplan.api.smaller(roomy, plan.budgets.vram_bytes).policies() == plan.policies()


def test_a_parameter_that_is_replaced_is_refused():
    class Replaced(Layer):
        def forward(self, x):
            self.up.weight = nn.Parameter(self.up.weight * 0.99, requires_grad=False)
            return super().forward(x)

    model = Model("batch-norm")
    model.layers[1] = Replaced().requires_grad_(False)
    before = model.layers[1].up.weight
    with pytest.raises(ModelError, match=r"forward of layers\.1\.up puts another tensor in the place of .* weight"):
        memplan.plan(model, {"x": torch.rand(ROWS, WIDTH)}, loss=loss, vram="1GiB", **GIVEN)
    assert model.layers[1].up.weight is before
