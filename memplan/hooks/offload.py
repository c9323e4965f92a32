"""Offloading a module's saved activations, as planned. One way, for the analyzer's trace and for the run.

What autograd saves in a module's forward, and the forward itself made, is handed to a *keeper* once the forward has
ended, and asked back from it in backward. What was there before (inputs, weights, buffers) stays as it is.

[Note: handed over at the end] Until the forward ends the saved tensors are held as they are: a storage that two of them
share is moved once, one that is written to after it was saved is seen, and no address is used again under our eyes.
[Note: others' hooks] Inside a checkpoint or somebody else's saved-tensor hooks nothing is offloaded: they count what
they see. Hooks of memplan's own may lie around or within; what is not ours is handed on to those around.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from memplan.errors import RunError
from memplan.hooks.compiled import call_of, replace_call
from memplan.hooks.nested import tensors_in
from memplan.hooks.recompute import (
    are_memplans,
    drop_hooks_that_stayed,
    hooks_around,
    run_hooked,
    without_graph,
)
from memplan.hooks.triggers import in_backward
from memplan.model.weights import is_wrapper_type
from memplan.units import ALIGNMENT_BYTES


class Call(Protocol):
    """One forward whose saved activations are kept elsewhere. It lives as long as anything may ask for them."""

    def is_outside(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor is a weight, a buffer or the like, which stays where it is."""

    def take(self, tensor: torch.Tensor) -> int | None:
        """Keep the whole storage of a tensor; return where in the kept range, or None for no room."""

    def give(self, offset_bytes: int, like: Layout) -> torch.Tensor:
        """Return a tensor of its own, from kept bytes."""

    def ended(self) -> None:
        """The forward is over: nothing more is taken."""


class Layout:
    """How a tensor lies in its storage."""

    __slots__ = ("dtype", "offset", "shape", "stride")

    def __init__(self, tensor: torch.Tensor) -> None:
        self.dtype = tensor.dtype
        self.shape = tensor.shape
        self.stride = tensor.stride()
        self.offset = tensor.storage_offset()


class _Saved:
    """What autograd holds in place of a saved tensor."""

    __slots__ = ("__weakref__", "call", "layout", "name", "offset_bytes", "packed", "tensor", "version")

    def __init__(self, tensor: torch.Tensor, call: Call, name: str, packed: Any) -> None:
        self.tensor: torch.Tensor | None = without_graph(tensor)
        self.version = version_of(tensor)
        self.call = call
        self.name = name
        self.packed = packed
        """What the hooks around made of it, where it is theirs to keep."""
        self.layout: Layout | None = None
        self.offset_bytes = -1

    def unpacked(self, around: Any) -> torch.Tensor:
        if self.layout is not None:
            return self.call.give(self.offset_bytes, self.layout)
        if self.tensor is None or version_of(self.tensor) != self.version:
            raise changed(self.name)
        if self.packed is not None:
            value: torch.Tensor = around[1](self.packed)
            return value
        return self.tensor


def version_of(tensor: torch.Tensor) -> int:
    """Return how often a tensor was written to. torch looks at it itself, but not at what went through hooks."""
    return 0 if tensor.is_inference() else tensor._version


def changed(name: str) -> RunError:
    """Return the error of a saved tensor that was written to."""
    return RunError(
        f"what {name} saved for backward was written to since (an inplace operation), so a gradient would be wrong: "
        "make that operation out of place, or run the backward before it"
    )


def copy_of(kept: torch.Tensor, like: Layout) -> torch.Tensor:
    """Return a tensor of its own over the bytes (uint8) of a storage, each where it was to the alignment.

    [Note: a gradient may be what was saved] A backward may return a saved tensor, or write its result there: were it a
    view of the slot, what comes into the slot next would be the gradient.
    """
    item = like.dtype.itemsize
    first = like.offset * item
    begin = first // ALIGNMENT_BYTES * ALIGNMENT_BYTES
    extent = 0 if 0 in like.shape else 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride, strict=True))
    own = kept[begin : first + extent * item].clone().view(like.dtype)
    return own.as_strided(like.shape, like.stride, (first - begin) // item)


def wrap(module: nn.Module, name: str, begin: Callable[[], Call | None]) -> Callable[[], None]:
    """Offload what ``module``'s forward saves, inside its hooks; return what undoes it.

    ``begin`` returns the call that a forward is, or None where its activations are to stay where they are.
    """
    original = call_of(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        drop_hooks_that_stayed()
        around = hooks_around()
        foreign = around is not None and not are_memplans(around)
        if foreign or not torch.is_grad_enabled() or in_backward():
            return original(*args, **kwargs)
        call: Call | None = None
        try:
            call = begin()
            if call is None:
                return original(*args, **kwargs)
            return _forward(original, name, call, around, args, kwargs)
        finally:
            if call is not None:
                call.ended()

    return replace_call(module, forward)


def _forward(
    original: Callable[..., Any], name: str, call: Call, around: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Return what a forward returns; what it saves is the call's."""
    given = {tensor.untyped_storage()._cdata for tensor in tensors_in((args, kwargs)) if _is_plain(tensor)}
    found: list[weakref.ref[_Saved]] = []

    def pack(tensor: torch.Tensor) -> Any:
        if _is_plain(tensor) and tensor.untyped_storage()._cdata not in given and not call.is_outside(tensor):
            saved = _Saved(tensor, call, name, None)
            found.append(weakref.ref(saved))
            return saved
        return _Saved(tensor, call, name, None if around is None else around[0](tensor))

    def unpack(packed: _Saved) -> torch.Tensor:
        return packed.unpacked(around)

    output = run_hooked(lambda: original(*args, **kwargs), pack, unpack)
    _hand_over(call, found)
    return output


def _hand_over(call: Call, found: list[weakref.ref[_Saved]]) -> None:
    """Move the storages of all that is still saved; what finds no room stays as it is."""
    moved: dict[int, int | None] = {}  # by address: all were alive at once, so none comes twice
    for reference in found:
        saved = reference()
        if saved is None or saved.tensor is None:
            continue
        tensor = saved.tensor
        if version_of(tensor) != saved.version:
            saved.tensor = None
            continue
        storage = tensor.untyped_storage()
        if storage._cdata not in moved:
            moved[storage._cdata] = call.take(tensor)
        offset_bytes = moved[storage._cdata]
        if offset_bytes is not None:
            saved.layout, saved.offset_bytes, saved.tensor = Layout(tensor), offset_bytes, None


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor is one strided storage that can be moved as bytes."""
    return (
        tensor.layout == torch.strided
        and not tensor.is_nested
        and not tensor.is_conj()
        and not tensor.is_neg()
        and not is_wrapper_type(type(tensor))
        and not tensor.is_quantized
        and tensor.device.type != "meta"
    )
