"""A model's tensors replaced by fake ones on the CPU for a while: shapes and dtypes without memory, nothing loaded."""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from functools import partial
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memplan.analyze.trace.fake_values import remember
from memplan.analyze.trace.swap_tensors import exchanged
from memplan.state.snapshot import Snapshot


@contextlib.contextmanager
def faked(
    model: nn.Module, mode: FakeTensorMode, snapshot: Snapshot | None = None, *, as_it_is: bool = False
) -> Iterator[dict[int, torch.Tensor]]:
    """Have fake tensors in place of all tensors that the model holds, in depth, in training mode.

    ``as_it_is``: in the mode that it is in instead. Gives the fake tensor of each by the real one's id. The model is
    restored on any way out, see ``exchanged``.
    """

    def fake(tensor: torch.Tensor, *, is_weight: bool) -> torch.Tensor:
        return fake_of(tensor, mode, valued=not is_weight)

    with exchanged(model, fake, snapshot, as_it_is=as_it_is) as fakes:
        for module in model.modules():
            module.__dict__["_apply"] = partial(_apply_where_it_changes, module)
        yield fakes


def fake_of(tensor: torch.Tensor, mode: FakeTensorMode, *, valued: bool = True) -> torch.Tensor:
    """Return a fake tensor on the CPU of the same shape, strides and dtype, a parameter for a parameter.

    ``valued``: small values of integers are remembered, since a forward may ask for them (masks, lengths).
    """
    expanded = any(stride == 0 for stride in tensor.stride()) and tensor.numel() > 1
    with mode:
        if expanded:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        else:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
    if valued and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        known = tensor.device.type != "meta" and type(tensor) in (torch.Tensor, nn.Buffer)
        # Of a tensor without values: ones, so that a mask is a mask of everything. Else a copy, which a forward may
        # write to.
        remember(made, tensor.detach().to("cpu", copy=True) if known else torch.ones(tensor.shape, dtype=tensor.dtype))
    return made


@contextlib.contextmanager
def eager_transformers() -> Iterator[None]:
    """Have transformers take the ways of a real run.

    It asks whether a mask is a fake tensor and then keeps masks that a run drops; values that it needs are known here.
    """
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    asked = getattr(utils, "is_fake_tensor", None)
    if asked is None:
        yield
        return
    utils.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        utils.is_fake_tensor = asked


@contextlib.contextmanager
def numbers_in_lists() -> Iterator[None]:
    """Have ``torch.tensor`` take lists of fake tensors, as it takes lists of real ones: positions are gathered so."""
    made = torch.tensor

    def plain(data: Any) -> Any:
        if isinstance(data, (list, tuple)):
            return [plain(part) for part in data]
        return data.tolist() if isinstance(data, FakeTensor) else data

    def tensor(data: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        return made(plain(data) if isinstance(data, (list, tuple)) else data, *args, **kwargs)

    torch.tensor = tensor
    try:
        yield
    finally:
        torch.tensor = made


@contextlib.contextmanager
def caches_empty(model: nn.Module) -> Iterator[None]:
    """Have what a model's classes and functions keep in a ``functools.lru_cache`` forgotten before and after.

    Else a trace would find real tensors there, and leave fake ones for the next forward.
    """
    caches = _caches_of(model)
    try:
        for cache in caches:
            cache.cache_clear()
        yield
    finally:
        for cache in caches:
            cache.cache_clear()


_LIBRARIES = ("transformers", "diffusers", "peft")


def _caches_of(model: nn.Module) -> list[Any]:
    kinds = {
        kind
        for module in model.modules()
        for holder in (module, *vars(module).values())
        for kind in type(holder).__mro__
        if kind.__module__.partition(".")[0] not in ("builtins", "torch", "typing", "collections")
    }
    held = [value for kind in kinds for value in vars(kind).values()]
    # Of a script's own module only what its classes keep: other functions there are none of ours.
    for name in {kind.__module__ for kind in kinds if kind.__module__.partition(".")[0] in _LIBRARIES}:
        held += vars(sys.modules[name]).values() if name in sys.modules else ()
    found = {}
    for value in held:
        cells = getattr(value, "__closure__", None) or () if isinstance(value, FunctionType) else ()
        for cache in (value, *(getattr(cell, "cell_contents", None) for cell in cells)):
            if isinstance(cache, functools._lru_cache_wrapper):
                found[id(cache)] = cache
    return list(found.values())


@contextlib.contextmanager
def numbers_in_text() -> Iterator[None]:
    """Have a fake tensor of one number written out in an f-string as a real one is: experts are found by such names."""

    def written(tensor: torch.Tensor, spec: str) -> str:
        return format(tensor.item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)

    had = FakeTensor.__dict__.get("__format__")
    FakeTensor.__format__ = written  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del FakeTensor.__format__
        else:
            FakeTensor.__format__ = had  # type: ignore[method-assign]


def _apply_where_it_changes(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Stand for ``_apply``: torch would swap a fake parameter even with itself, which our weak references forbid.

    Routers have a forward that casts them to the dtype that they have.
    """
    own = [tensor for held in (module._parameters, module._buffers) for tensor in held.values() if tensor is not None]
    with torch.no_grad():
        changed = any(moved.dtype != tensor.dtype for tensor in own for moved in (fn(tensor),))
    if changed:
        return type(module)._apply(module, fn, recurse)
    for child in module.children() if recurse else ():
        child._apply(fn)
    return module
