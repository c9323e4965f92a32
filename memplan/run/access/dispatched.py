"""Placeholders that torch's dispatcher asks about: reads that pass by every Python function are served, or refused.

[Note: a key of its own] ``__torch_function__`` is asked by torch's Python functions alone. C++ that is given a weight
(``x.new_tensor(weight)``, ``torch.Tensor(weight)``, nested tensors, functions of ``torch.jit``, autograd's formulas)
would read the placeholder. So a placeholder has a dispatch key that torch leaves to tests, above all others: each
operator on it comes to what is registered here. A tensor that is pointed at a placeholder takes the key over, and loses
it when it is pointed at its memory: an open weight pays nothing. Where no server is registered torch finds no kernel,
and says so.

[Note: another thread's read] While an access is under way a weight is a view of its slot, which another block may fill
as soon as that is over: another thread that reads it meanwhile would read both. So that view has a second key, which
the threads that train pass by (each as its first access begins; autograd's take that over from who calls
``backward``): they pay nothing, and an operator in any other thread is given the weight's home.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from memplan.hooks.nested import tensors_in

_NAME, _NAME_OPEN = "TESTING_ONLY_GenericWrapper", "TESTING_ONLY_GenericMode"
_KEY: Any = torch._C._parse_dispatch_key(_NAME)
_KEY_OPEN: Any = torch._C._parse_dispatch_key(_NAME_OPEN)
_KEYS, _KEYS_OPEN = torch._C.DispatchKeySet(_KEY), torch._C.DispatchKeySet(_KEY_OPEN)
_BOTH = _KEYS | _KEYS_OPEN
_LIBRARIES: list[torch.library.Library] = []
"""Kept as long as the process: what they register goes with them."""

Serve = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]


class _Keyed(torch.Tensor):
    """What a tensor with the key is taken from: torch makes none of a plain class."""

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise AssertionError(f"{func} was called with what only placeholders are made of")


def unasked() -> AbstractContextManager[None]:
    """Return a context in which placeholders are tensors as any others: memplan itself points at them, and away."""
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_BOTH)
    return guard


def passes_by() -> None:
    """Have this thread read what is open as it is, for it trains. [Note: another thread's read]"""
    torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY_OPEN, True)


def passes_by_no_more() -> None:
    """Have this thread be as any other."""
    torch._C._dispatch_tls_set_dispatch_key_excluded(_KEY_OPEN, False)


def announced(placeholder: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor that is announced when an operator is given it."""
    return _with_keys(placeholder, _KEYS)


def announced_to_others(there: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor that is announced in threads that do not train."""
    return _with_keys(there, _KEYS_OPEN)


def _with_keys(tensor: torch.Tensor, keys: Any) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad(), unasked():
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        made.data = torch.Tensor._make_wrapper_subclass(
            _Keyed,
            tensor.shape,
            strides=tensor.stride(),
            dtype=tensor.dtype,
            device=tensor.device,
            _extra_dispatch_keys=keys,
        )
        made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())
    return made


def serve_with(serve: Serve, serve_others: Serve) -> None:
    """Have ``serve(operator, args, kwargs)`` answer from now on, and ``serve_others`` what is open, once in a
    process.
    """
    if not _LIBRARIES:

        def answer(operator: Any, *args: Any, **kwargs: Any) -> Any:
            return serve(operator, args, kwargs)

        def answer_others(operator: Any, *args: Any, **kwargs: Any) -> Any:
            return serve_others(operator, args, kwargs)

        _LIBRARIES.append(torch.library.Library("_", "IMPL"))
        _LIBRARIES[0].fallback(answer, _NAME)
        _LIBRARIES[0].fallback(answer_others, _NAME_OPEN)


def announced_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the placeholders, and the weights that are such now, in an operator's arguments."""
    return (tensor for tensor in tensors_in(value) if torch._C._dispatch_keys(tensor).has(_KEY))


def opened_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the weights in an operator's arguments that are views of their slots, and views of such."""
    return (tensor for tensor in tensors_in(value) if torch._C._dispatch_keys(tensor).has(_KEY_OPEN))
