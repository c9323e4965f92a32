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

from memplan.hooks.compiled import call_of, replace_call
from memplan.hooks.nested import tensors_in
from memplan.run.access.away import away_in, plain
from memplan.state.holders import is_ours


def keep_fast_path(module: nn.Module) -> Callable[[], None] | None:
    """Have an encoder of torch's, or one of its layers, take the way that it takes without memplan; return what undoes
    it, or None for any other module.
    """
    if isinstance(module, nn.TransformerEncoderLayer):
        return _in_layer(module)
    if isinstance(module, nn.TransformerEncoder) and len(module.layers):
        return _before_layers(module)
    return None


def _in_layer(layer: nn.TransformerEncoderLayer) -> Callable[[], None]:
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
            own[name] = hooks


def _before_layers(encoder: nn.TransformerEncoder) -> Callable[[], None]:
    """Have the weights of the first layer, which the encoder asks for their class and device alone, be of torch's own
    class until that is called.
    """
    call, first = call_of(encoder), encoder.layers[0]

    def forward(*args: Any, **kwargs: Any) -> Any:
        if first.training:
            return call(*args, **kwargs)
        with ExitStack() as shown:
            for tensor in away_in(list(first.parameters())):
                shown.enter_context(plain(tensor))
            hook = first.register_forward_pre_hook(lambda *given: shown.close(), prepend=True)
            shown.callback(hook.remove)
            return call(*args, **kwargs)

    return replace_call(encoder, forward)
