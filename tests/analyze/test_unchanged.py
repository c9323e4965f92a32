"""Planning looks: nothing of the model, the batch, the loss or the process is another one afterwards."""

from __future__ import annotations

import collections
import functools
import itertools
import queue
import random

import numpy
import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import MontecloraConfig
from torch import nn
from transformers import LlamaConfig

import memplan
from memplan.errors import ModelError
from tests.support import families
from tests.support.fingerprint import assert_same, fingerprint
from tests.support.training import CPU, loss_of

WIDTH = 64
GIVEN = {"vram": "1GiB", "ram": "64MiB", "hardware": CPU, "gains": False}
COUNTS = {"calls": 0}
CALLS = 0


def loss(output):
    return output.square().mean()


class Model(nn.Module):
    """Frozen layers of a class, a trained one beside each."""

    def __init__(self, kind, layers=3):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(kind() for _ in range(layers)).requires_grad_(False)
        self.adapters = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(layers))

    def forward(self, x):
        for layer, adapter in zip(self.layers, self.adapters, strict=True):
            x = x + torch.tanh(layer(x)) + 0.1 * adapter(x)
        return x


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.linear(x)


class Norm(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH, momentum=None))


class Warm(Linear):
    """Its steps decide what it computes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("step", torch.zeros((), dtype=torch.long))
        self.calls = 0

    def forward(self, x):
        self.step += 1
        self.calls += 1
        self.training_began = True
        return super().forward(x) * (1 if self.step < 3 else 0.5)


class Sampler:
    """No module: a position, samples in a list, a class's own count."""

    made = 0

    def __init__(self):
        self.samples = [torch.rand(WIDTH) for _ in range(4)]
        self.state = {"index": 0, "seen": collections.deque(maxlen=3), "names": {"a"}}

    def draw(self):
        Sampler.made += 1
        index = self.state["index"] % len(self.samples)
        self.state["index"] += 1
        self.state["seen"].append(self.samples[index])
        self.state["names"].add(index)
        self.samples[index].mul_(0.5)
        return self.samples[index]


class Sampled(Linear):
    def __init__(self):
        super().__init__()
        self.sampler = Sampler()

    def forward(self, x):
        return super().forward(x * self.sampler.draw())


class Codebook(Linear):
    """Moving averages: in place, in new tensors, in a list; of what is in slots, in tuples and in arrays."""

    class Held:
        __slots__ = ("count", "pair")

    def __init__(self):
        super().__init__()
        self.register_buffer("codes", torch.randn(8, WIDTH))
        self.register_buffer("average", torch.zeros(WIDTH))
        self.plain = torch.zeros(WIDTH)
        self.history = []
        self.held = Codebook.Held()
        self.held.count, self.held.pair = 0, (torch.zeros(WIDTH), 1)
        self.array = numpy.zeros(3)

    def forward(self, x):
        y = super().forward(x)
        with torch.no_grad():
            self.codes.lerp_(y[:8], 0.1)
            self.average = self.average * 0.9 + y.mean(0)
            self.plain = self.plain * 0.9 + y.mean(0)
            self.history.append(y.mean(0))
            self.held.count += 1
            self.held.pair[0].add_(1)
            self.held.pair = (self.held.pair[0] + 1, self.held.pair[1] + 1)
            self.array += 1
        return y + self.codes.mean(0) + self.average + self.plain + self.held.pair[0]


class Noise(Linear):
    """Random generators of its own, and the process's."""

    def __init__(self):
        super().__init__()
        self.torch, self.numpy = torch.Generator().manual_seed(3), numpy.random.default_rng(3)
        self.python, self.old = random.Random(3), numpy.random.RandomState(3)

    def forward(self, x):
        scale = self.numpy.random() + self.python.random() + self.old.rand() + random.random() + numpy.random.rand()
        self.torch.manual_seed(5)
        return super().forward(x) * scale + torch.randn(x.shape, generator=self.torch)


class Iterated(Linear):
    """What is drawn from goes on from where it was."""

    def __init__(self):
        super().__init__()
        self.items, self.turn, self.number = iter([1.0, 2.0] * 500), itertools.cycle([1.0, 2.0]), itertools.count()

    def forward(self, x):
        return super().forward(x) * next(self.items) * next(self.turn) + next(self.number)


class Reaching(Linear):
    """Names of its module, variables of a hook, an attribute of a function, what a function is called with by
    default.
    """

    def __init__(self):
        super().__init__()
        seen = []
        total = 0

        def hook(module, args):
            nonlocal total
            total += 1
            seen.append(args[0])
            hook.calls = total

        self.register_forward_pre_hook(hook)

    def forward(self, x, tensors=[]):  # noqa: B006
        global CALLS
        CALLS += 1
        COUNTS["calls"] += 1
        tensors.append(x)
        Reaching.last = x
        return super().forward(scaled(x, 3)) + table(len(x))


class Other(nn.Linear):
    pass


