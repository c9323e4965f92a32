"""DDP, which is to leave alone what memplan places: frozen weights that are streamed, or mapped from files.

DDP broadcasts a module's parameters and buffers as it is built: into placeholders that is an error, and into a private
mapping it would make memory of this process's own of the whole model. Its constructor is where all of them are known by
identity, whatever they are called there, so that is where their names are put on its list of what to ignore.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any
from weakref import WeakSet

from torch import nn
from torch.nn.parallel import DistributedDataParallel

_IGNORED = "_ddp_params_and_buffers_to_ignore"
_SOURCES: list[Callable[[nn.Module], Iterable[int]]] = []
_WRAPPERS: WeakSet[DistributedDataParallel] = WeakSet()


def leave_alone(ids: Callable[[nn.Module], Iterable[int]]) -> None:
    """Have DDP, whenever it is built of a module from now on, ignore the parameters and buffers whose ``id`` is among
    those that ``ids`` gives for the module.
    """
    if not _SOURCES:
        _change_constructor()
    if ids not in _SOURCES:
        _SOURCES.append(ids)


def wrapper_of(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP that a model is within, of those that were built since :func:`leave_alone`; None without one."""
    for wrapper in _WRAPPERS:
        if any(module is model for module in wrapper.module.modules()):
            return wrapper
    return None


def why_not_repeatable(wrapper: DistributedDataParallel) -> str | None:
    """Return why a micro-batch that is about to begin must not be done again by one rank alone, or None."""
    if wrapper.require_backward_grad_sync:
        return "its backward sums gradients over the ranks (only micro-batches under no_sync can be repeated)"
    if wrapper._join_config.enable:
        return "the ranks tell each other of each forward (DDP's join)"
    return None


class Broadcast:
    """Whether a forward has broadcast buffers to the other ranks, who do that once: it is not to do so again."""

    def __init__(self, wrapper: DistributedDataParallel, then: Callable[[], None]) -> None:
        """``then``: called when the buffers have come."""
        self._wrapper, self._then = wrapper, then
        self._is_done = False

    def __enter__(self) -> Broadcast:
        self._wrapper.__dict__["_sync_buffers"] = self._sync
        return self

    def __exit__(self, *error: object) -> None:
        self._wrapper.__dict__.pop("_sync_buffers", None)

    def _sync(self) -> None:
        type(self._wrapper)._sync_buffers(self._wrapper)
        self._is_done = True
        self._then()

    def repeat(self) -> None:
        """Have the next forward not broadcast what has come."""
        if self._is_done:
            self._wrapper.require_forward_param_sync = False


def _change_constructor() -> None:
    original = DistributedDataParallel.__init__

    @functools.wraps(original)
    def init(wrapper: Any, module: Any, *args: Any, **kwargs: Any) -> None:
        names = _names(module) if isinstance(module, nn.Module) else []
        if not names:
            original(wrapper, module, *args, **kwargs)
        else:
            before = module.__dict__.get(_IGNORED)
            module.__dict__[_IGNORED] = [*getattr(module, _IGNORED, ()), *names]
            try:
                original(wrapper, module, *args, **kwargs)
            finally:
                if before is None:
                    del module.__dict__[_IGNORED]
                else:
                    module.__dict__[_IGNORED] = before
        _WRAPPERS.add(wrapper)

    setattr(DistributedDataParallel, "__init__", init)  # noqa: B010


def _names(module: nn.Module) -> list[str]:
    """Return every name that an ignored tensor has in a module."""
    ids = {found for source in _SOURCES for found in source(module)}
    if not ids:
        return []
    named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in named if id(tensor) in ids]
