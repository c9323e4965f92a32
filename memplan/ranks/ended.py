"""Which rank was the first to end by an error: the others mostly hear of a connection that is closed.

The rank that fails notes it in torch.distributed's store before anything of it is closed. Who fails after it, in a
collective of DDP's, says on standard error which rank that was, and why; of one that was killed, that it is gone.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from memplan.errors import DoesNotFitError, type_and_line
from memplan.ranks.world import World

_FIRST = "first to fail"
_WORDS = ("gloo", "NCCL", "peer", "store")
"""Some of them are in what torch.distributed says when another rank is gone."""
_PATIENCE_S = 1.0
"""The kernel closes what a process has open before it is seen to be dead."""


def tell_who_ended(ranks: World, ended: Callable[[], int | None]) -> None:
    """Have an error that ends this process be noted for the other ranks, and told with theirs.

    ``ended``: returns a rank of this node whose process is there no more.
    """
    if _Hook.store is None:
        _Hook.before, sys.excepthook = sys.excepthook, _hook
    _Hook.rank, _Hook.store, _Hook.ended = ranks.rank, ranks.store, ended
    _Hook.process = os.getpid()


def first_ended(ranks: World) -> str | None:
    """Return which rank was the first to end by an error that it has noted, and by which; None so far."""
    return ranks.store.get(_FIRST).decode() if ranks.store.check([_FIRST]) else None


class _Hook:
    """What the hook goes by: the ranks of now, since a process group may be made anew."""

    rank = 0
    process = 0
    """A fork of it is no rank."""
    store: Any = None
    ended: Callable[[], int | None]
    before: Callable[..., Any]


def _gone(error: BaseException) -> int | None:
    """Return a rank that has ended without a word, where an error may come from that."""
    if not any(word in str(error) for word in _WORDS):
        return None
    until = time.monotonic() + _PATIENCE_S
    while (gone := _Hook.ended()) is None and time.monotonic() < until:
        time.sleep(0.02)
    return gone


def _hook(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    if _Hook.process != os.getpid() or isinstance(error, DoesNotFitError):  # that all ranks say alike
        _Hook.before(kind, error, trace)
        return
    try:
        own = f"rank {_Hook.rank} ended by {type_and_line(error)}"
        first = _Hook.store.compare_set(_FIRST, "", own).decode()
        gone = _gone(error) if first == own else None
        said = first if gone is None else f"rank {gone} was there no more"
    except Exception:  # the store is gone with the rank that keeps it
        said = "the rank that keeps torch.distributed's store, mostly rank 0, was there no more"
    _Hook.before(kind, error, trace)
    sys.stderr.write(f"memplan: {said}, the first of the ranks\n")
    sys.stderr.flush()
