"""What is changed in the process as long as any of the modules lives that ask for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import nn


class Watched:
    """Begins with the first module and ends with the last."""

    def __init__(self, begin: Callable[[], object], end: Callable[[], object]) -> None:
        self._begin, self._end = begin, end
        self._modules = 0

    def watch(self, module: nn.Module) -> Callable[[], None]:
        """Begin, where nobody has, and go on as long as there is a module. Return what ends that before."""
        if not self._modules:
            self._begin()
        self._modules += 1
        return weakref.finalize(module, self._leave)  # done once at most

    def _leave(self) -> None:
        self._modules -= 1
        if not self._modules:
            self._end()
