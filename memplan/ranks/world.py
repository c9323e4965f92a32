"""Whether this process is one of several that torch.distributed knows, and which. Imports no torch."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_BOOT = Path("/proc/sys/kernel/random/boot_id")
_PIDS = "/proc/self/ns/pid"


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """The ranks. ``store``: torch.distributed's own, under names that are memplan's alone."""

    rank: int
    size: int
    store: Any


def world() -> World | None:
    """Return the ranks, or None where this process trains alone as far as torch.distributed knows."""
    dist: Any = sys.modules.get("torch.distributed")
    if dist is None or not hasattr(dist, "is_initialized"):  # torch may be on its way in
        return None
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    if dist.get_backend() == "fake":  # stands for ranks that there are none of
        return None
    _Known.rank = dist.get_rank()
    store = dist.PrefixStore(_prefix(), dist.distributed_c10d._get_default_store())
    return World(rank=dist.get_rank(), size=dist.get_world_size(), store=store)


def _prefix() -> str:
    """Return what memplan's names in the store begin with.

    A launcher that starts its ranks anew may keep the store, with all that those before have said there. On one node
    it counts the starts; of several nodes each counts its own, so that they would not meet.
    """
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if os.environ.get("GROUP_WORLD_SIZE") == "1" else "0"
    return f"memplan {start}"


def launched_size() -> int:
    """Return how many processes a launcher says that it has started; 1 where there was none."""
    try:
        return int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError:
        return 1


def is_first() -> bool:
    """Whether this process is the one that speaks for all: rank 0, or the only one."""
    if world() is None and _Known.rank is None and launched_size() > 1:  # Lightning's own launcher tells of no RANK
        names = ("RANK",) if "RANK" in os.environ else ("NODE_RANK", "LOCAL_RANK")
        return all(os.environ.get(name, "0") == "0" for name in names)
    return not _Known.rank


class _Known:
    """What was known before the process group was destroyed, and a trainer has cleared its environment."""

    rank: int | None = None


def unknown_ranks() -> str | None:
    """Return why one of several processes is not served, where torch.distributed does not know them; else None."""
    if launched_size() < 2 or world() is not None:
        return None
    return (
        "this is one of several processes that do not know each other yet: it serves them from "
        "torch.distributed.init_process_group on"
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """What can share memory: processes that one kernel has booted, and that see each other's numbers."""

    boot: str
    pids: str


def this_node(rank: int) -> Node:
    """Return this process's node; one of its own where the system does not say."""
    try:
        return Node(boot=_BOOT.read_text().strip(), pids=os.readlink(_PIDS))
    except OSError:
        return Node(boot=f"rank {rank}", pids="")
