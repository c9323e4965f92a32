"""What a forward computes with beside its arguments, kept for the time that it runs once more in backward.

A layer that memplan recomputes runs a second time when the script is elsewhere: a context that was around the forward
is left (``sdpa_kernel``, ``disable_adapter``, ``torch.func.functional_call``), the model was switched to evaluation, an
attribute, an adapter's scaling, a hook or a generator is another. Without memplan the layer runs once. So the second
time it is given what it had the first, and what it changes is put back as the script left it; where that cannot be (a
tensor that was written to in place), it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import nn

from memplan.errors import RunError
from memplan.state import containers, data_writes, optimizer_steps
from memplan.state.process_state import kernels, positions

_ATOMS = frozenset({int, float, bool, str, bytes, type(None), complex, torch.dtype, torch.device, torch.Size})
_TORCHS = frozenset(nn.Module().__dict__)
_MOST_ENTRIES = 4096
"""Containers of more are not copied: no flags, tables rather."""
_KEEP = 'plan with activations="keep"'


class Held:
    """Modules, and where they hold what is changed in place."""

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self.modules = tuple(modules)
        self.own: list[Any] = []
        """What torch itself has in each module: parameters, buffers, modules and hooks. Never another container."""
        self.plain: list[tuple[dict[str, Any], int, tuple[str, ...]]] = []
        """The attributes of each module, how many they were, and those that are not torch's."""
        for module in self.modules:
            attributes = module.__dict__
            self.own += [attributes[name] for name in _TORCHS if type(attributes.get(name)) in containers.EXACT]
            plain = tuple(name for name in attributes if name not in _TORCHS)
            self.plain.append((attributes, len(attributes), plain))

    def is_changed(self) -> bool:
        """Whether modules have more or fewer attributes by now."""
        return any(len(attributes) != size for attributes, size, _ in self.plain)

    def state(self, given: Iterable[object] = ()) -> State:
        """Return what they hold now, and objects that they hold. ``given``: what their forwards are given, in depth."""
        filled: list[tuple[Any, Any]] = [(value, value.copy()) for value in self.own if value]
        empty: list[Any] = []
        odd: list[Any] = []
        drawn_from: list[torch.Generator] = []
        objects: dict[int, Any] = {}

        def look(value: Any) -> None:
            kind = type(value)
            if kind in _ATOMS:
                return
            if kind is torch.Generator:
                drawn_from.append(value)
                return
            if containers.kind_of(kind) is not None:
                size = containers.size_of(value)
                if not size:
                    (empty if kind in containers.EXACT else odd).append(value)
                elif size <= _MOST_ENTRIES:
                    filled.append((value, containers.copied(value)))
            if kind not in containers.EXACT and containers.holds_attributes(kind):
                objects.setdefault(id(value), value)

        for attributes, _, names in self.plain:
            for name in names:
                look(attributes.get(name))
        for value in given:
            look(value)
        own = (containers.attributes_of(value) for value in objects.values())
        held = [(now, now.copy()) for now in (*(attributes for attributes, _, _ in self.plain), *own)]
        slots = [(value, found) for value in objects.values() if (found := containers.in_slots(value))]
        return State(held, filled, [*self.own, *empty], odd, drawn_from, slots)


