"""Functions of torch that its dispatcher does not ask in time: replaced while a model is under a plan.

``swap_tensors`` exchanges what tensors are, and not their values alone: a weight that comes and goes must stay one.
``as_subclass`` and its like make another tensor of the very one that they are given, which cannot be exchanged for its
true values any more when the dispatcher asks (:mod:`memplan.run.access.dispatched`). Functions that make tensors
(``torch.tensor`` and others) are never replaced: torch keeps tables of them, made when they are first asked for, by
which ``torch.device("meta")`` knows what to do.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch.utils import dlpack

_FUNCTIONS: tuple[tuple[Any, str], ...] = (
    (torch, "to_dlpack"),
    (dlpack, "to_dlpack"),
    (torch._C, "_to_dlpack"),
    (torch.Tensor, "as_subclass"),
    (torch.Tensor, "_make_subclass"),
    (torch.utils, "swap_tensors"),
    (torch.UntypedStorage, "_share_fd_cpu_"),
    (torch.UntypedStorage, "_share_filename_cpu_"),
)


class Server(Protocol):
    """Who serves the weights of one model, as far as these functions know."""

    def refuse_move(self, storage: torch.UntypedStorage) -> None: ...


_BEFORE: list[tuple[Any, str, Any]] = []
_UNDER_A_PLAN: weakref.WeakSet[Server] = weakref.WeakSet()

Find = Callable[[Any], Iterator[torch.Tensor]]
Serve = Callable[[Callable[..., Any], Any, Any, Sequence[torch.Tensor]], Any]
Swap = Callable[[Callable[..., None], torch.Tensor, torch.Tensor], None]


def replace_functions(server: Server, find: Find, serve: Serve, swap: Swap) -> None:
    """Have them serve weights too, until no server is left. ``find``: yields those that are away in arguments.
    ``swap``: does what ``swap_tensors`` does.
    """
    _UNDER_A_PLAN.add(server)
    if not _BEFORE:
        for owner, name in _FUNCTIONS:
            own = vars(owner).get(name)  # None: of a class that it inherits from
            function = getattr(owner, name)
            if name == "swap_tensors":
                served = _swapping(function, swap)
            elif owner is torch.UntypedStorage:
                served = _moving(function)
            else:
                served = _serving(function, find, serve)
            _BEFORE.append((owner, name, own))
            setattr(owner, name, staticmethod(served) if name == "_make_subclass" else served)


def restore_functions(server: Server) -> None:
    """Have no function serve a server any more."""
    _UNDER_A_PLAN.discard(server)
    if not _UNDER_A_PLAN:
        while _BEFORE:
            owner, name, own = _BEFORE.pop()
            if own is None:
                delattr(owner, name)
            else:
                setattr(owner, name, own)


def _serving(function: Callable[..., Any], find: Find, serve: Serve) -> Callable[..., Any]:
    @functools.wraps(function)
    def served(*args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            held = {id(tensor): tensor for tensor in find(args[:2])}
            if held:
                return serve(function, args, kwargs, tuple(held.values()))
        return function(*args, **kwargs)

    return served


def _swapping(function: Callable[..., None], swap: Swap) -> Callable[..., None]:
    @functools.wraps(function)
    def served(t1: torch.Tensor, t2: torch.Tensor) -> None:
        swap(function, t1, t2)

    return served


def _moving(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def moved(storage: torch.UntypedStorage, *args: Any, **kwargs: Any) -> Any:
        for server in tuple(_UNDER_A_PLAN):
            server.refuse_move(storage)
        return function(storage, *args, **kwargs)

    return moved
