"""Whose a hook is."""

from __future__ import annotations

from functools import partial
from typing import Any


def is_of(hook: Any, *packages: str) -> bool:
    """Whether the function that a hook calls is of one of these packages."""
    while isinstance(hook, partial):
        hook = hook.func
    return str(getattr(hook, "__module__", "")).partition(".")[0] in packages