def reached(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[list[object], list[torch.Tensor]]:
    """Return what a forward is given that may be changed in place: containers, objects and generators, in depth, and
    the tensors that are given by name, or in a tuple or list.
    """
    found: dict[int, object] = {}
    tensors: list[torch.Tensor] = []
    for given in (*args, *kwargs.values()):
        tensors += (part for part in given if isinstance(part, torch.Tensor)) if type(given) in (tuple, list) else ()
    tensors += (value for value in kwargs.values() if isinstance(value, torch.Tensor))
    to_see: list[Any] = [*(value for value in args if not isinstance(value, torch.Tensor)), *kwargs.values()]
    while to_see and len(found) < _MOST_ENTRIES:
        value = to_see.pop()
        kind = type(value)
        if isinstance(value, torch.Tensor) or id(value) in found or kind in _ATOMS:
            continue
        if kind is torch.Generator:
            found[id(value)] = value
            continue
        if isinstance(value, tuple):
            found[id(value)] = value
            to_see += value
        elif kind in containers.EXACT or not hasattr(kind, "get_seq_length"):  # a cache: recompute's
            if containers.kind_of(kind) is not None:
                found[id(value)] = value
                to_see += containers.parts_of(value)
            if kind not in containers.EXACT and containers.holds_attributes(kind):
                found[id(value)] = value
                to_see += [*containers.attributes_of(value).values(), *containers.in_slots(value)]
    return list(found.values()), tensors


class State:
    """What modules held: attributes, and what was in those that are containers or generators. No tensor is copied."""

    def __init__(
        self,
        attributes: list[tuple[dict[str, Any], dict[str, Any]]],
        filled: list[tuple[Any, Any]],
        watched: list[Any],
        odd: list[Any],
        drawn_from: list[torch.Generator],
        slots: list[tuple[Any, tuple[Any, ...]]],
    ) -> None:
        """``watched``: containers of which those that are not in ``filled`` held nothing. ``odd``: such of subclasses,
        which may tell otherwise. ``slots``: objects, and what they held there.
        """
        self._attributes = attributes
        self._filled = filled
        self._watched = watched
        self._odd = odd
        self._drawn_from = drawn_from
        self._slots = slots
        self._positions = [generator.get_state() for generator in drawn_from]

    def is_changed(self, ignored: frozenset[int]) -> bool:
        """Whether anything of it is another now. ``ignored``: ids of containers that may be."""
        return (
            any(not containers.is_same(now, held) for now, held in self._attributes)
            or any(not containers.is_same(now, held) for now, held in self._filled if id(now) not in ignored)
            or any(id(now) not in ignored for now in self._filled_since())
            or any(not all(map(is_, containers.in_slots(now), held)) for now, held in self._slots)
            or any(not torch.equal(g.get_state(), at) for g, at in zip(self._drawn_from, self._positions, strict=True))
        )

    def containers(self) -> Iterator[object]:
        """Yield the containers and generators that are put back."""
        yield from (*self._watched, *self._odd, *(value for value, _ in self._filled), *self._drawn_from)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Have all be as it was, and afterwards as it is now."""
        attributes = [(now, now.copy()) for now, _ in self._attributes]
        exact, copied = containers.EXACT, containers.copied
        filled = [(value, value.copy() if type(value) in exact else copied(value)) for value, _ in self._filled]
        slots = [(value, containers.in_slots(value)) for value, _ in self._slots]
        positions = [generator.get_state() for generator in self._drawn_from]
        others = [(value, containers.copied(value)) for value in self._filled_since()]
        try:
            self._put(self._attributes, self._filled, self._positions, self._slots)
            for value, _ in others:
                containers.clear(value)
            yield
        finally:
            for value in self._filled_since():
                containers.clear(value)
            self._put(attributes, filled, positions, slots)
            self._put([], others, [], [])

    def _filled_since(self) -> list[Any]:
        """Return the containers that held nothing, and do now."""
        held = {id(value) for value, _ in self._filled}
        found = [value for value in self._watched if value and id(value) not in held]
        return found + [value for value in self._odd if containers.size_of(value) and id(value) not in held]

    def _put(
        self,
        attributes: list[tuple[dict[str, Any], dict[str, Any]]],
        filled: list[tuple[Any, Any]],
        positions: list[torch.Tensor],
        slots: list[tuple[Any, tuple[Any, ...]]],
    ) -> None:
        for value, parts in slots:
            containers.put_in_slots(value, parts)
        for now, held in attributes:
            now.update(held)
            if len(now) != len(held):
                for name in now.keys() - held.keys():
                    del now[name]
        for value, held in filled:
            if not containers.is_same(value, held):
                containers.fill(value, held)
        for generator, position in zip(self._drawn_from, positions, strict=False):
            generator.set_state(position)


class Setting:
    """The settings of one module's forwards."""

    def __init__(
        self, name: str, module: nn.Module, writes: Callable[[], int], apart: frozenset[int] = frozenset()
    ) -> None:
        """``writes``: how often frozen weights of it were written to so far. ``apart``: ids of the tensors whose writes
        that counts.
        """
        self._name = name
        self._module = module
        self._apart = apart
        self._writes = writes
        self._find_modules()

    def _find_modules(self) -> None:
        self._held = Held(self._module.modules())
        tuners = [module for module in self._held.modules if hasattr(type(module), "adapter_layer_names")]
        self._tuned = {part for tuner in tuners for part in tuner.modules()}
        # Of parameters that PEFT adapts by parametrizations: those come and go in each forward, and set a tensor to
        # itself.
        self._set = {part for tuner in tuners if "parameter_name" in tuner.__dict__ for part in tuner.modules()}
        self._children = [(module._modules, module._modules.copy()) for module in self._held.modules if module._modules]

    def now(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Now:
        """Return how all is now. ``args``, ``kwargs``: the forward's arguments."""
        # Modules are equal where they are the same.
        if any(now != held for now, held in self._children) or self._held.is_changed():
            self._find_modules()
        return Now(self._name, self._held, self._tuned, self._set, self._writes, self._apart, *reached(args, kwargs))


class Now:
    """The setting of one forward."""

    def __init__(
        self,
        name: str,
        held: Held,
        tuned: set[nn.Module],
        is_set: set[nn.Module],
        writes: Callable[[], int],
        apart: frozenset[int],
        given: Iterable[object],
        tensors: Sequence[torch.Tensor],
    ) -> None:
        """``given``, ``tensors``: see :func:`reached`."""
        self.modules = held.modules
        self._name = name
        self._state = held.state(given)
        self._kernels = kernels()
        self._count, self._writes = writes, writes()
        self._trained: list[nn.Parameter] = []
        self._others: list[torch.Tensor] = []
        """Buffers, and weights that nobody else looks after."""
        self._flags: list[tuple[nn.Parameter, bool]] = []
        for module in held.modules:
            for parameter in module._parameters.values() if module._parameters else ():
                if parameter is None:
                    continue
                is_trained = parameter.requires_grad
                if is_trained:
                    self._trained.append(parameter)
                elif id(parameter) not in apart and module not in is_set and not parameter.is_inference():
                    self._others.append(parameter)
                if module in tuned and parameter.is_leaf:
                    self._flags.append((parameter, is_trained))
            for buffer in module._buffers.values() if module._buffers else ():
                if buffer is not None and id(buffer) not in apart and not buffer.is_inference():
                    self._others.append(buffer)
        self._versions, self._steps = data_writes.states(self._trained), optimizer_steps.taken()
        self._other_versions = [tensor._version for tensor in self._others]
        # Those that are given by place a checkpoint watches itself, and may have elsewhere meanwhile.
        self._given = [(tensor, tensor._version) for tensor in tensors if not tensor.is_inference()]

    def refuse_written(self) -> None:
        """Raise RunError where the forward, which ends, has written to what it would write to a second time."""
        if [tensor._version for tensor in self._others] != self._other_versions:
            raise RunError(
                f"the forward of {self._name} wrote in place to a buffer or a frozen weight, which it did not as it "
                f"was planned, and the plan runs it a second time in backward: {_KEEP}, or plan anew where it does "
                "so at once"
            )

    @contextmanager
    def again(self) -> Iterator[None]:
        """Have all be as it was. Raises RunError where that cannot be."""
        if (
            data_writes.states(self._trained) != self._versions
            or optimizer_steps.are_stepped(self._steps, self._trained)
            or [tensor._version for tensor in self._others] != self._other_versions
            or self._count() != self._writes
        ):
            raise RunError(
                f"weights of {self._name} were written to between its forward and its backward, in which the plan "
                f"runs it once more: write to them after backward(), or {_KEEP}"
            )
        if any(tensor._version != version for tensor, version in self._given):
            raise RunError(
                f"a tensor that {self._name} was called with was written to between its forward and its backward, in "
                f"which the plan runs it once more: write to a copy, or after backward(), or {_KEEP}"
            )
        had_kernels = kernels()
        flags = [(parameter, flag) for parameter, flag in self._flags if parameter.requires_grad != flag]
        drawn = positions()
        try:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)
            _set_kernels(self._kernels)
            with self._state.again():
                yield
        finally:
            _set_kernels(had_kernels)
            for parameter, flag in flags:
                parameter.requires_grad_(not flag)
            if positions() != drawn:  # a recompute is left by an error once it has all that is wanted
                raise RunError(
                    f"the forward of {self._name} drew Python's or NumPy's random numbers, which it did not as it "
                    f"was planned, and the plan runs it a second time in backward, with others: {_KEEP}, or plan "
                    "anew where it does so at once"
                )


def _set_kernels(given: tuple[bool, bool, bool, bool, str]) -> None:
    if given == kernels():
        return
    flash, efficient, math, cudnn, precision = given
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_math_sdp(math)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.set_float32_matmul_precision(precision)
