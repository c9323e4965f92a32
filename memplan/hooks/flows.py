"""Gradients that come through a model of which nothing is trained: to what it is given, or to modules of others that
take part in its forward.

Networks that are trained beside a model (kohya's LoRA) take over the ``forward`` of its layers or hook them. What such
a function holds is looked at: what it is bound to, its variables and defaults, and the global names that it uses.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from memplan.hooks.nested import tensors_in
from memplan.state.holders import is_ours

_DEEPEST = 4
"""Objects within objects that are looked into."""


def gradients_flow(model: nn.Module, given: object) -> bool:
    """Whether a gradient goes on through ``model``, called with ``given`` (tensors in containers): what is trained
    within it apart.
    """
    return any(tensor.requires_grad for tensor in tensors_in(given)) or _taken_over(model)


def leaves_behind(tensors: Iterator[torch.Tensor]) -> list[torch.Tensor]:
    """Return the trained tensors that others were made of, as autograd knows them, each once."""
    found: dict[int, torch.Tensor] = {}
    nodes = []
    for tensor in tensors:
        if tensor.grad_fn is not None:
            nodes.append(tensor.grad_fn)
        elif tensor.requires_grad:
            found[id(tensor)] = tensor
    seen = set(nodes)
    while nodes:
        node = nodes.pop()
        leaf = getattr(node, "variable", None)
        if leaf is not None:
            found[id(leaf)] = leaf
        for parent, _ in node.next_functions:
            if parent is not None and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    return list(found.values())


def _taken_over(model: nn.Module) -> bool:
    """Whether functions of others, which hold what is trained, take part in a model's forward."""
    own = {id(parameter) for parameter in model.parameters()}
    seen: set[int] = {id(module) for module in model.modules()}
    for module in model.modules():
        functions = [
            *module._forward_hooks.values(),
            *module._forward_pre_hooks.values(),
            *(module.__dict__[name] for name in ("forward", "_call_impl") if name in module.__dict__),
        ]
        for function in functions:
            if not is_ours(function) and any(id(held) not in own for held in _trained(function, _DEEPEST, seen)):
                return True
    return False


def _trained(value: Any, depth: int, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the trained tensors that a value holds."""
    if isinstance(value, torch.Tensor):
        if value.requires_grad:
            yield value
        return
    if id(value) in seen or isinstance(value, (str, bytes, int, float, type, type(None))):
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        yield from (parameter for parameter in value.parameters() if parameter.requires_grad)
    for part in _parts(value) if depth else ():
        yield from _trained(part, depth - 1, seen)


def _parts(value: Any) -> list[Any]:
    if isinstance(value, MethodType):
        return [value.__self__, value.__func__]
    if isinstance(value, partial):
        return [value.func, *value.args, *value.keywords.values()]
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if _is_filled(cell)]
        used = [value.__globals__.get(name) for name in value.__code__.co_names]
        held = [one for one in used if isinstance(one, (nn.Module, torch.Tensor, dict, list, tuple))]
        return [*cells, *(value.__defaults__ or ()), *(value.__kwdefaults__ or {}).values(), *held]
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, (list, tuple, set)):
        return list(value)
    return list(getattr(value, "__dict__", {}).values())


def _is_filled(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return False
    return True
