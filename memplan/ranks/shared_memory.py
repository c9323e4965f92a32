"""Memory without a name that the ranks of a node share: one copy of weights that all of them read.

It goes with the last process that maps it, however that ends: nothing is left in ``/dev/shm``, whose limit is not its
own either. Its pages count once for the node: each rank's proportional set size has its part.

[Note: who writes to what is shared] While it is filled each rank writes to the blocks that are its own, by a mapping
that goes afterwards. What stays is mapped privately, so that a script that writes to a frozen weight, which it does on
every rank, writes to its rank's copy of that page. Pages that a device reads by itself must not be copied from under
it: where memory is pinned the shared mapping stays, nothing of ours writes to it, and who is handed a weight gets it by
a private one.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from typing import TypeVar

import msgspec
import numpy as np
import torch

from memplan.ranks.session import Session


class SharedMemory:
    """Bytes of a node. ``filling``: they are written by it; ``bytes``: they are read, and privately written."""

    def __init__(self, descriptor: int, size_bytes: int) -> None:
        self.filling: torch.Tensor | None = _mapped(descriptor, size_bytes, mmap.MAP_SHARED)
        self.bytes = _mapped(descriptor, size_bytes, mmap.MAP_PRIVATE)

    def filled(self) -> None:
        """Have nobody write to it any more."""
        self.filling = None


class _Offer(msgspec.Struct, frozen=True):
    """How a node's memory is opened: a file descriptor of one of its processes; none where it could not be made."""

    pid: int
    descriptor: int = -1


T = TypeVar("T")


def shared_memory(ranks: Session, size_bytes: int) -> SharedMemory | None:
    """Return so many bytes (at least one) that the ranks of this node share; None where one of them cannot.

    Every rank calls this, with a size that is the same within its node. Raises RankError.
    """
    return shared(ranks, size_bytes, SharedMemory)


def shared(ranks: Session, size_bytes: int, made_of: Callable[[int, int], T]) -> T | None:
    """Return what ``made_of`` makes on each rank of so many bytes that a node shares; None where one of them cannot.

    ``made_of``: called with a file descriptor, which is closed afterwards, and the size. Every rank calls this, with a
    size that is the same within its node. Raises RankError.
    """
    offer, own = _Offer(pid=os.getpid()), -1
    made: T | None = None
    try:
        if ranks.place == 0 and len(ranks.node) > 1 and hasattr(os, "memfd_create"):
            try:
                own = os.memfd_create("memplan", os.MFD_CLOEXEC)
                os.ftruncate(own, size_bytes)
                offer = _Offer(pid=os.getpid(), descriptor=own)
            except OSError:
                pass  # the others see that there is none
        offers = ranks.gather("offering shared memory", msgspec.msgpack.encode(offer))
        offered = msgspec.msgpack.decode(offers[ranks.node[0].rank], type=_Offer)
        descriptor = _opened(offered, size_bytes)
        if descriptor is not None:
            try:
                made = made_of(descriptor, size_bytes)
            except OSError:
                pass  # there is no room to map it
            finally:
                os.close(descriptor)
        # Also: the descriptor stays until all have opened it.
        opened = ranks.gather("opening shared memory", b"" if made is None else b"1")
    finally:
        if own >= 0:
            os.close(own)
    return made if all(opened[member.rank] for member in ranks.node) else None


def _opened(offer: _Offer, size_bytes: int) -> int | None:
    """Return a descriptor of what is offered, or None where this process cannot open it."""
    if offer.descriptor < 0:
        return None
    try:
        descriptor = os.open(f"/proc/{offer.pid}/fd/{offer.descriptor}", os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return None
    if os.fstat(descriptor).st_size == size_bytes:
        return descriptor
    os.close(descriptor)
    return None


def _mapped(descriptor: int, size_bytes: int, kind: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(np.frombuffer(mmap.mmap(descriptor, size_bytes, flags=kind), np.uint8))
