"""The host arenas of several ranks: one memory a node for the weights that lie there."""

from __future__ import annotations

import logging
import mmap

import torch

from memplan.program.schema import Address, Plan
from memplan.ranks.session import Session
from memplan.ranks.shared_memory import SharedMemory, shared_memory
from memplan.run.memory.page_lock import lock_pages
from memplan.run.transfer.device import is_apart
from memplan.run.transfer.transfer import HostSource
from memplan.units import align_up, format_bytes

_LOG = logging.getLogger("memplan")


class SharedArena:
    """Weights of one arena, in memory that a node's ranks share."""

    def __init__(self, memory: SharedMemory, *, pinned: bool) -> None:
        """``pinned``: the device is to read it by itself; where that is refused it is pageable."""
        self._memory = memory
        self._pinned: torch.Tensor | None = None
        if pinned:
            assert memory.filling is not None
            try:
                self._pinned = lock_pages(memory.filling)
            except RuntimeError as error:
                _LOG.warning(
                    "cannot pin %s of RAM that ranks share (%s): it is pageable, which takes one more copy",
                    format_bytes(memory.bytes.numel()),
                    str(error).splitlines()[0],
                )

    def filling(self, at: Address) -> torch.Tensor:
        """Return an address's bytes as they are filled: uint8, one dimension, no copy."""
        assert self._memory.filling is not None
        return _part(self._memory.filling, at)

    def filled(self) -> None:
        """Have all ranks done with filling."""
        self._memory.filled()

    def source(self, at: Address) -> HostSource:
        """Return an address's bytes as they are read."""
        private = _part(self._memory.bytes, at)
        return HostSource(private) if self._pinned is None else HostSource(_part(self._pinned, at), private)


def shared_arenas(plan: Plan, device: torch.device, ranks: Session) -> dict[int, SharedArena]:
    """Return the host arenas of a plan that hold weights, by number, where the ranks of this node can share them.

    Where they cannot each has its own, and a line says so. Every rank calls this. Raises RankError.
    """
    found: dict[int, SharedArena] = {}
    for arena in plan.arenas:
        ends = [
            address.offset_bytes + address.size_bytes
            for address in plan.addresses
            if address.arena == arena.id and plan.items[address.item].kind == "weights"
        ]
        if arena.tier != "host" or not ends:
            continue
        memory = shared_memory(ranks, align_up(max(ends), mmap.PAGESIZE))
        if memory is not None:
            found[arena.id] = SharedArena(memory, pinned=is_apart(device) and not arena.pageable)
        elif len(ranks.node) > 1:
            _LOG.warning(
                "the %d ranks of this node cannot share memory: each has %s of weights on the host of its own",
                len(ranks.node),
                format_bytes(sum(a.size_bytes for a in plan.addresses if a.arena == arena.id)),
            )
    return found


def _part(held: torch.Tensor, at: Address) -> torch.Tensor:
    with torch.inference_mode(False), torch.no_grad():
        return held[at.offset_bytes : at.offset_bytes + at.size_bytes]
