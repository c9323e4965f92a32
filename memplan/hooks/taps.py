"""Where a backward may enter a layer from within and nobody would tell: which inner modules must tell of it
themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torchs
from torch.utils.hooks import RemovableHandle

from memplan.hooks.nested import tensors_in
from memplan.state.holders import is_ours


class Taps:
    """One layer's. All inner modules of streamed weights are watched in the first forward that makes a graph.

    Then those are left alone whose results come of a trained parameter of the layer, to which a backward by them gives
    a gradient, or of another module that is watched. What is told of so late is refused, since weights were read
    before. Where a hook of others comes into the layer, which may hand out what is made there, all are watched again,
    and a backward may enter where it likes.
    """

    def __init__(
        self,
        layer: nn.Module,
        wrapped: Collection[nn.Module],
        trained: Collection[nn.Parameter],
        refuse: Callable[[], None],
    ) -> None:
        """``wrapped``: modules in the layer that are watched in no way until a hook of others is there. ``trained``:
        parameters of this layer and of no other. ``refuse`` raises where a backward has entered unannounced.
        """
        self.watched: dict[nn.Module, RemovableHandle] = {}
        """The modules that are, and what ends that."""
        self.stops: set[Any] | None = None
        """Graph nodes, of the forward that is looked at: those of what went into it, where a search ends."""
        self.is_settled = False
        """Not all modules are watched."""
        self.refuse = refuse
        self._wrapped = tuple(wrapped)
        self._trained = {id(parameter) for parameter in trained}
        self._is_told: dict[nn.Module, bool] = {}
        self._made: set[Any] = set()
        """Graph nodes of what was made by modules that stay watched."""
        self._left: list[nn.Module] = []
        parts = [part for part in layer.modules() if part is not layer]
        self._hooks = [*(part._forward_hooks for part in parts), torchs._global_forward_hooks]
        self._hooks_seen = -1
        self._is_tapped = False

    def begins(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Sequence[nn.Module]:
        """Note that a forward begins. Return the modules that must be watched again from now on."""
        if self._is_tapped:
            return ()
        if self._hooks_came():
            self._is_tapped, self.is_settled = True, False
            return [*self._left, *(module for module in self._wrapped if module._forward_hooks)]
        if not self.is_settled and torch.is_grad_enabled():
            self.stops = {tensor.grad_fn for tensor in tensors_in((args, kwargs))}
            self._is_told.clear()
            self._made.clear()
        return ()

    def look(self, module: nn.Module, made: Sequence[torch.Tensor]) -> None:
        """Note what a watched module has made in the forward that is looked at."""
        is_told = all(map(self._comes_of_told, made)) and self._is_told.get(module, True)
        self._is_told[module] = is_told
        if not is_told:
            self._made.update(tensor.grad_fn for tensor in made)

    def ends(self) -> None:
        """Leave alone what the forward that was looked at has shown to be told of."""
        self.stops = None
        if self._is_told:
            self.is_settled = True
            self._left = [module for module, is_told in self._is_told.items() if is_told]
            for module in self._left:
                self.watched.pop(module).remove()
        self._is_told.clear()
        self._made.clear()

    def forget(self) -> None:
        """Let go of the graph of a forward that is looked at and failed: nobody else can, as it holds who watches."""
        self.stops = None
        self._is_told.clear()
        self._made.clear()

    def _hooks_came(self) -> bool:
        """Whether forward hooks of others are in the layer, looked at where there are more or fewer than the last
        time.
        """
        seen = sum(map(len, self._hooks))
        if seen == self._hooks_seen:
            return False
        self._hooks_seen = seen
        return any(not is_ours(hook) for hooks in self._hooks for hook in hooks.values())

    def _comes_of_told(self, tensor: torch.Tensor) -> bool:
        seen: set[Any] = set(self.stops or ())
        to_see = [tensor.grad_fn]
        while to_see:
            node = to_see.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            if node in self._made or id(getattr(node, "variable", None)) in self._trained:
                return True
            to_see += [parent for parent, _ in node.next_functions]
        return False
