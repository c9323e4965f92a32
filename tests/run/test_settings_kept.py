"""Objects with slots and subclasses of containers that change between layers are, for the second run of a recomputed
layer, what they were in its first; and what that run changes in them is put back.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from dataclasses import dataclass

import pytest
from torch.nn import functional

from tests.run.test_same_again import Layer, Model, compare, one


class Slots:
    __slots__ = ("__weakref__", "calls", "scale")

    def __init__(self):
        self.calls = 0


class MoreSlots(Slots):
    __slots__ = ("unset",)


class SlotsAndAttributes(Slots):
    pass


@dataclass(slots=True)
class Record:
    scale: float = 1.0
    calls: int = 0


def by_attributes(made):
    return lambda: made.scale, lambda scale: setattr(made, "scale", scale)


class Reversed(dict):
    """Answers otherwise than it holds."""

    def __getitem__(self, key):
        return -super().__getitem__(key)

    def __setitem__(self, key, value):
        super().__setitem__(key, -value)

    def __iter__(self):
        return iter(())

    update = clear = copy = None


class Ordered(OrderedDict):
    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        self.move_to_end(key, last=False)


class Last(list):
    def __iter__(self):
        return iter(())

    def __len__(self):
        return 0


class Bounded(deque):
    pass


class Words(set):
    pass


class Counts(Counter):
    pass


class Defaults(defaultdict):
    pass


class Tagged(dict):
    """Holds attributes beside its entries."""

    scale = 1.0


def entry(made):
    def put(scale):
        made["scale"] = scale
        made[f"at {scale}"] = scale

    return lambda: made["scale"], put


def first(made):
    """Of an order: what came last is first."""
    return lambda: float(next(reversed(list(OrderedDict.keys(made))))), lambda scale: made.__setitem__(
        str(scale), scale
    )


def last(made):
    return lambda: made[-1], made.append


def most(made):
    return lambda: max(made), made.add


KINDS = {
    "slots": (Slots, by_attributes),
    "inherited slots": (MoreSlots, by_attributes),
    "slots and attributes": (SlotsAndAttributes, by_attributes),
    "dataclass": (Record, by_attributes),
    "dictionary": (Reversed, entry),
    "dictionary with attributes": (Tagged, by_attributes),
    "order": (Ordered, first),
    "list": (Last, last),
    "deque": (lambda: Bounded(maxlen=3), last),
    "set": (Words, most),
    "counter": (Counts, entry),
    "defaultdict": (lambda: Defaults(float), entry),
}


class Reads(Layer):
    """From an attribute, or from what it is given; and counts its calls there, once it is planned for."""

    counts = False

    def forward(self, hidden, held=None):
        held, read = held or self.held, self.read
        scale = read()
        if self.counts and hasattr(type(held[0]), "calls"):
            held[0].calls += 1
        return hidden + self.down(functional.gelu(self.up(hidden) * scale)) + self.adapter(hidden)


class Shares(Model):
    def __init__(self, kind, is_given):
        super().__init__(Reads)
        make, access = KINDS[kind]
        self.made, self.is_given = make(), is_given
        read, self.put = access(self.made)
        for layer in self.layers:
            layer.read = read
            if not is_given:
                layer.state = self.made
                layer.held = (self.made,)

    def call(self, layer, hidden, number):
        self.put(1.0 + number)
        return layer(hidden, (self.made,)) if self.is_given else layer(hidden)


@pytest.mark.parametrize("is_given", [False, True], ids=["attribute", "given"])
@pytest.mark.parametrize("kind", KINDS)
def test_they_are_what_they_were(kind, is_given):
    made = []

    def make():
        made.append(Shares(kind, is_given))
        return made[-1]

    def step(model, batch):
        for layer in model.layers:
            layer.counts = True
        return one(model, batch)

    compare(make, step)
    if hasattr(made[0].made, "calls"):
        assert made[0].made.calls == made[1].made.calls > 0
    if isinstance(made[0].made, (dict, list, set, deque)):
        base = next(k for k in (OrderedDict, dict, list, set, deque) if isinstance(made[0].made, k))
        whole, planned = (list(getattr(base, "items", base.__iter__)(one.made)) for one in made)
        assert planned == whole
