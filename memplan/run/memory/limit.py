"""A run that is held to its budget: torch reserves no more of the device than the plan and its margin allow.

[Note: only with a margin] A plan counts live bytes, and a caching allocator needs some beside them. Without a margin
none are set aside, so a limit at the budget would end runs that fit the card: there is none then. With one, a run that
would leave vram and margin gets torch's out-of-memory error, which :meth:`Handle.micro_batch` recovers from. The
allocator gives back what it caches before it raises that. Unproven: no GPU has run it yet.
"""

from __future__ import annotations

import weakref
from contextlib import ExitStack

import torch
from torch import nn

from memplan.program.schema import Plan
from memplan.run.transfer.device import (
    empty_cache,
    is_apart,
    limit_memory,
    memory_share,
    reserved_bytes,
    total_bytes,
)

_LIMITS: dict[torch.device, list[float]] = {}
"""By device: the share before any model was attached, then that of each model."""


def others_bytes(model: nn.Module, device: torch.device) -> int:
    """Return what torch has in reserve on a device, less the model's own tensors: what is not the plan's."""
    if not is_apart(device):
        return 0
    empty_cache(device)
    storages = [held.untyped_storage() for held in (*model.parameters(), *model.buffers()) if held.device == device]
    own = {storage._cdata: storage.nbytes() for storage in storages}
    return max(0, reserved_bytes(device) - sum(own.values()))


def limit(model: nn.Module, plan: Plan, device: torch.device, others: int, undo: ExitStack) -> None:
    """Hold torch to ``others`` bytes and what the plan may use beside them, until ``undo``."""
    before = memory_share(device) if is_apart(device) and plan.budgets.margin_bytes else None
    if before is None:
        return
    context = plan.prediction.vram_parts.get("context", 0)
    allowed = others + plan.budgets.vram_bytes + plan.budgets.margin_bytes - context
    share = min(1.0, allowed / total_bytes(device))
    _LIMITS.setdefault(device, [before]).append(share)
    release = weakref.finalize(model, _release, device, share)  # who drops a model does not always detach it
    release.atexit = False
    undo.callback(release)
    _apply(device)


def _release(device: torch.device, share: float) -> None:
    _LIMITS[device].remove(share)
    _apply(device)
    if len(_LIMITS[device]) == 1:
        del _LIMITS[device]


def _apply(device: torch.device) -> None:
    """The largest holds, as each counts what was there before it; what was set before any is never exceeded."""
    before, *shares = _LIMITS[device]
    limit_memory(device, min(before, max(shares, default=before)))
