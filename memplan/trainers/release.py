"""A model under a plan in the hands of a script that knows nothing of it: what a plan refuses, it gets whole."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memplan.errors import MovedWeightsError
from memplan.run.handle import Handle
from memplan.run.modules.guard import MERGES, Guard, guard_of
from memplan.trainers.launch import say
from memplan.trainers.loading.mapped_weights import is_mapped

_CALLS = {
    "compile": "compiled",
    "merge": "merged",
    "unmerge": "unmerged",
    "unload": "unloaded",
    **dict.fromkeys(MERGES, "merged"),
    "unmerge_adapter": "unmerged",
}
"""Methods that are refused under a plan, or would see placeholders, and what becomes of the model or its adapter by
them.
"""


def give_back(handle: Handle, why: str) -> None:
    """Have a model be as without memplan from here on: what was mapped from files is mapped again, on the host."""
    if not handle.is_attached:
        return
    model = taken_back(handle)
    if is_mapped(model):
        model.to("cpu")
    say(f"{why}: from here on the model is whole")


def taken_back(handle: Handle) -> nn.Module:
    """Detach a model, with nothing left of what lets a script do as it likes; return it."""
    model = handle.detach()
    for module in model.modules():  # what stands for methods that no guard took away again
        for name in ("_apply", "__deepcopy__", "__reduce_ex__", *_CALLS):
            if getattr(module.__dict__.get(name), "__module__", None) == __name__:
                del module.__dict__[name]
    return model


def let_go(handle: Handle) -> None:
    """Have casts, moves, copies and merges be done as without memplan, to the whole model; without this they are
    refused.
    """
    for module in handle.model.modules():
        guard = guard_of(module)
        if guard is None:
            continue
        own = module.__dict__
        own["_apply"] = types.MethodType(
            _applying(handle, module), guard
        )  # known as the guard's own by what it is bound to
        own["__deepcopy__"] = _copying(handle, module)
        own["__reduce_ex__"] = _pickling(handle, module)
        for name, done in _CALLS.items():
            if name in own or (name == "unload" and hasattr(type(module), name)):
                own[name] = _calling(handle, module, name, done)


def _applying(handle: Handle, module: nn.Module) -> Callable[..., nn.Module]:
    def apply(guard: Guard, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> nn.Module:
        if handle.is_attached:
            try:
                return guard.apply(fn, recurse)
            except MovedWeightsError:
                give_back(handle, "the model is cast or moved")
        type(module)._apply(module, fn, recurse)
        return module

    return apply


def _copying(handle: Handle, module: nn.Module) -> Callable[..., Any]:
    def deepcopy(memo: dict[int, Any]) -> Any:
        give_back(handle, "the model is copied")
        return copy.deepcopy(module, memo)

    return deepcopy


def _pickling(handle: Handle, module: nn.Module) -> Callable[..., Any]:
    def reduce_ex(protocol: int) -> Any:
        give_back(handle, "the model is pickled")
        return module.__reduce_ex__(protocol)

    return reduce_ex


def _calling(handle: Handle, module: nn.Module, name: str, done: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        give_back(handle, "the model is compiled" if name == "compile" else f"the adapter is {done}")
        return getattr(module, name)(*args, **kwargs)

    return call
