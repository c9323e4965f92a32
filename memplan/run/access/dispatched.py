"""Placeholders that torch's dispatcher asks about: reads that pass by every Python function are served, or refused.

[Note: a key of its own] ``__torch_function__`` is asked by torch's Python functions alone. C++ that is given a weight
(``x.new_tensor(weight)``, ``torch.Tensor(weight)``, nested tensors, functions of ``torch.jit``, autograd's formulas)
would read the placeholder. So a placeholder has a dispatch key that torch leaves to tests, above all others: each
operator on it comes to what is registered here. A tensor that is pointed at a placeholder takes the key over, and loses
it when it is pointed at its memory: an open weight pays nothing. Where no server is registered torch finds no kernel,
and says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch

from memplan.hooks.nested import tensors_in

_NAME = "TESTING_ONLY_GenericWrapper"
_KEY: Any = torch._C._parse_dispatch_key(_NAME)
_KEYS = torch._C.DispatchKeySet(_KEY)
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
    guard: AbstractContextManager[None] = torch._C._ExcludeDispatchKeyGuard(_KEYS)
    return guard


def announced(placeholder: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor that is announced when an operator is given it."""
    with torch.inference_mode(False), torch.no_grad(), unasked():
        made = torch.empty(0, dtype=placeholder.dtype, device=placeholder.device)
        made.data = torch.Tensor._make_wrapper_subclass(
            _Keyed,
            placeholder.shape,
            strides=placeholder.stride(),
            dtype=placeholder.dtype,
            device=placeholder.device,
            _extra_dispatch_keys=_KEYS,
        )
        made.set_(placeholder.untyped_storage(), placeholder.storage_offset(), placeholder.shape, placeholder.stride())
    return made


def serve_with(serve: Serve) -> None:
    """Have ``serve(operator, args, kwargs)`` answer from now on, once in a process."""
    if not _LIBRARIES:

        def answer(operator: Any, *args: Any, **kwargs: Any) -> Any:
            return serve(operator, args, kwargs)

        _LIBRARIES.append(torch.library.Library("_", "IMPL"))
        _LIBRARIES[0].fallback(answer, _NAME)


def announced_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the placeholders, and the weights that are such now, in an operator's arguments."""
    return (tensor for tensor in tensors_in(value) if torch._C._dispatch_keys(tensor).has(_KEY))
