"""What was handed out of a frozen weight: who still holds it, and whether it was written to."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

import torch

from memplan.analyze.graph import Tensor
from memplan.run.memory.home import as_bytes, layout_of
from memplan.run.schedule.streamed import Streamed

if TYPE_CHECKING:
    pass


@dataclass(slots=True, eq=False)
class HandedOut:
    """True values of a weight that someone else may hold and write to."""

    tensor: torch.Tensor
    row: Tensor
    state: Literal["home", "copy", "mapped"]
    """The home's own bytes; a copy on the device; or a private mapping of the home's file."""
    checksum: int = 0
    """Of the home's own bytes, of a block that is recomputed: who writes to them between forward and backward is heard.
    """
    for_good: bool = False
    """Its storage itself was handed out, of which nobody tells who holds it."""

    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.tensor.data_ptr()

    def is_shared(self) -> bool:
        """Whether anyone but this refers to its memory."""
        return self.for_good or _uses_of(self.tensor) > _ALONE


def alias_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return the same memory as a tensor that is no view of another: it holds nothing but the storage."""
    with torch.inference_mode(False), torch.no_grad():
        made = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return made.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def _uses_of(tensor: torch.Tensor) -> int:
    """Return how many refer to a tensor's memory, this look included."""
    uses: int = torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)
    return uses


_ALONE = _uses_of(torch.empty(1))
"""Of a tensor whose memory nobody else refers to."""


def checksum(tensor: torch.Tensor) -> int:
    return zlib.crc32(as_bytes(tensor).numpy().data) or 1


def are_equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return torch.equal(as_bytes(one).cpu(), as_bytes(other).cpu())


@dataclass(slots=True, eq=False)
class Lent:
    """True values of a weight in one call."""

    streamed: Streamed
    place: int
    held: HandedOut
    alias: torch.Tensor
    is_replaced: bool = False
    is_written: bool = False
    value: torch.Tensor = field(init=False)
    _version: int = field(init=False)

    def __post_init__(self) -> None:
        self._version = self.alias._version

    def look(self) -> None:
        """See what the call has done to it, and let go of it."""
        alias, true = self.alias, self.held.tensor
        self.is_replaced = layout_of(alias) != layout_of(true)
        self.is_written = alias._version != self._version
        self.value = alias.data if self.is_replaced else true
        del self.alias


@dataclass(slots=True, eq=False)
class StandIn:
    """What a call is given in a weight's place.

    Not the weight itself: autograd saves a tensor that was given to an operator as it is, whatever it is pointed at
    later.
    """

    weight: torch.Tensor
    shown: torch.Tensor
    lent: tuple[Lent, ...]

    def let_go(self) -> tuple[Lent, ...]:
        """Hold nothing that was shown any more, and return what was made of it."""
        del self.shown
        for lent in self.lent:
            lent.look()
        return self.lent
