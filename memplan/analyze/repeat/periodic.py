"""Long stacks made short for a trace: of layers that are alike, a few are looked at; ``unroll.py`` counts them all.

[Note: alike] Layers are alike where all that they are made of is equal (see ``signature.py``), a layer's own index in
its stack apart, and where the lists of one entry a layer, or of indices of layers, that the model keeps say the same of
them. That the trace of the short stack is periodic is looked at afterwards; where it is not, the whole model is traced.

Stacks are made short in models alone that memplan built itself from a configuration, with settings under which nothing
outside the layers is made of what each of them gives, and where the forward outside them repeats (``outline.py``).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from memplan.analyze.blocks.blocks import is_stack
from memplan.analyze.repeat.signature import Described
from memplan.model.names import canonical

KEPT = 4
"""Periods that are traced: the first two and the last two, of which those between the first and the last must be alike.
"""

_OF_EACH_LAYER = ("output_hidden_states", "output_attentions", "output_router_logits")
"""Settings under which a model gathers something of every layer."""

_NUMBER = re.compile(r"\.\d+\.")
_INDICES = re.compile(r"layers|ind(ex|exes|ices)|idx")
"""Names of lists that hold indices of layers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """Elements of a stack that repeat: ``count`` periods of ``period`` elements from ``first`` on."""

    name: str
    """Canonical name of the stack."""
    stack: nn.Module
    first: int
    period: int
    count: int

    @property
    def spared(self) -> int:
        """Elements that are not traced."""
        return (self.count - KEPT) * self.period

    def kept(self) -> list[int]:
        """Return the indices of the elements that are traced.

        What is left out lies in the middle: whatever a layer does by its own number, as all do from some on, shows.
        """
        end = self.first + KEPT // 2 * self.period
        return [*range(end), *range(end + self.spared, len(self.stack._modules))]


def may_be_short(config: object) -> bool:
    """Whether a model that was built from this configuration may be traced short."""
    return not any(getattr(config, name, None) for name in _OF_EACH_LAYER)


def find_runs(model: nn.Module) -> tuple[Run, ...]:
    """Return the runs that spare a trace at least a third of their stack's elements, one a stack."""
    found: list[Run] = []
    described = Described()
    lists = _lists_of_layers(model)

    def walk(name: str, module: nn.Module) -> None:
        if is_stack(module):
            run = _run_of(name, module, described, lists)
            if run is not None:
                found.append(run)
            return
        for part, child in module._modules.items():
            if child is not None:
                walk(f"{name}.{part}" if name else part, child)

    walk("", model)
    return tuple(found)


def shorten(runs: Sequence[Run]) -> None:
    """Leave out for good of each run's stack what repeats. What stays is counted from 0 on."""
    for run in runs:
        elements = list(run.stack._modules.values())
        run.stack._modules = {str(place): elements[index] for place, index in enumerate(run.kept())}


@contextmanager
def shortened(runs: Sequence[Run]) -> Iterator[None]:
    """Leave out of each run's stack what repeats. What stays is counted from 0 on."""
    whole = [(run.stack, run.stack._modules) for run in runs]
    try:
        shorten(runs)
        yield
    finally:
        for stack, modules in whole:
            stack._modules = modules


def _run_of(name: str, stack: nn.Module, described: Described, lists: Sequence[tuple[str, Any]]) -> Run | None:
    count = len(stack._modules)
    if list(stack._modules) != [str(index) for index in range(count)] or count <= KEPT:
        return None
    tail = name.rsplit(".", 1)[-1]
    leaves = [
        tuple(_unnumbered(leaf, f"{tail}.{index}.") for leaf in described.leaves(element))
        for index, element in enumerate(stack._modules.values())
        if element is not None
    ]
    kinds = _kinds(leaves, lists)
    if len(kinds) != count:
        return None
    best: Run | None = None
    for period in range(1, count // KEPT + 1):
        for first, length in _stretches(kinds, period):
            late = int(period == 1)  # layer 1 may be unlike those behind it: there what all share is first shared
            many = length // period - late
            run = Run(name=canonical(name), stack=stack, first=first + late, period=period, count=many)
            if 3 * run.spared >= count and (best is None or run.spared > best.spared) and _says_the_same(lists, run):
                best = run
    return best


def _unnumbered(leaf: object, own: str) -> object:
    """Return a leaf without its layer's own number: some modules know their names (an adapter's targets)."""
    return (leaf + ".").replace(own, "") if type(leaf) is str and own[:-1] in leaf else leaf


def _kinds(leaves: Sequence[tuple[object, ...]], lists: Sequence[tuple[str, Any]]) -> list[int]:
    """Return a number for each element, the same for those that are alike."""
    alike: dict[int, list[int]] = defaultdict(list)
    for index, leaf in enumerate(leaves):
        alike[len(leaf)].append(index)
    numbers: dict[object, int] = {}
    found = [0] * len(leaves)
    for length, indices in alike.items():
        several = len(indices) > 1
        own = {
            place
            for place in range(length)
            if several and all(type(leaves[i][place]) is int and leaves[i][place] == i for i in indices)
        }
        for index in indices:
            said = tuple((key, _says(key, values, index, len(leaves))) for key, values in lists)
            plain = tuple(value for place, value in enumerate(leaves[index]) if place not in own)
            found[index] = numbers.setdefault((plain, said), len(numbers))
    return found


def _stretches(kinds: Sequence[object], period: int) -> Iterator[tuple[int, int]]:
    """Yield where the longest stretches that repeat with the period begin, and their lengths."""
    first = 0
    for index in range(len(kinds) - period + 1):
        at_end = index == len(kinds) - period
        if at_end or kinds[index] != kinds[index + period]:
            length = (index - first + period) // period * period
            if length > period:
                yield first, length
            first = index + 1


def _lists_of_layers(model: nn.Module) -> tuple[tuple[str, Any], ...]:
    """Return the lists of settings that the model's modules outside the layers, and its configurations, hold."""
    found: dict[int, tuple[str, Any]] = {}
    holders: list[Any] = []

    def walk(module: nn.Module) -> None:
        holders.append(module)
        config = getattr(module, "config", None)
        if config is not None:
            holders.append(config)
            holders.extend(value for value in vars(config).values() if hasattr(value, "to_dict"))
        if not is_stack(module):
            for child in module.children():
                walk(child)

    walk(model)
    for holder in holders:
        for name, value in getattr(holder, "__dict__", {}).items():
            if (
                isinstance(value, (list, tuple))
                and value
                and all(isinstance(part, (int, float, str)) for part in value)
            ):
                found[id(value)] = (name, value)
    return tuple(found.values())


def _says(name: str, values: Any, index: int, count: int) -> object:
    """Return what a list says of one element, or None."""
    if len(values) == count:
        said = values[index]
        return _NUMBER.sub(".", said) if isinstance(said, str) else said
    return index in values if _INDICES.search(name) else None


def _says_the_same(lists: Sequence[tuple[str, Any]], run: Run) -> bool:
    """Whether lists that are asked by place say of each kept element what they say of it in the whole stack."""
    count = len(run.stack._modules)
    return all(
        _says(name, values, place, count) == _says(name, values, index, count)
        for name, values in lists
        for place, index in enumerate(run.kept())
    )
