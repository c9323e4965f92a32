"""What a recomputed layer reads beside its inputs is what it was, where that can be kept; else it is refused."""

from __future__ import annotations

import inspect
from contextvars import ContextVar
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

import memplan
from memplan.errors import RunError
from memplan.hooks.same_again import FIRST, checksum
from tests.support.training import CPU

LAYERS = 4
SCALE = ContextVar("SCALE", default=1.0)
shared = 1.0


class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.adapter = nn.Linear(16, 48), nn.Linear(48, 16), nn.Linear(16, 16)

    def forward(self, hidden, scale=1.0):
        return hidden + self.down(functional.gelu(self.up(hidden) * scale)) + self.adapter(hidden)


class Model(nn.Module):
    def __init__(self, kind=Layer):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.layers = nn.Linear(8, 16), nn.ModuleList(kind() for _ in range(LAYERS))
        self.requires_grad_(False)
        for layer in self.layers:
            layer.adapter.requires_grad_(True)

    def forward(self, batch):
        hidden = self.embedding(batch)
        for number, layer in enumerate(self.layers):
            hidden = self.call(layer, hidden, number)
        return hidden.square().mean()

    def call(self, layer, hidden, number):
        return layer(hidden)


def train(model, step, passes=2):
    found = []
    for number in range(passes):
        batch = torch.randn(3, 8, generator=torch.Generator().manual_seed(number))
        found.append(step(model, batch).detach())
        found += [parameter.grad.clone() for parameter in model.parameters() if parameter.requires_grad]
        model.zero_grad()
    return found


def one(model, batch):
    loss = model(batch)
    loss.backward()
    return loss


def planned(model, activations="recompute", **options):
    pins = options.pop("pins", {f"layers.{index}": "host" for index in range(LAYERS)})
    return memplan.plan(
        model, (torch.ones(3, 8),), loss=lambda loss: loss, vram="1GiB", ram="1GiB", hardware=CPU, pins=pins,
        activations=activations, gains=False, **options,
    )  # fmt: skip


def compare(make, step=one):
    expected = train(make(), step)
    model = make()
    with memplan.attach(model, planned(model)) as handle:
        found = train(model, step)
        assert handle.record.loads
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


# ---- what is kept


class ByDictionary(Model):
    def __init__(self, kind):
        super().__init__(kind)
        self.given = {}

    def call(self, layer, hidden, number):
        self.given["scale"] = 1.0 + number
        return layer(hidden, self.given)


class Reads(Layer):
    def forward(self, hidden, given):
        return super().forward(hidden, given["scale"])


class ByNamespace(Model):
    given = SimpleNamespace(scale=1.0)

    def call(self, layer, hidden, number):
        self.given.scale = 1.0 + number
        return layer(hidden, self.given)


class ReadsAttribute(Layer):
    def forward(self, hidden, given):
        return super().forward(hidden, given.scale)


class ByList(Model):
    def forward(self, batch):
        self.gates = []
        return super().forward(batch)

    def call(self, layer, hidden, number):
        self.gates.append(1.0 + number)
        return layer(hidden, self.gates)


class ReadsLast(Layer):
    def forward(self, hidden, gates):
        return super().forward(hidden, gates[-1])


class ByResidual(Model):
    def forward(self, batch):
        self.values = {}
        return super().forward(batch)

    def call(self, layer, hidden, number):
        return layer(hidden, self.values)


class LeavesAResidual(Layer):
    def forward(self, hidden, values):
        value = self.adapter(hidden)
        values["last"] = value = (value + values["last"]) / 2 if values else value
        return hidden + value + self.down(functional.gelu(self.up(hidden)))


@pytest.mark.parametrize(
    ("model", "layer"),
    [(ByDictionary, Reads), (ByNamespace, ReadsAttribute), (ByList, ReadsLast), (ByResidual, LeavesAResidual)],
)
def test_what_layers_are_given_is_as_it_was(model, layer):
    compare(lambda: model(layer))


class ReadsConfiguration(Layer):
    config = None

    def forward(self, hidden):
        return super().forward(hidden, self.config.scale)


def two_forwards(before):
    """One backward through two forwards, before each of which ``before(model, number)`` is called."""

    def step(model, batch):
        losses = []
        for number in range(2):
            before(model, number)
            losses.append(model(batch))
        sum(losses).backward()
        before(model, 0)
        return sum(losses)

    return step


def test_a_configuration_that_layers_share_is_as_it_was():
    def make():
        model, config = Model(ReadsConfiguration), SimpleNamespace(scale=1.0)
        for layer in model.layers:
            layer.config = config
        return model

    compare(make, two_forwards(lambda model, number: setattr(model.layers[0].config, "scale", 1.0 + number)))


# ---- what is not


