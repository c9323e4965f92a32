"""Graphs of models that several tests plan for, each traced once: a trace takes a second, a step of such a model far less."""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType

import torch
from torch import nn

from memplan.analyze.graph import LayerGraph
from memplan.analyze.trace import analyze
from memplan.triggers import tensors_in

_SCALARS = (int, float, str, bool, type(None), torch.dtype, torch.device, torch.Size)
_known: dict[tuple[object, ...], LayerGraph] = {}


def graph_of(model: nn.Module, batch, loss, **options) -> LayerGraph:
    """Return ``analyze(model, batch, loss=loss, **options)``, from memory where a model just like it was analyzed before."""
    context = (torch.is_autocast_enabled("cpu"), torch.get_autocast_dtype("cpu"), torch.is_grad_enabled())
    given = tuple((tuple(t.shape), t.dtype, hash(t.numpy().tobytes())) for t in tensors_in(batch))
    key = (_structure(model), given, loss, tuple(sorted(options.items())), context)
    if key not in _known:
        _known[key] = analyze(model, batch, loss=loss, **options)
    return _known[key]


def _structure(model: nn.Module) -> tuple[object, ...]:
    """Everything of a model that a trace may depend on, but for the values of its weights."""
    modules = tuple((name, type(module), _held(module.__dict__)) for name, module in model.named_modules())
    first: dict[int, str] = {}
    tied = tuple(first.setdefault(id(p), name) for name, p in model.named_parameters(remove_duplicate=False))
    return modules, tied


def _held(value: object, deep: int = 0) -> object:
    if isinstance(value, _SCALARS):
        return value
    if isinstance(value, torch.Tensor):
        return type(value), tuple(value.shape), value.dtype, value.stride(), value.requires_grad
    if isinstance(value, dict):
        return tuple((str(name), _held(part, deep + 1)) for name, part in value.items() if name != "_modules")
    if isinstance(value, (list, tuple, set, frozenset)):
        return type(value), tuple(_held(part, deep + 1) for part in value)
    if isinstance(value, nn.Module) or deep > 6:
        return type(value)
    if isinstance(value, partial):
        return _held(value.func, deep + 1), _held(value.args, deep + 1), _held(value.keywords, deep + 1)
    if isinstance(value, MethodType):
        return value.__qualname__
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or ()]
        return value.__module__, value.__qualname__, _held(cells, deep + 1)
    return type(value), _held(getattr(value, "__dict__", {}), deep + 1)
