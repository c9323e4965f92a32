"""Models that wait to be placed, or are, and that torch.compile has as a whole: that they run as without memplan, and
why, is said at the first call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memplan.run.handle import handle_of
from memplan.trainers.loading.deferred_placement import waits_itself

Tell = Callable[[nn.Module], None]


def serve_compiled(kind: type[nn.Module], tell: Tell) -> None:
    """Have ``tell(model)`` called at the first call of what torch.compile makes of a model that is under a plan, or at
    the first with gradients of one that waits.

    ``kind``: torch's class of compiled modules. A model that was compiled in its place is seen too.
    """
    made = kind.__init__
    compile_in_place = nn.Module.compile

    @functools.wraps(made)
    def init(compiled: nn.Module, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        made(compiled, model, *args, **kwargs)
        _tell_once(compiled, "forward", model, tell)

    @functools.wraps(compile_in_place)
    def compile_model(model: nn.Module, *args: Any, **kwargs: Any) -> None:
        compile_in_place(model, *args, **kwargs)
        _tell_once(model, "_compiled_call_impl", model, tell)

    setattr(kind, "__init__", init)  # noqa: B010
    setattr(nn.Module, "compile", compile_model)  # noqa: B010


def _tell_once(holder: nn.Module, entry: str, model: nn.Module, tell: Tell) -> None:
    """Stand before what a holder's call comes to until that is told of. Layers are left alone."""
    call = holder.__dict__.get(entry)
    if call is None or not (waits_itself(model) or _is_placed(model)):
        return

    @functools.wraps(call)
    def told(*args: Any, **kwargs: Any) -> Any:
        is_placed = _is_placed(model)
        if (torch.is_grad_enabled() or is_placed) and holder.__dict__.get(entry) is told:
            holder.__dict__[entry] = call
            if is_placed or waits_itself(model):
                tell(model)
        return call(*args, **kwargs)

    holder.__dict__[entry] = told


def _is_placed(model: nn.Module) -> bool:
    handle = handle_of(model)
    return handle is not None and handle.model is model
