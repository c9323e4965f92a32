"""A mapped model that waits to be placed: at its first call to be trained, at the latest.

Until then its weights stay where they are mapped, on the host, though the script moves its model to a device: most of
it is what would not fit there. What else the model has does move, and so do the weights that turn out to be trained.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from memplan.compiled import untraced_deep
from memplan.run.guard import without
from memplan.trainers.loading import origin_of

Place = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]

_CALL = "_call_impl"
"""What a module's call comes to before its hooks are looked at."""
_PLACE = "_memplan_place"


def wait(model: nn.Module, place: Place) -> None:
    """Have ``place`` called before the model is first called to be trained, with it and what it is called with.

    Within what torch.compile makes of a model it is never called.
    """
    forget(model)
    # Bound methods: a deep copy of the model has its own.
    model.__dict__[_CALL] = types.MethodType(_first_call, model)
    model.__dict__[_PLACE] = place
    for module in model.modules():
        if any(True for _ in _mapped(module)):
            module.__dict__["_apply"] = types.MethodType(_apply, module)


def waits(model: nn.Module) -> bool:
    """Whether a model, or one within it, is still to be placed."""
    return any(_CALL in module.__dict__ for module in model.modules())


def forget(model: nn.Module) -> None:
    """Have it wait no more; what was to be moved stays until :func:`move`."""
    for module in model.modules():
        module.__dict__.pop(_CALL, None)
        module.__dict__.pop(_PLACE, None)


def move(model: nn.Module, device: torch.device | None = None) -> None:
    """Do the moves that were put off, of those weights that are still there to be moved.

    ``device``: where to, where it was forgotten (:func:`asked_device`).
    """
    for module in model.modules():
        own = module.__dict__.get("_apply")
        if getattr(own, "__func__", None) is _apply:
            del module.__dict__["_apply"]
        asked = module.__dict__.pop("_memplan_asked", device)
        if asked is not None and any(parameter.device.type == "cpu" for _, parameter in _mapped(module)):
            type(module)._apply(module, lambda tensor, asked=asked: tensor.to(asked), recurse=False)


def asked_device(model: nn.Module) -> torch.device | None:
    """Return where the script has asked a waiting model to be moved to, if it has."""
    found = (module.__dict__.get("_memplan_asked") for module in model.modules())
    return next((device for device in found if device is not None), None)


def _first_call(model: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Stand for a model's call."""
    if torch.compiler.is_compiling():  # its graph is to be what it would be without memplan
        return nn.Module._call_impl(model, *args, **kwargs)
    return _watched_call(model, args, kwargs)


@untraced_deep
def _watched_call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    from accelerate.utils import send_to_device

    device = asked_device(model)
    if model.training and torch.is_grad_enabled():
        place = model.__dict__[_PLACE]
        forget(model)
        place(model, args, kwargs)
        if device is not None:  # a script asks the model where it is, and then has its batch there
            args, kwargs = send_to_device((args, kwargs), device)
        return nn.Module._call_impl(model, *args, **kwargs)
    if device is None:
        return nn.Module._call_impl(model, *args, **kwargs)
    with _together(model):
        args, kwargs = send_to_device((args, kwargs), torch.device("cpu"))
        return send_to_device(nn.Module._call_impl(model, *args, **kwargs), device)


class _together:
    """Has all of a waiting model where its weights are mapped, for a call before it is trained."""

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


def _apply(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
    """Stand for ``_apply``, which ``.to``, ``.cuda`` and their like go through: a move of mapped weights is put off."""
    staying = []
    for name, parameter in _mapped(module):
        moved = _moved(fn, parameter.dtype) if parameter.device.type == "cpu" else None
        if moved is not None:
            staying.append(name)
            module.__dict__["_memplan_asked"] = moved.device
            if moved.dtype != parameter.dtype:
                parameter.data = fn(parameter.data).cpu()
    without(module, staying, lambda: type(module)._apply(module, fn, recurse))
    return module


def _moved(fn: Callable[[torch.Tensor], torch.Tensor], dtype: torch.dtype) -> torch.Tensor | None:
    """Return what ``fn`` makes of a tensor on the CPU, where that is to move it, and to cast it at most; else None."""
    probe = (torch.arange(1, 9) * 0.3).to(dtype)
    moved = fn(probe)
    if moved.device.type == "cpu" or moved.shape != probe.shape:
        return None
    if moved.device.type == "meta":
        return moved if moved.dtype == dtype else None
    return moved if torch.equal(moved.cpu(), probe.to(moved.dtype)) else None


def _mapped(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    for name, parameter in module._parameters.items():
        if parameter is not None and origin_of(parameter) is not None:
            yield name, parameter
