"""Where a script enters a model: the outermost calls of its modules, whichever of them it calls.

``model(**batch)`` enters by the model itself; ``model.forward(...)``, a method such as ``get_text_features``, and a
backbone that is called by itself enter by modules within. What a script calls from one backward to the next is what a
plan is to be for.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import nn

from memplan.hooks.nested import changed, tensors_in
from memplan.hooks.triggers import in_backward
from memplan.model.calls import Call, Step
from memplan.state import optimizer_steps

CALL = "_call_impl"
"""What a module's call comes to before its hooks are looked at."""
MOST_CALLS = 64
"""Of a pass: beyond that nobody plans for all of them."""
_MOST_VALUES = 1 << 20
"""Of a tensor of whole numbers that is kept as it is, since a forward may decide by them."""


class Entries:
    """Has the outermost calls of a model's modules come to ``enter(module, args, kwargs)``, which makes them with
    :meth:`run`.
    """

    def __init__(self, model: nn.Module, enter: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Any]) -> None:
        self.enter = enter
        self.is_inside = False
        self._stands = [_Entry(module, self) for module in model.modules()]
        for entry in self._stands:
            own = entry.module.__dict__
            own[CALL] = types.MethodType(_Entry._call_impl, entry)
            for name, function in _COPIES.items():
                own[name] = types.MethodType(function, entry.module)

    def remove(self) -> None:
        """Have the modules called as ever."""
        for entry in self._stands:
            entry.step_aside()
        self._stands.clear()

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a call returns; what is called within it enters the model no more."""
        self.is_inside = True
        try:
            return nn.Module._call_impl(module, *args, **kwargs)
        finally:
            self.is_inside = False


class _Entry:
    """Stands for the call of one module."""

    def __init__(self, module: nn.Module, entries: Entries | None) -> None:
        self.module = module
        self.entries = entries

    def _call_impl(self, *args: Any, **kwargs: Any) -> Any:
        entries = self.entries
        # Within a compiled region the graph is to be what it would be without memplan.
        if torch.compiler.is_compiling() or entries is None or entries.is_inside or in_backward():
            return nn.Module._call_impl(self.module, *args, **kwargs)
        return entries.enter(self.module, args, kwargs)

    def step_aside(self) -> None:
        self.entries = None
        own = self.module.__dict__
        if getattr(own.get(CALL), "__self__", None) is self:
            del own[CALL]
            for name in _COPIES:
                own.pop(name, None)


def _state(module: nn.Module) -> Any:
    """Stand for ``__getstate__``: a copy is called as its class is."""
    state = type(module).__getstate__(module)
    if isinstance(state, dict):  # it may be the module's own
        return {name: held for name, held in state.items() if name not in STANDING}
    return state


def _replica(module: nn.Module) -> nn.Module:
    """Stand for ``_replicate_for_data_parallel``."""
    made: nn.Module = type(module)._replicate_for_data_parallel(module)
    for name in STANDING:
        made.__dict__.pop(name, None)
    return made


_COPIES: dict[str, Callable[..., Any]] = {"__getstate__": _state, "_replicate_for_data_parallel": _replica}
STANDING = (CALL, *_COPIES)
"""What a module has of its own while its calls are looked at."""


@dataclass(slots=True, eq=False)
class _Seen:
    """One call."""

    call: Call
    outputs: tuple[ref[torch.Tensor], ...] = ()
    """Of what it made, what a gradient may come back to."""
    is_made: bool = False
    """There were such."""
    is_reached: bool = False
    """A gradient came back."""

    def is_open(self) -> bool:
        """Whether a gradient may yet come back."""
        return not self.is_reached and any(output() is not None for output in self.outputs)


class Calls:
    """The outermost calls of one model's modules with gradients, as they come."""

    def __init__(self, model: nn.Module) -> None:
        self._names = {id(module): name for name, module in model.named_modules()}
        self._seen: list[_Seen] = []
        """Of the pass under way."""
        self._passes: dict[object, tuple[Call, ...]] = {}
        """Those that are over, each kind once."""
        self._steps = optimizer_steps.taken()

    def see(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Seen:
        """Note a call, of which no activation is held."""
        seen = _Seen(self.call(module, changed(args, _outline), changed(kwargs, _outline)))
        key = key_of(seen.call)
        # What no gradient comes back to may be called any number of times before a pass.
        self._seen = [one for one in self._seen if one.is_made or key_of(one.call) != key]
        self._seen.append(seen)
        return seen

    def add(self, call: Call) -> None:
        """Note a call that was seen elsewhere, and makes nothing that a gradient comes back to."""
        self._seen.append(_Seen(call))

    def call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """Return a call by the name of the module within the model."""
        return Call.of(self._names.get(id(module), ""), args, kwargs)

    def made(self, seen: _Seen, output: object) -> None:
        """Note what a call returned."""
        made = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
        seen.is_made = bool(made)
        seen.outputs = tuple(map(ref, made))

        def reached(*gradients: object) -> None:
            seen.is_reached = True

        for node in {tensor.grad_fn for tensor in made if tensor.grad_fn is not None}:
            node.register_prehook(reached)

    def without_gradient(self) -> list[Call]:
        """Return the calls so far that no gradient comes back to."""
        return [seen.call for seen in self._seen if not seen.is_made]

    @property
    def count(self) -> int:
        return len(self._seen)

    def are_over(self) -> bool:
        """Whether a gradient has come back to some, and none may come to others any more."""
        return any(seen.is_reached for seen in self._seen) and not any(seen.is_open() for seen in self._seen)

    def is_step_over(self) -> bool:
        """Whether an optimizer has stepped after a pass that is over: until then a gradient may come back once more,
        and micro-batches may call something else.
        """
        if self.are_over():
            calls = tuple(seen.call for seen in self._seen if seen.is_reached or not seen.is_made)
            self._passes.setdefault(tuple(map(key_of, calls)), calls)
            self._seen = []
        return bool(self._passes) and not self._seen and optimizer_steps.taken() != self._steps

    def of_step(self) -> tuple[Call, ...]:
        """Return the calls of the passes that are over: those that a gradient came back to, and those that make none.
        Of passes that call the same one counts; others count together.
        """
        return tuple(call for calls in self._passes.values() for call in calls)


def step_of(calls: tuple[Call, ...]) -> Step:
    """Return a step of calls, as far as they are known."""
    return Step(calls=calls, reads_rest=all(call.entry for call in calls))


def key_of(call: Call) -> object:
    """Return what two calls have in common that cost the same."""
    given = [(tuple(t.shape), t.dtype, t.requires_grad) for t in tensors_in((call.args, call.kwargs))]
    return call.entry, tuple(given), len(call.args), tuple(call.kwargs)


def _outline(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor's shape without its memory; small ones of whole numbers as they are."""
    if type(tensor) not in (torch.Tensor, nn.Parameter) or tensor.layout != torch.strided:
        return tensor.detach()
    if not tensor.dtype.is_floating_point and not tensor.dtype.is_complex and tensor.numel() <= _MOST_VALUES:
        return tensor.detach()
    made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
    return made.requires_grad_(tensor.requires_grad and tensor.dtype.is_floating_point)
