"""Blocks that stay on the host while the device reads rows of them there: embeddings.

On the CPU the host's memory is the device's own. A GPU reads page-locked memory over the link, as it computes:
the lookup is the very kernel of a whole run, on a tensor of the device whose memory is the host's, and nobody waits.
Where they are not page-locked (it was refused, or is over the plan's limit), or the driver names no address for them,
the rows are looked up on the host and sent, which waits for the indices. Both unproven: no GPU has run them yet.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from memplan.errors import RunError
from memplan.hooks.compiled import call_of, replace_call
from memplan.program.schema import Plan
from memplan.run.transfer.device import is_apart, mapped, reads


def read_in_place(plan: Plan) -> dict[str, tuple[int, ...]]:
    """Return the blocks that each trigger module reads on the host, by its name."""
    on_host = {item.block for item in plan.items if item.kind == "weights" and item.home == "host"}
    found: dict[str, tuple[int, ...]] = {}
    for access in plan.table.accesses:
        blocks = tuple(rows.block for rows in access.rows if rows.block in on_host)
        if blocks:
            found[access.module] = blocks
    return found


def as_seen_from(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    """Return host memory (uint8, one dimension) as the device may read it: under its own name, without a copy.

    What the device cannot read stays a tensor of the CPU: see :func:`look_up_on_host`.
    """
    return mapped(device, part) if is_apart(device) and reads(device, part) else part


def look_up_on_host(module: nn.Module, device: torch.device) -> Callable[[], None]:
    """Have ``module``, whose weights lie on the host, take its inputs there and send what it makes to ``device``.

    Returns what undoes it. Raises RunError for what does more than a lookup: the rest of it lies on the device.
    """
    if type(module).forward is not nn.Embedding.forward:
        raise RunError(
            f"cannot read rows of a {type(module).__name__} in RAM: the device cannot (pinning failed or is over the "
            "plan's limit, or the driver names no address), and its forward does more than look them up: keep its "
            "block on the device (pins={...: 'device'}), or raise the limit on pinned RAM"
        )
    original = call_of(module)

    def forward(*args: Any, **kwargs: Any) -> Any:
        args = tuple(_on_cpu(value) for value in args)
        made = original(*args, **{name: _on_cpu(value) for name, value in kwargs.items()})
        return made.to(device, non_blocking=True)

    return replace_call(module, forward)


def _on_cpu(value: Any) -> Any:
    return value.cpu() if isinstance(value, torch.Tensor) else value
