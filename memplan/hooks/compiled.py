"""What torch.compile has made of a model's modules. memplan stands around a compiled module, never within it.

[Note: hooks that dynamo does not see] A hook on a compiled module is traced into its graph, and a hook that comes later
is not looked at (``skip_nnmodule_hook_guards``): weights would be read that no trigger has brought. So a compiled
trigger module is watched around its compiled call; what was compiled before the hooks came is forgotten; and a call
that comes to a trigger from within a compiled region, whose graph could read several modules' weights at once, is
refused.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import nn
from torch._dynamo.decorators import skip
from torch._dynamo.eval_frame import OptimizedModule as OptimizedModule

from memplan.errors import RunError
from memplan.hooks.forward_proxy import ForwardProxy, pass_through

_Function = TypeVar("_Function", bound=Callable[..., Any])
_EACH = "`for layer in model.model.layers: layer.compile()`"
WAY_OUT = f"compile each layer by itself, before attach: {_EACH}"
IN_SCRIPT = f"leave that out, and compile each layer by itself: {_EACH}"


def is_compiled(module: nn.Module) -> bool:
    """Whether a module's call as a whole goes to torch.compile, in whichever of the ways there are."""
    if hides_hooks(module):
        return True  # even where something stands around its forward by now
    forward = module.__dict__.get("forward")
    return hasattr(forward, "_torchdynamo_orig_callable") and not getattr(forward, "_torchdynamo_disable", False)


def hides_hooks(module: nn.Module) -> bool:
    """Whether a module's hooks run where dynamo traces, or are passed by there."""
    return _entry(module) != "forward" or isinstance(module, OptimizedModule)


def takes_no_hooks(module: nn.Module) -> bool:
    """Whether a module must be watched around its call: hooks would not run, or it would compute otherwise for them."""
    return hides_hooks(module) or isinstance(module, nn.TransformerEncoderLayer)


def call_of(module: nn.Module) -> Callable[..., Any]:
    """Return what a module's call comes to: its forward, or where that is compiled what was compiled of it."""
    call: Callable[..., Any] = getattr(module, _entry(module))
    return call


def replace_call(module: nn.Module, call: Callable[..., Any]) -> Callable[[], None]:
    """Have this one module's call come to ``call`` in place of :func:`call_of`; return what undoes it.

    What others have put there since stays when that is undone; where they hold what was theirs to call, it does as it
    did without memplan.
    """
    entry = _entry(module)
    had = module.__dict__.get(entry)
    stands = ForwardProxy(call, call_of(module)) if entry == "forward" else call
    setattr(module, entry, stands)

    def undo() -> None:
        if module.__dict__.get(entry) is stands:
            if had is None:
                delattr(module, entry)
            else:
                setattr(module, entry, had)
        if type(stands) is ForwardProxy:
            pass_through(stands)

    return undo


def keep_call(module: nn.Module) -> Callable[[], None]:
    """Have a compiled region that calls a compiled module go by its call too; return what undoes it.

    [Note: passed by] Where dynamo traces a call of a module without hooks it takes the class's forward, though the
    module's own call was replaced, unless the instance has a forward. A bound method is the same for all layers'
    guards.
    """
    if "forward" in module.__dict__:
        return lambda: None
    module.forward = forward = types.MethodType(type(module).forward, module)

    def undo() -> None:
        if module.__dict__.get("forward") is forward:
            del module.forward

    return undo


def untraced(function: _Function) -> _Function:
    """Have dynamo break its graph at a function, which then runs as it is."""
    return cast("_Function", skip(function))


def untraced_deep(function: _Function) -> _Function:
    """Have dynamo leave alone a function and what it calls."""
    return cast("_Function", torch.compiler.disable(function))


@untraced
def in_region() -> bool:
    """Whether the thread is inside a compiled region. To be called from an :func:`untraced` function."""
    return torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False)


_CAPTURES: list[Callable[[], bool]] = []
"""What says whether the thread's kernels are being captured for a graph: of each model's device, as far as it has
graphs.
"""


def watch_captures(is_capturing: Callable[[], bool]) -> Callable[[], None]:
    """Have :func:`refuse_region` ask ``is_capturing`` too. Returns what undoes it."""
    _CAPTURES.append(is_capturing)
    return partial(_CAPTURES.remove, is_capturing)


@untraced
def refuse_region(name: str) -> None:
    """Raise RunError where the thread is inside a compiled region, or captures its kernels. To be called from an
    :func:`untraced` function.
    """
    for is_capturing in _CAPTURES:
        if is_capturing():
            raise RunError(
                f"{name} was called while its kernels are captured for a CUDA graph, whose replays would read weights "
                "that nobody brings: capture nothing that calls it, or detach() first"
            )
    if torch._C._dynamo.eval_frame.get_eval_frame_callback() not in (None, False):
        raise RunError(
            f"{name} was called from within a compiled region, whose graphs would be others than without a plan, and "
            f"might read weights before they are there: do not compile what calls it; {WAY_OUT}"
        )


def refuse_beside(inside: list[str]) -> Callable[..., None]:
    """Return a pre-hook for what torch.compile has wrapped: RunError where it is called beside the wrapper's calls.

    ``inside``: those under way. Within them dynamo may trace the hook, one for all layers, and then sees nothing of it.
    """

    def pre_hook(module: nn.Module, args: object) -> None:
        if torch.compiler.is_compiling() or inside:
            return
        if torch._C._current_graph_task_id() == -1:  # else a checkpoint within the watched call recomputes
            raise RunError(
                f"a {type(module).__name__} was called without what torch.compile made of it, which is what memplan "
                "watches: call the compiled module, or detach() first"
            )

    return pre_hook


def whole_compiled(model: nn.Module, apart: Iterable[nn.Module]) -> str | None:
    """Return the name of a module that is compiled though it holds one of ``apart`` beside itself, or None."""
    inner = set(apart)
    for name, module in model.named_modules():
        if is_compiled(module) and any(part in inner for part in module.modules() if part is not module):
            return name or type(module).__name__
    return None


def forget_compiled() -> None:
    """Have dynamo compile anew what is called next: what it has does not see that hooks came or went."""
    torch._dynamo.reset()


def _entry(module: nn.Module) -> str:
    """Return the attribute that a module's call goes by."""
    return "forward" if module.__dict__.get("_compiled_call_impl") is None else "_compiled_call_impl"
