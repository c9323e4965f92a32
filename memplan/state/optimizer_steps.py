"""Steps of torch's optimizers, counted while anybody watches: some write to parameters and raise no version."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle

from memplan.state.watched import Watched

_hooks: list[RemovableHandle] = []
_taken = 0
_last: deque[tuple[int, weakref.ref[torch.optim.Optimizer]]] = deque(maxlen=256)
"""The last steps, by their numbers."""


def watch(module: nn.Module) -> Callable[[], None]:
    """Count steps from now on, as long as there is a module. Return what ends that before."""
    return _watched.watch(module)


def taken() -> int:
    """Return how many steps optimizers have taken while anybody watched."""
    return _taken


def are_stepped(since: int, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether any of the parameters is of an optimizer that has taken a step since there were so many."""
    if since == _taken:
        return False
    later = [optimizer() for number, optimizer in _last if number > since]
    ids = {id(parameter) for parameter in parameters}
    known = [one for one in later if one is not None]
    if len(known) < _taken - since:
        return True  # nobody knows of which parameters the others are
    return any(id(p) in ids for optimizer in known for group in optimizer.param_groups for p in group["params"])


def _count(optimizer: torch.optim.Optimizer, *_: object) -> None:
    global _taken
    _taken += 1
    _last.append((_taken, weakref.ref(optimizer)))


_watched = Watched(
    lambda: _hooks.append(register_optimizer_step_post_hook(_count)),
    lambda: _hooks.pop().remove(),
)
