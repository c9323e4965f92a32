"""Recomputing a module's activations in backward, as planned. One way, for the analyzer's trace and for the run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

_CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


def wrap(module: nn.Module) -> Callable[[], None]:
    """Checkpoint ``module``'s forward (non-reentrant, random state kept) inside its hooks; return what undoes it.

    A key-value cache handed in is dropped while gradients are on: the recompute would write to it twice. Training
    does not read it.
    """
    original = module.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return original(*args, **kwargs)
        args = tuple(None if _is_cache(value) else value for value in args)
        kwargs = {name: None if _is_cache(value) else value for name, value in kwargs.items()}
        if any(name in kwargs for name in _CACHE_NAMES) and kwargs.get("use_cache"):
            kwargs["use_cache"] = False
        return checkpoint(original, *args, use_reentrant=False, **kwargs)

    return replace_forward(module, forward)


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> Callable[[], None]:
    """Have this one module run ``forward``; return what undoes it."""
    had = module.__dict__.get("forward")
    module.forward = forward

    def undo() -> None:
        if had is None:
            del module.forward
        else:
            module.forward = had

    return undo


def _is_cache(value: object) -> bool:
    return callable(getattr(value, "get_seq_length", None)) and callable(getattr(value, "update", None))
