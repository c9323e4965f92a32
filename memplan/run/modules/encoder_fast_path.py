"""torch's encoder layers, which compute by other kernels where a module in them has a hook or a weight is of a class of
its own: with memplan's out of sight they take the way that they take without.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from memplan.hooks.compiled import call_of, replace_call, untraced
from memplan.hooks.nested import tensors_in
from memplan.run.access.away import away_in, plain
from memplan.state.holders import is_ours


def hide_hooks(layer: nn.Module) -> Callable[[], None] | None:
    """Have one of torch's encoder layers see no hooks of memplan's where it looks whether there are any; return what
    undoes it, or None for any other module.
    """
    if not isinstance(layer, nn.TransformerEncoderLayer):
        return None
    call = call_of(layer)

    def forward(*args: Any, **kwargs: Any) -> Any:
        if layer.training or _makes_graph(layer, args, kwargs):
            return call(*args, **kwargs)
        with _out_of_sight(layer):
            return call(*args, **kwargs)

    return replace_call(layer, forward)


def _makes_graph(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether gradients will be wanted, for which the hooks are there and torch has one way only."""
    return torch.is_grad_enabled() and (
        any(tensor.requires_grad for tensor in tensors_in((args, kwargs)))
        or any(parameter.requires_grad for parameter in layer.parameters())
    )


@contextmanager
def _out_of_sight(layer: nn.Module) -> Iterator[None]:
    """Have no module of a layer have hooks of memplan's alone."""
    hidden: list[tuple[dict[str, Any], str, Any]] = []
    for module in layer.modules():
        for name in ("_forward_hooks", "_forward_pre_hooks"):
            hooks = module.__dict__[name]
            if hooks and all(map(is_ours, hooks.values())):
                hidden.append((module.__dict__, name, hooks))
    try:
        for own, name, _ in hidden:
            own[name] = OrderedDict()
        yield
    finally:
        for own, name, hooks in hidden:
            hooks.update(own[name])  # what was registered meanwhile
            own[name] = hooks


def show_first_layer(encoder: nn.Module) -> Callable[[], None] | None:
    """Have the weights of an encoder's first layer, which it asks for their class and device alone, be of torch's own
    class until that layer is called; return what undoes it, or None for any other module.
    """
    if not isinstance(encoder, nn.TransformerEncoder) or not len(encoder.layers):
        return None
    first = encoder.layers[0]
    call, call_first = call_of(encoder), call_of(first)
    shown: list[ExitStack] = []

    def forward(*args: Any, **kwargs: Any) -> Any:
        if first.training:
            return call(*args, **kwargs)
        with ExitStack() as stack:
            for tensor in away_in(list(first.parameters())):
                stack.enter_context(plain(tensor))
            shown.append(stack)
            return call(*args, **kwargs)

    def forward_first(*args: Any, **kwargs: Any) -> Any:
        while shown:
            shown.pop().close()
        return call_first(*args, **kwargs)

    undone = (replace_call(encoder, forward), replace_call(first, untraced(forward_first)))

    def undo() -> None:
        for one in reversed(undone):
            one()

    return undo
