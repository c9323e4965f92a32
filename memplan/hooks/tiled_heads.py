"""Heads that a library multiplies with by tiles, without a call of them: TRL's fused LM head.

[Note: a head that is not called] TRL's trainers compute the log-probabilities of labels from ``lm_head.weight``, a tile
of the logits at a time, and never call the head. A read that no call announces could not be foreseen, so the head would
have to stay on the device. While a model is looked at or under a plan, the tiles are therefore computed *within a
call of the head*: its hooks run around them, so that its weights come in time for both forward and backward, which
makes them once more. What is computed is TRL's own function, on the same tensors: the same bits.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from memplan.hooks.compiled import replace_call, takes_no_hooks
from memplan.hooks.owner import is_of

_USER, _KERNELS, _NAME = "trl.trainer.utils", "trl.kernels.chunked_logprob", "_ChunkedLogProbFunction"
_HEADS: list[WeakSet[nn.Module]] = []
"""Of the models that are looked at or under a plan now: their heads."""


def call_within(module: nn.Module, function: Callable[..., Any], *args: Any) -> Any:
    """Return ``function(*args)``, computed where a module's forward would be: memplan's hooks on it run around it."""
    undo = replace_call(module, function)
    try:
        with _alone(module):
            return module(*args)
    finally:
        undo()


@contextmanager
def _alone(module: nn.Module) -> Iterator[None]:
    """Have a module's hooks be memplan's alone: the script's are of a call that its trainer does not make."""
    places = [place for place in (module._forward_pre_hooks, module._forward_hooks) if place]
    before = [list(place.items()) for place in places]
    hidden = [{key: hook for key, hook in held if not is_of(hook, "memplan")} for held in before]
    if not any(hidden):
        yield
        return
    for place, others in zip(places, hidden, strict=True):
        for key in others:
            del place[key]
    try:
        yield
    finally:
        for place, held, others in zip(places, before, hidden, strict=True):
            now = dict(place)
            place.clear()
            place.update({key: hook for key, hook in held if key in others or key in now})
            place.update(now)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module has hooks that are not memplan's."""
    places = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return any(not is_of(hook, "memplan") for place in places for hook in place.values())


def base_of(model: nn.Module) -> Any:
    """Return the model within PEFT's."""
    inner: Any = getattr(model, "get_base_model", None)
    return inner() if callable(inner) else model


def head_of_outputs(model: nn.Module) -> nn.Module | None:
    """Return the linear layer that makes a model's logits, by the model's own word; None where it names none."""
    base = base_of(model)
    named = getattr(base, "get_output_embeddings", None)
    try:
        head = named() if callable(named) else None
    except (AttributeError, NotImplementedError):  # a model that has no embeddings says so in these ways
        return None
    return head if isinstance(head, nn.Linear) else None


def serve_tiles(model: nn.Module) -> Callable[[], None]:
    """Have tiles of a model's head be computed within a call of it; return what undoes it.

    Nothing is done where TRL was not imported: a model that has its fused head has had it imported.
    """
    head, user = head_of_outputs(model), sys.modules.get(_USER)
    if head is None or user is None or not hasattr(user, _NAME) or takes_no_hooks(head):
        return lambda: None
    if not _HEADS:
        setattr(user, _NAME, _Served(getattr(user, _NAME)))
    mine: WeakSet[nn.Module] = WeakSet((head,))
    _HEADS.append(mine)

    def undo() -> None:
        for place, held in enumerate(_HEADS):  # sets that hold the same are equal
            if held is mine:
                del _HEADS[place]
                break
        if not _HEADS and isinstance(stands := getattr(user, _NAME), _Served):
            setattr(user, _NAME, stands.original)

    return undo


class _Served:
    """Stands for TRL's function where its fused head looks that up."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def __getattr__(self, name: str) -> Any:
        return getattr(self.original, name)

    def apply(self, hidden: torch.Tensor, weight: torch.Tensor, *more: Any) -> Any:
        for heads in _HEADS:
            for head in heads:
                if head._parameters.get("weight") is weight:
                    return call_within(head, self.original.apply, hidden, weight, *more)
        return self.original.apply(hidden, weight, *more)


@contextmanager
def tiles_by_kernels() -> Iterator[None]:
    """Have TRL's tiles take what they take on a GPU, for a trace: there a kernel of Triton's turns a tile into what is
    wanted where it lies; on the CPU operators of torch's do, which make several tensors of its size.
    """
    kernels = sys.modules.get(_KERNELS)
    if kernels is None:
        yield
        return
    stand_ins = {"_forward_tile": _in_place, "_backward_tile": _in_place, "_addmm_fp32": _add_product}
    before = {name: getattr(kernels, name) for name in stand_ins if hasattr(kernels, name)}
    try:
        for name in before:
            setattr(kernels, name, stand_ins[name])
        yield
    finally:
        for name, function in before.items():
            setattr(kernels, name, function)


def _in_place(tile: torch.Tensor, *args: object, **options: object) -> None:
    tile.mul_(1.0)  # it is read and written once


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """Stand for a product that is added in float32 as it is made: neither factor is cast."""
    total.add_(torch.mm(a, b))


def fused_head() -> Callable[..., None]:
    """Return TRL's function that gives a model a fused head. Raises ImportError."""
    found: Callable[..., None] = importlib.import_module(_USER).add_fused_lm_head
    return found