class ReadsContext(Layer):
    def forward(self, hidden):
        return super().forward(hidden, SCALE.get())


class ReadsGlobal(Layer):
    def forward(self, hidden):
        return super().forward(hidden, shared)


class ReadsTensor(Layer):
    def __init__(self):
        super().__init__()
        self.scale = torch.ones(())

    def forward(self, hidden):
        return super().forward(hidden, self.scale * 1)


class Permutes(Layer):
    def forward(self, hidden):
        return super().forward(hidden[:, ORDER[int(shared) - 1]])


ORDER = [torch.arange(16), torch.arange(16).roll(3)]


class LooksUp(Layer):
    """By an index of one element."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2, 16))

    def forward(self, hidden):
        return super().forward(hidden) + functional.embedding(torch.tensor([int(shared) - 1]), self.table)


class Filters(Layer):
    def forward(self, hidden):
        changed = torch.fft.irfft(torch.fft.rfft(hidden) * torch.full((9,), shared + 1j))
        return super().forward(hidden + changed)


class MultipliesBy(Layer):
    """A parameter that is another one each time."""

    def forward(self, hidden):
        return super().forward(hidden) * nn.Parameter(torch.full((16,), float(shared)), requires_grad=False)


class Watches(Layer):
    """What it keeps has a graph, which no loss reaches."""

    def forward(self, hidden):
        self.seen = torch.sin(hidden * shared).mean()
        return super().forward(hidden)


class ParentSays(Model):
    scale = 1.0

    def __init__(self, kind):
        super().__init__(kind)
        for layer in self.layers:
            layer.parent = (self,)

    def call(self, layer, hidden, number):
        self.scale = 1.0 + number
        return layer(hidden)


class AsksParent(Layer):
    def forward(self, hidden):
        return super().forward(hidden, self.parent[0].scale)


class Doubles(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(args[0] * 2 if function is functional.gelu else args[0], *args[1:], **(kwargs or {}))


def set_global(model, number):
    global shared
    shared = 1.0 + number


def within(context):
    def step(model, batch):
        with context():
            loss = model(batch)
        loss.backward()
        return loss

    return step


def scaled(model, batch):
    token = SCALE.set(2.0)
    loss = model(batch)
    SCALE.reset(token)
    loss.backward()
    return loss


def write_data(model, batch):
    loss = model(batch)
    model.layers[1].up.weight.data.mul_(1.5)
    loss.backward()
    model.layers[1].up.weight.data.div_(1.5)
    return loss


REFUSED = {
    "a context variable": (lambda: Model(ReadsContext), scaled),
    "a global": (lambda: Model(ReadsGlobal), two_forwards(set_global)),
    "a tensor that is an attribute": (
        lambda: Model(ReadsTensor),
        two_forwards(lambda model, number: [layer.scale.fill_(1.0 + number) for layer in model.layers]),
    ),
    "an order": (lambda: Model(Permutes), two_forwards(set_global)),
    "a complex filter": (lambda: Model(Filters), two_forwards(set_global)),
    "a parameter of its own": (lambda: Model(MultipliesBy), two_forwards(set_global)),
    "the parent": (lambda: ParentSays(AsksParent), one),
    "a mode": (Model, within(Doubles)),
    "a patch": (Model, within(lambda: mock.patch("torch.nn.functional.gelu", lambda x: functional.silu(x * 2)))),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_nobody_keeps_is_refused(case):
    make, step = REFUSED[case]
    model = make()
    with (
        memplan.attach(model, planned(model)),
        pytest.raises(RunError, match="computed something else when the plan ran it a second time"),
    ):
        train(model, step)
    expected, model = train(make(), step), make()
    with memplan.attach(model, planned(model, "keep")):
        found = train(model, step)
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))


def test_an_index_of_one_element_is_compared():
    def make():
        model = Model(LooksUp)
        for layer in model.layers:
            layer.table.requires_grad_(True)
        return model

    model = make()
    with memplan.attach(model, planned(model)), pytest.raises(RunError, match="computed something else"):
        train(model, two_forwards(set_global))


def test_what_has_no_part_in_a_gradient_does_no_harm():
    compare(lambda: Model(Watches), two_forwards(set_global))


def test_a_resident_weight_that_is_written_to_through_data_is_refused():
    model = Model()
    plan = planned(model, pins={"layers.0": "host", "layers.1": "device", "layers.2": "host", "layers.3": "host"})
    with memplan.attach(model, plan), pytest.raises(RunError, match=r"layers\.1 computed something else"):
        train(model, write_data)


class ByMask(Model):
    def __init__(self, kind):
        super().__init__(kind)
        self.mask = torch.ones(16)

    def call(self, layer, hidden, number):
        return layer(hidden, scale=self.mask.mean()) if number else layer(hidden * 1, mask=self.mask)


class Masked(Layer):
    def forward(self, hidden, scale=1.0, mask=None):
        return super().forward(hidden if mask is None else hidden * mask.detach().clone(), scale)


def test_a_tensor_that_is_given_by_name_and_written_to_is_refused():
    model = ByMask(Masked)
    with memplan.attach(model, planned(model)), pytest.raises(RunError, match="called with was written to"):
        train(model, two_forwards(lambda model, number: model.mask.fill_(1.0 + number)))


def test_later_one_layer_is_looked_at_in_each_pass():
    """What is around a forward is around all its layers: it is seen in the pass in which it comes."""
    model = Model(ReadsGlobal)
    with memplan.attach(model, planned(model)):
        train(model, one, passes=FIRST + 3)
        with pytest.raises(RunError, match="computed something else"):
            train(model, two_forwards(set_global), passes=1)


@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5000), (600, 1024), (2, 300_000)])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int64"])
def test_a_checksum_tells_values_and_places_apart(shape, dtype):
    values = np.random.default_rng(0).integers(0, 200, shape).astype(dtype)
    found = checksum(values)
    assert checksum(values.copy()) == checksum(np.stack([values, values], axis=-1)[..., 0]) == found
    if values.size < 2:
        return
    flat = values.reshape(-1)
    others = [np.roll(flat, 1), np.roll(flat, flat.size // 2), flat[::-1], np.roll(flat, 1024)]
    changed = flat.copy()
    changed[flat.size // 2] += 1
    swapped = flat.copy()
    swapped[[0, -1]] = [flat[-1] + 1, flat[0]]
    for other in (*others, changed, swapped):
        assert np.array_equal(other, flat) or checksum(other) != found


# ---- what is asked of a layer


@pytest.mark.parametrize("activations", ["recompute", "keep"])
def test_a_layer_tells_what_its_forward_takes(activations):
    model = Model()
    before = [(inspect.signature(layer.forward), layer.forward.__name__) for layer in model.layers]
    with memplan.attach(model, planned(model, activations)):
        assert [(inspect.signature(layer.forward), layer.forward.__name__) for layer in model.layers] == before


class Encoder(nn.Module):
    """Of torch's own layers, which have a fast path where nothing is trained in them and no hook is there."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.embedding, self.encoder, self.head = nn.Embedding(9, 16), nn.TransformerEncoder(layer, 4), nn.Linear(16, 1)
        self.requires_grad_(False)
        self.head.requires_grad_(True)
        for part in self.encoder.layers:
            part.norm1.requires_grad_(True)

    def forward(self, ids):
        return self.head(self.encoder(self.embedding(ids), src_key_padding_mask=ids == 0)).square().mean()


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.each_value
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("is_sorted", [True, False], ids=["padded behind", "padded anywhere"])
def test_torchs_encoder_takes_the_way_that_it_takes_without(activations, is_sorted):
    numbers = torch.Generator().manual_seed(1)
    ids = [torch.randint(0, 9, (3, 10), generator=numbers) for _ in range(4)]
    ids = [batch.sort(descending=True).values if is_sorted else batch for batch in ids]
    results = []
    for is_planned in (False, True):
        model = Encoder()
        if is_planned:
            pins = {f"encoder.layers.{index}": "host" for index in range(4)}
            plan = memplan.plan(
                model, (ids[0],), loss=lambda loss: loss, vram="1GiB", ram="1GiB", hardware=CPU, pins=pins,
                activations=activations, gains=False,
            )  # fmt: skip
            handle = memplan.attach(model, plan)
        found = []
        for batch in ids:
            torch.manual_seed(2)
            loss = model.train()(batch)
            loss.backward()
            found += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)]
            with torch.no_grad():
                found.append(model.eval()(batch))
        results.append(found)
    assert handle.record.loads
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.quick("recompute")
@pytest.mark.parametrize("activations", ["keep", "recompute"])
def test_torchs_encoder_with_compiled_layers_that_are_evaluated_with_gradients(activations):
    ids = torch.randint(1, 9, (3, 10), generator=torch.Generator().manual_seed(1))
    results = []
    for is_planned in (False, True):
        torch._dynamo.reset()
        model = Encoder()
        for layer in model.encoder.layers:
            layer.compile(backend="eager")
        if is_planned:
            pins = {f"encoder.layers.{index}": "host" for index in range(4)}
            plan = memplan.plan(
                model, (ids,), loss=lambda loss: loss, vram="1GiB", ram="1GiB", hardware=CPU, pins=pins,
                activations=activations, gains=False,
            )  # fmt: skip
            handle = memplan.attach(model, plan)
        loss = model.eval()(ids)
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in model.parameters() if p.requires_grad)])
    assert handle.record.loads
    assert handle.record.direct_reads == 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch._dynamo.reset()
