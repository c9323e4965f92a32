"""Recomputing a module's activations in backward, as planned. One way, for the analyzer's trace and for the run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from memplan.hooks.compiled import call_of, replace_call, untraced

Again = Callable[[], AbstractContextManager[None]]
"""Makes the context in which a forward runs once more."""
Kept = Callable[[tuple[Any, ...], dict[str, Any]], tuple[AbstractContextManager[None], Again]]
"""Of a forward's arguments, as it runs the first time: the context for that, and what makes those for the next times.
"""


def _anywhere(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[AbstractContextManager[None], Again]:
    return nullcontext(), nullcontext


def wrap(module: nn.Module, kept: Kept = _anywhere) -> Callable[[], None]:
    """Checkpoint ``module``'s forward (non-reentrant, random state kept) inside its hooks; return what undoes it.

    [Note: others' hooks] Under saved-tensor hooks of the script's own (which may keep less than what they are given)
    nothing is recomputed: they are to see what is saved.

    [Note: caches] A key-value cache handed in is written to by the forward, as ever. The recompute is given one that is
    as that was before: it may hold what came before (a trained prefix), and what is taken from a cache lies otherwise
    in memory, which changes bits.
    [Note: keywords and random numbers] torch keeps the random state of the devices of positional arguments, and of no
    others: a layer that is called by keywords alone would drop out other elements as it runs again. So it is shown
    where those lie.
    """
    original = call_of(module)
    own = _own_places(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        around = hooks_around()
        if around is not None and not are_memplans(around) and not _are_checkpoints(around):
            return original(*args, **kwargs)
        again: Again | None = None

        def once_more(*args: Any, **kwargs: Any) -> Any:
            nonlocal again
            if again is None:
                first, again = kept(args, kwargs)
                with first:
                    return original(*args, **kwargs)
            with again():
                return original(*args, **kwargs)

        now: dict[int, Any] = {}
        """The caches themselves, by the id of what stands for them: held no longer than the forward."""

        def keep(value: Any) -> Any:
            if not _is_cache(value):
                return value
            before = _as_it_is(value, own)
            now[id(before)] = value
            return before

        args, kwargs = tuple(map(keep, args)), {name: keep(value) for name, value in kwargs.items()}
        if not now:
            return _checkpoint(once_more, args, kwargs)

        def run(*args: Any, **kwargs: Any) -> Any:
            given = dict(now)
            now.clear()

            def cache_of(value: Any) -> Any:
                if id(value) in given:
                    return given[id(value)]
                return _as_it_is(value, own) if _is_cache(value) else value

            return once_more(*map(cache_of, args), **{name: cache_of(value) for name, value in kwargs.items()})

        return _checkpoint(run, args, kwargs)

    return replace_call(module, forward)


def _checkpoint(run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Return ``run(*args, **kwargs)``, checkpointed. [Note: keywords and random numbers]"""
    shown = on_other_devices(args, kwargs)
    if not shown:
        return checkpoint(run, *args, use_reentrant=False, **kwargs)
    # In a list: what is an argument itself is saved for backward, and these are no one's.
    return checkpoint(lambda _, *given, **named: run(*given, **named), shown, *args, use_reentrant=False, **kwargs)


def on_other_devices(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return a tensor of each device, the CPU apart, on which keyword arguments lie and no positional one does."""
    seen = {value.device for value in tree_leaves(args) if isinstance(value, torch.Tensor)}
    named = [value for value in tree_leaves(kwargs) if isinstance(value, torch.Tensor)]
    found = {tensor.device: tensor for tensor in named if tensor.device.type not in ("cpu", "meta")}
    return [tensor for device, tensor in found.items() if device not in seen]


def run_hooked(
    function: Callable[[], Any], pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]
) -> Any:
    """Return ``function()``, run under saved-tensor hooks of memplan's own."""
    with hooked(pack, unpack):
        return function()


@contextmanager
def hooked(pack: Callable[[torch.Tensor], Any], unpack: Callable[[Any], torch.Tensor]) -> Iterator[None]:
    """Have saved-tensor hooks of memplan's own.

    [Note: hooks that stay] torch's hooks lie on a stack of the thread's. A Ctrl-C in the moment in which they come off
    would leave them there for good; then they hand everything on as it is, and the next ones to come or go drop them.
    """
    live = [True]

    def packing(tensor: torch.Tensor) -> tuple[bool, Any]:
        return (True, pack(tensor)) if live[0] else (False, without_graph(tensor))

    def unpacking(packed: tuple[bool, Any]) -> torch.Tensor:
        value: torch.Tensor = unpack(packed[1]) if packed[0] else packed[1]
        return value

    packing.live = live  # type: ignore[attr-defined]
    drop_hooks_that_stayed()
    try:
        torch._C._autograd._push_saved_tensors_default_hooks(untraced(packing), untraced(unpacking))
        yield
    finally:
        live[0] = False
        drop_hooks_that_stayed()


def drop_hooks_that_stayed() -> None:
    """Take memplan's hooks that are over off the thread's stack."""
    while (top := hooks_around()) is not None and getattr(top[0], "live", None) == [False]:
        torch._C._autograd._pop_saved_tensors_default_hooks()


def hooks_around() -> Any:
    """Return the saved-tensor hooks at work, packing and unpacking, or None."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True)


def _are_checkpoints(hooks: Any) -> bool:
    """Whether hooks are those of a checkpoint around."""
    return bool(getattr(hooks[0], "__module__", "") == checkpoint.__module__)


def are_memplans(hooks: Any) -> bool:
    """Whether hooks are memplan's own."""
    return hasattr(hooks[0], "live")


def without_graph(tensor: torch.Tensor) -> torch.Tensor:
    """Return what a hook may keep of a saved tensor.

    [Note: a circle that no one sees] A module's output that is saved holds its graph, and the graph holds what the hook
    returned: kept as it is, it would never go where there is no backward.
    """
    return tensor if tensor.grad_fn is None else tensor.detach()


def _own_places(module: nn.Module) -> frozenset[int]:
    """Return the places in a cache that are a layer's own, as its parts know them; empty where they do not."""
    found = {getattr(inner, "layer_idx", None) for inner in module.modules()} - {None}
    return frozenset(place for place in found if isinstance(place, int))


def _as_it_is(cache: Any, own: frozenset[int]) -> Any:
    """Return a copy of a cache that a layer may be given in its place. Of all layers: a compiled one is compiled anew
    for a cache that has fewer, and past its limit of compiles it runs as it is, with other bits. The tensors of the
    ``own`` places alone are copied, where these are known: what other layers keep this one does not write to, and
    copies of it for every layer would be as many as there are pairs of layers.
    """
    made = _shallow(cache)
    for name, held in vars(made).items():
        if _is_cache(held):
            setattr(made, name, _as_it_is(held, own))
        elif isinstance(held, dict):
            setattr(made, name, dict(held))
        elif isinstance(held, list):
            is_by_layer = bool(own) and max(own) < len(held)
            setattr(made, name, [_layer(item, not is_by_layer or at in own) for at, item in enumerate(held)])
    return made


def _layer(layer: Any, writes: bool) -> Any:
    """Return a copy of what a cache has of a layer. Where that ``writes``, tensors written to in place are copied."""
    if isinstance(layer, torch.Tensor) or not hasattr(layer, "__dict__"):
        return layer
    made = _shallow(layer)
    fixed = getattr(layer, "is_compileable", False)
    for name, held in vars(made).items():
        if isinstance(held, dict):
            setattr(made, name, {key: _copied(value) if writes else value for key, value in held.items()})
        elif fixed and writes:
            setattr(made, name, _copied(held))
    return made


def _shallow(value: Any) -> Any:
    made = object.__new__(type(value))
    made.__dict__.update(value.__dict__)
    return made


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _is_cache(value: object) -> bool:
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))
