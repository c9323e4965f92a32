"""A mapped model that waits to be placed: at its first call to be trained, at the latest.

Until then the weights of a model that is to be trained in part stay where they are mapped, on the host, though the
script moves its model to a device: most of it is what would not fit there. What else the model has does move. A model
of which nothing is frozen, or nothing trained, moves as ever.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import types
from collections.abc import Callable, Iterator
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor

from memplan.hooks.compiled import untraced_deep
from memplan.hooks.flows import gradients_flow
from memplan.model.calls import Call, Step
from memplan.run.handle import handle_of
from memplan.run.modules.guard import without
from memplan.state import optimizer_steps
from memplan.trainers.loading.entries import MOST_CALLS, STANDING, Calls, Entries, key_of, step_of
from memplan.trainers.loading.stored import origin_of

Again = Callable[[Step, bool], None]
"""Told, once the first step is over, of all that its passes have called, and whether that is other than was placed
for.
"""
Place = Callable[[nn.Module, Step], Again | None]

_ENTRIES = "_memplan_entries"
_PLACE = "_memplan_place"
_ASKED = "_memplan_asked"
_MOST_BEFORE = 8
"""Calls without gradients before the first pass that are taken to be part of it."""


def wait(model: nn.Module, place: Place) -> None:
    """Have ``place`` called before the model, or a module within it, is first called to be trained, with it and what is
    called.

    Within what torch.compile makes of a model it is never called. What a model within this one waited for is forgotten.
    """
    forget(model)
    for name, function in _STANDING.items():
        model.__dict__[name] = types.MethodType(function, model)
    model.__dict__[_PLACE] = place
    model.__dict__[_ENTRIES] = _Waiting(model).entries


def waits(model: nn.Module) -> bool:
    """Whether a model, or one within it, is still to be placed."""
    return any(_PLACE in module.__dict__ for module in model.modules())


def waits_itself(model: nn.Module) -> bool:
    """Whether a model, and not one within it, is still to be placed."""
    return _PLACE in model.__dict__


def forget(model: nn.Module) -> None:
    """Have it wait no more; a move that was put off is still known (:func:`asked_device`)."""
    for module in model.modules():
        if module.__dict__.pop(_PLACE, None) is None:
            continue
        module.__dict__.pop(_ENTRIES).remove()
        for name, function in _STANDING.items():
            if getattr(module.__dict__.get(name), "__func__", None) is function:  # else a plan's guard stands there
                del module.__dict__[name]


@contextlib.contextmanager
def not_waiting(model: nn.Module) -> Iterator[None]:
    """Have it wait no more, unless what is done inside fails."""
    waited = [(module, module.__dict__[_PLACE]) for module in model.modules() if _PLACE in module.__dict__]
    forget(model)
    try:
        yield
    except BaseException:
        for module, place in waited:
            wait(module, place)
        raise


def ask(model: nn.Module, device: torch.device) -> None:
    """Have a waiting model asked to be on a device, as by a move that was put off."""
    for module in model.modules():
        module.__dict__[_ASKED] = device


def move(model: nn.Module) -> None:
    """Do the move that was put off, if one was."""
    device = asked_device(model)
    if device is not None:
        arrived(model)
        model.to(device)


def arrived(model: nn.Module) -> None:
    """Have a move that was put off be over: the model is placed."""
    for module in model.modules():
        module.__dict__.pop(_ASKED, None)


def asked_device(model: nn.Module) -> torch.device | None:
    """Return where a script has asked for a model to be, or one within it, where that was put off."""
    found = (module.__dict__.get(_ASKED) for module in model.modules())
    return next((device for device in found if device is not None), None)


def tell_device(kind: Any) -> Callable[[], None]:
    """Have a class's ``device`` be what the script asked for, though the move was put off; return what undoes it."""
    own = kind.__dict__.get("device")
    original = inspect.getattr_static(kind, "device")

    def device(model: nn.Module) -> torch.device:
        asked: torch.device | None = model.__dict__.get(_ASKED)
        found: torch.device = original.fget(model) if asked is None else asked
        return found

    def undo() -> None:
        if own is None:
            del kind.device
        else:
            kind.device = own

    kind.device = property(device, doc=original.__doc__)
    return undo


