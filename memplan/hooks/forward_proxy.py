"""What stands in a module's ``forward`` while a plan has that run in another way: it tells what the forward would.

[Note: who reads a forward] Scripts and libraries look at a layer's ``forward`` to choose what they do: names of
arguments by ``__code__.co_varnames`` or ``inspect.getfullargspec``, a patch by ``__func__`` or ``__wrapped__``, its
source. A function of memplan's would tell ``args`` and ``kwargs``, and they would train differently without a word. So
every attribute is the original's, the class included; only the call is another.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

_get = object.__getattribute__
_OWN = frozenset({"__call__", "__deepcopy__", "__reduce_ex__"})


class ForwardProxy:
    """Calls one thing, and is another for whoever looks at it."""

    __slots__ = ("__weakref__", "_call", "_original")

    is_memplans = True
    """Of the class: an instance tells what the original does."""

    def __init__(self, call: Callable[..., Any], original: Callable[..., Any]) -> None:
        object.__setattr__(self, "_call", call)
        object.__setattr__(self, "_original", original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _get(self, "_call")(*args, **kwargs)

    def __getattribute__(self, name: str) -> Any:
        return _get(self, name) if name in _OWN else getattr(_get(self, "_original"), name)

    def __setattr__(self, name: str, value: object) -> None:
        setattr(_get(self, "_original"), name, value)

    def __delattr__(self, name: str) -> None:
        delattr(_get(self, "_original"), name)

    def __eq__(self, other: object) -> bool:
        return bool(_get(self, "_original") == (_get(other, "_original") if type(other) is ForwardProxy else other))

    def __hash__(self) -> int:
        return hash(_get(self, "_original"))

    def __repr__(self) -> str:
        return repr(_get(self, "_original"))

    def __dir__(self) -> list[str]:
        return dir(_get(self, "_original"))

    # A copy of a module must not compute with the module that it was made of: it gets what that had without memplan.

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(_get(self, "_original"), memo)

    def __reduce_ex__(self, protocol: Any) -> Any:
        original = _get(self, "_original")
        return original.__reduce_ex__(protocol) if type(original) is MethodType else (copy.copy, (original,))


def pass_through(proxy: ForwardProxy) -> None:
    """Have a proxy do as the original does: someone else holds it."""
    object.__setattr__(proxy, "_call", _get(proxy, "_original"))
