"""What a thread has of its own, taken over into another: modes, streams, hooks and contexts.

[Note: what is not here] Settings of torch's that the whole process shares (kernels, default dtype, anomaly detection)
are the same in any thread.
"""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack, _pop_mode, _push_mode

from memplan.hooks.recompute import hooks_around
from memplan.hooks.triggers import caller, computing_for
from memplan.run.transfer.device import current_stream, is_apart, made_current

_Result = TypeVar("_Result")


class Inherited:
    """What this thread has when this is made. Each :meth:`run` is in a thread that has nothing yet."""

    def __init__(self, device: torch.device) -> None:
        """``device``: where the model computes."""
        self._device = device
        self._identity = caller()
        self._context = contextvars.copy_context()
        self._grad = torch.is_grad_enabled()
        self._forward_grad = torch._C._is_fwd_grad_enabled()
        self._replays_views = torch._C._is_view_replay_enabled()
        self._saved_hooks = _saved_tensor_hooks()
        self._functions = [
            torch._C._get_function_stack_at(place) for place in range(torch._C._len_torch_function_stack())
        ]
        self._dispatched = list(_get_current_dispatch_mode_stack())
        self._default_device = getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None)
        self._casts = {
            kind: (torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in casting(device)
        }
        self._caches_casts = torch.is_autocast_cache_enabled()
        self._casting_depth = torch.autocast_increment_nesting() - 1
        torch.autocast_decrement_nesting()
        self._stream = current_stream(device) if is_apart(device) else None

    def run(self, function: Callable[[Any], _Result], given: Any) -> _Result:
        """Return ``function(given)``, called as in the thread that this was made in."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(computing_for(self._identity))
            if self._stream is not None:
                stack.enter_context(made_current(self._device))
                stack.enter_context(self._stream)
            stack.enter_context(self._modes())
            return self._context.copy().run(function, given)

    @contextlib.contextmanager
    def _modes(self) -> Iterator[None]:
        """Flags end with the thread; what lies on stacks comes off them."""
        # On a device there is one thread of autograd's for all, which would stand still with the first that waits.
        torch._C._set_multithreading_enabled(False)
        torch._C._set_grad_enabled(self._grad)
        torch._C._set_fwd_grad_enabled(self._forward_grad)
        torch._C._set_view_replay_enabled(self._replays_views)
        for kind, (is_enabled, dtype) in self._casts.items():
            torch.set_autocast_enabled(kind, is_enabled)
            torch.set_autocast_dtype(kind, dtype)
        torch.set_autocast_cache_enabled(self._caches_casts)
        for _ in range(self._casting_depth):
            torch.autocast_increment_nesting()
        if self._default_device is not None:
            torch._GLOBAL_DEVICE_CONTEXT.device_context = self._default_device
        try:
            for mode in self._functions:
                torch._C._push_on_torch_function_stack(mode)
            for mode in self._dispatched:
                _push_mode(mode)
            for hooks in self._saved_hooks:
                torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
            yield
        finally:
            while hooks_around() is not None:
                torch._C._autograd._pop_saved_tensors_default_hooks()
            while _get_current_dispatch_mode_stack():
                _pop_mode()
            while torch._C._len_torch_function_stack():
                torch._C._pop_torch_function_stack()


def casting(device: torch.device) -> tuple[str, ...]:
    """Return the kinds of devices that autocast may be on for."""
    return ("cpu", device.type) if is_apart(device) else ("cpu",)


def _saved_tensor_hooks() -> list[tuple[Any, Any]]:
    """Return this thread's saved-tensor hooks, the outermost first."""
    found: list[tuple[Any, Any]] = []
    while (top := hooks_around()) is not None:
        found.append(top)
        torch._C._autograd._pop_saved_tensors_default_hooks()
    found.reverse()
    for hooks in found:
        torch._C._autograd._push_saved_tensors_default_hooks(*hooks)
    return found