class _Waiting:
    """What is done with the calls of a model that waits."""

    def __init__(self, model: nn.Module) -> None:
        self._model = ref(model)
        self._calls = Calls(model)
        self._untrained = 0
        """Calls with gradients of a model that is not trained in part."""
        self.entries = Entries(model, self.enter)

    @untraced_deep
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call of a module of the model, which is placed before where that is to be trained."""
        model = self._model()
        if model is None or isinstance(next(model.parameters(), None), FakeTensor):  # the script plans for itself
            return self.entries.run(module, args, kwargs)
        if handle_of(model) is not None:  # the script has placed it itself
            forget(model)
            arrived(model)
            return self.entries.run(module, args, kwargs)
        device = asked_device(model)
        if torch.is_grad_enabled() and _is_trained(model, module, (args, kwargs)):
            return self._place(model, module, args, kwargs, device)
        if device is not None and not is_trained_in_part(model):
            forget(model)
            move(model)
            device = None
        if device is None:
            return self._run(model, module, args, kwargs)
        with _Together(module):
            args, kwargs = _sent((args, kwargs), torch.device("cpu"))
            return _sent(self._run(model, module, args, kwargs), device)

    def _run(self, model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not torch.is_grad_enabled():
            return self.entries.run(module, args, kwargs)
        if not is_trained_in_part(model):
            self._untrained += 1
            if self._untrained > MOST_CALLS:  # it is trained whole, or only ever read: looked at no more
                forget(model)
                return self.entries.run(module, args, kwargs)
        seen = self._calls.see(module, args, kwargs)
        output = self.entries.run(module, args, kwargs)
        self._calls.made(seen, output)
        return output

    def _place(
        self, model: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], device: Any
    ) -> Any:
        place = model.__dict__[_PLACE]
        before = self._calls.without_gradient()[-_MOST_BEFORE:]
        step = step_of((*before, self._calls.call(module, args, kwargs)))
        with not_waiting(model):  # where it fails the script may try again with less
            again = place(model, step)
        if device is not None:  # a script may have its first batch where the weights were
            args, kwargs = _sent((args, kwargs), device)
        if again is None:  # it may wait again, for another model
            entries: Entries = model.__dict__.get(_ENTRIES, self.entries)
            return entries.run(module, args, kwargs)
        first = FirstPass(model, step, again)
        first.before(before)
        return first.enter(module, args, kwargs)


class FirstPass:
    """Looks at the first step of a model that was placed for what it was first called with."""

    def __init__(self, model: nn.Module, step: Step, again: Again) -> None:
        self._model = ref(model)
        self._calls = Calls(model)
        self._keys = [key_of(call) for call in step.calls]
        self._modes = _modes(model)
        self._modes_seen = self._modes
        self._again = again
        self._unwatch = optimizer_steps.watch(model)
        self._entries = Entries(model, self.enter)

    def before(self, calls: list[Call]) -> None:
        """Note calls that came before it was placed, and belong to the pass."""
        for call in calls:
            self._calls.add(call)

    @untraced_deep
    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the call of a module of the model; the first after the step finds it placed for all of that."""
        model = self._model()
        if model is None or not torch.is_grad_enabled():
            return self._entries.run(module, args, kwargs)
        if self._calls.is_step_over():
            self._end()
            calls = self._calls.of_step()
            differs = [key_of(call) for call in calls] != self._keys or self._modes_seen != self._modes
            with _in_modes(model, self._modes_seen):
                self._again(step_of(calls), differs)
            return self._entries.run(module, args, kwargs)
        if self._calls.count >= MOST_CALLS:
            self._end()
            return self._entries.run(module, args, kwargs)
        seen = self._calls.see(module, args, kwargs)
        self._modes_seen = _modes(model)
        output = self._entries.run(module, args, kwargs)
        self._calls.made(seen, output)
        return output

    def _end(self) -> None:
        self._entries.remove()
        self._unwatch()


def _modes(model: nn.Module) -> tuple[bool, ...]:
    return tuple(module.training for module in model.modules())


@contextlib.contextmanager
def _in_modes(model: nn.Module, modes: tuple[bool, ...]) -> Iterator[None]:
    """Have modules in the modes of :func:`_modes` inside."""
    modules = list(model.modules())
    before = [module.training for module in modules]
    try:
        for module, mode in zip(modules, modes, strict=False):
            module.training = mode
        yield
    finally:
        for module, mode in zip(modules, before, strict=True):
            module.training = mode


def _sent(held: Any, device: torch.device) -> Any:
    from accelerate.utils import send_to_device

    return send_to_device(held, device)