class Meddling(Linear):
    """It changes what a module is."""

    def forward(self, x):
        self.linear.weight.requires_grad_(True).requires_grad_(False)
        self.linear.eval()
        self.register_forward_hook(lambda module, args, output: None)
        self.register_buffer("last", x.detach(), persistent=False)
        torch.manual_seed(1)
        torch.set_default_dtype(torch.float64)
        torch.set_default_dtype(torch.float32)
        self.linear.__dict__.pop("in_features", None)
        self.linear.__class__ = Other
        return super().forward(x)


class Queued(Linear):
    """What it has seen waits in a queue."""

    def __init__(self):
        super().__init__()
        self.seen = queue.Queue()
        self.seen.put(0)

    def forward(self, x):
        self.seen.put(len(x))
        return super().forward(x)


def scaled(x, factor, cache={}):  # noqa: B006
    cache[factor] = x
    return x * factor


@functools.lru_cache
def table(length):
    return torch.ones(length, 1)


KINDS = (Norm, Warm, Sampled, Codebook, Noise, Iterated, Reaching, Meddling, Queued)


@pytest.mark.each_value
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("how", ["plan", pytest.param("measure", marks=pytest.mark.full)])
def test_modules_with_a_state_of_their_own(kind, how):
    model, target = Model(kind), torch.ones(16, WIDTH)
    model.layers[1].eval()
    model.adapters[0].weight.grad = torch.ones(WIDTH, WIDTH)
    scale, batch = {"calls": 0}, {"x": torch.rand(16, WIDTH)}
    table(16)

    def loss(output):
        scale["calls"] += 1
        target.add_(1)
        return (output - target).square().mean()

    if how == "measure":
        measured = {**GIVEN, "hardware": "auto", "measure": True}
        before = fingerprint(model, batch, loss, COUNTS, CALLS, table.cache_info())
        memplan.plan(model, batch, loss=loss, **measured)
    else:
        before = fingerprint(model, batch, loss, COUNTS, CALLS, table.cache_info())
        memplan.plan(model, batch, loss=loss, activations="any", **GIVEN)
    assert_same(before, fingerprint(model, batch, loss, COUNTS, CALLS, table.cache_info()))
    if kind is Queued:
        assert [layer.seen.qsize() for layer in model.layers] == [1, 1, 1]


def test_frontier_and_what_fails_leave_it_too():
    model, batch = Model(Sampled), {"x": torch.rand(16, WIDTH)}
    before = fingerprint(model, batch)
    memplan.frontier(model, batch, loss=loss, points=2, ram="64MiB", hardware=CPU)
    assert_same(before, fingerprint(model, batch))
    with pytest.raises(memplan.DoesNotFitError):
        memplan.plan(model, batch, loss=loss, **{**GIVEN, "vram": "1KiB"})
    assert_same(before, fingerprint(model, batch))

    def fails(output):
        model.layers[0].sampler.state["index"] = 99
        raise ValueError("no")

    with pytest.raises(ModelError, match="no"):
        memplan.plan(model, batch, loss=fails, **GIVEN)
    assert_same(before, fingerprint(model, batch))


@pytest.mark.quick("llama", "plain")
@pytest.mark.parametrize("family", families.FAMILIES)
def test_every_family(family):
    model, batch = families.make(family, "float32"), families.batches(family)
    before = fingerprint(model, batch)
    memplan.plan(model, batch, loss=loss_of, **GIVEN)
    assert_same(before, fingerprint(model, batch))


def test_a_configuration():
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=64
    )
    adapter = LoraConfig(r=4, target_modules="all-linear")
    before = fingerprint(config, adapter)
    memplan.plan(config, (1, 8), adapter=adapter, **GIVEN)
    assert_same(before, fingerprint(config, adapter))


@pytest.mark.parametrize("size", [150, 1])
def test_montecloras_samples(size):
    torch.manual_seed(0)
    lora = LoraConfig(target_modules=["linear"], r=4, monteclora_config=MontecloraConfig(buffer_size=size))
    model, batch = get_peft_model(Model(Linear), lora).train(), {"x": torch.rand(16, WIDTH)}
    before = fingerprint(model, batch)
    memplan.plan(model, batch, loss=loss, **GIVEN)
    assert_same(before, fingerprint(model, batch))


class Streamed(Linear):
    def __init__(self):
        super().__init__()
        self.values = (float(index) for index in range(9))

    def forward(self, x):
        return super().forward(x) * next(self.values)


def test_a_generator_that_cannot_be_rewound_is_refused():
    model = Model(Streamed)
    with pytest.raises(ModelError, match=r"draws from layers\.0\.values, a generator.*hold a list and a position"):
        memplan.plan(model, {"x": torch.rand(16, WIDTH)}, loss=loss, **GIVEN)
    assert next(model.layers[0].values) == 0.0


def test_files_are_neither_read_nor_written(tmp_path):
    class Logged(Linear):
        def __init__(self):
            super().__init__()
            self.log = (tmp_path / "log").open("a")

        def forward(self, x):
            self.log.write("called\n")
            return super().forward(x)

    model = Model(Logged)
    memplan.plan(model, {"x": torch.rand(16, WIDTH)}, loss=loss, **GIVEN)
    for layer in model.layers:
        layer.log.close()
    assert (tmp_path / "log").read_text() == ""