class _Together:
    """Has all of a waiting model where its weights are mapped, for a call without gradients before it is trained."""

    def __init__(self, model: nn.Module) -> None:
        tensors = [*model.parameters(), *model.buffers()]
        self._away = [(tensor, tensor.data) for tensor in tensors if tensor.device.type not in ("cpu", "meta")]

    def __enter__(self) -> None:
        for tensor, data in self._away:
            tensor.data = data.cpu()

    def __exit__(self, *error: object) -> None:
        for tensor, data in self._away:
            data.copy_(tensor.data)  # a buffer may count
            tensor.data = data


def _apply(model: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Stand for ``_apply``, which ``.to``, ``.cuda`` and their like go through: a move of mapped weights is put off."""
    asked: list[torch.device] = []
    staying = [(module, _staying(module, fn, asked)) for module in model.modules()] if is_trained_in_part(model) else []
    for module in model.modules() if asked else ():
        module.__dict__[_ASKED] = asked[0]  # of every part: a script may ask any of them where it is

    def rest() -> None:
        type(model)._apply(model, fn, recurse)

    act = rest
    for module, names in staying:
        if names:
            act = _hiding(module, names, act)
    act()
    return model


def _hiding(module: nn.Module, names: list[str], act: Callable[[], None]) -> Callable[[], None]:
    return lambda: without(module, names, act)


def _staying(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], asked: list[torch.device]) -> list[str]:
    """Return the names of a module's own mapped weights that ``fn`` would move, cast as it would; add where to."""
    names = []
    for name, parameter in module._parameters.items():
        if parameter is None or parameter.requires_grad or origin_of(parameter) is None:
            continue
        moved = _moved(fn, parameter.dtype) if parameter.device.type == "cpu" else None
        if moved is not None:
            names.append(name)
            if moved.dtype != parameter.dtype:
                parameter.data = fn(parameter.data).cpu()
            asked.append(moved.device)
    return names


def is_trained_in_part(model: nn.Module) -> bool:
    """Whether some of a model is frozen and some is trained."""
    return len({parameter.requires_grad for parameter in model.parameters()}) == 2


def _is_trained(model: nn.Module, module: nn.Module, given: object) -> bool:
    """Whether a call with gradients of a module of a model is one to be trained: in whichever mode, but a model as it
    was loaded, of which nothing is frozen yet, may just be looked at; and one that is wholly frozen may be read.
    """
    kinds = {parameter.requires_grad for parameter in model.parameters()}
    if kinds == {True}:
        return model.training and module is model
    return any(parameter.requires_grad for parameter in module.parameters()) or gradients_flow(module, given)


def _moved(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """Return what ``fn`` makes of a tensor on the CPU, where that is to move it, and to cast it at most; else None."""
    probe = (torch.arange(1, 9) * 0.3).to(dtype)
    moved = fn(probe)
    if moved.device.type == "cpu" or moved.shape != probe.shape:
        return None
    if moved.device.type == "meta":
        return moved if moved.dtype == dtype else None
    return moved if torch.equal(moved.cpu(), probe.to(moved.dtype)) else None


@contextlib.contextmanager
def _plain(model: nn.Module) -> Iterator[None]:
    """Have a model's own attributes be those that it would have did it not wait."""
    names = (_PLACE, _ENTRIES, *STANDING, *_STANDING)
    away = {name: model.__dict__.pop(name) for name in names if name in model.__dict__}
    try:
        yield
    finally:
        model.__dict__.update(away)


def _copied(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """Stand for ``__deepcopy__``: a copy waits for itself."""
    place = model.__dict__[_PLACE]
    with _plain(model):
        other = copy.deepcopy(model, memo)
    wait(other, place)
    return other


def _reduced(model: nn.Module, protocol: Any) -> Any:
    """Stand for ``__reduce_ex__``: what is pickled waits for nothing."""
    with _plain(model):
        reduced: Any = model.__reduce_ex__(protocol)
    make, given, state, *rest = reduced
    if isinstance(state, dict):  # it may be the model's own
        state = {name: held for name, held in state.items() if name not in (_PLACE, _ENTRIES, *STANDING, *_STANDING)}
    return make, given, state, *rest


_STANDING: dict[str, Callable[..., Any]] = {
    "_apply": _apply,
    "__deepcopy__": _copied,
    "__reduce_ex__": _reduced,
}
"""What stands for a waiting model's own methods."""
