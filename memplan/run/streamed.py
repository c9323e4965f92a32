"""A streamed block: its one address on the device, and whether it is there."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from memplan.errors import RunError
from memplan.program.schema import Channel
from memplan.run.transfer import Source, Ticket


@dataclass(slots=True, kw_only=True)
class Streamed:
    """One streamed block: where it comes from, where it goes, and whether it is there."""

    block: int
    name: str
    channel: Channel
    source: Source
    part: torch.Tensor
    """Its byte range of the device arena: its one address."""
    pointers: tuple[tuple[torch.Tensor, torch.Tensor, torch.Tensor], ...]
    """Each tensor of its weights, the view of the part that it is, and its placeholder."""
    at_home: tuple[tuple[torch.Tensor, torch.Tensor], ...] = ()
    """Each tensor, and the view of its home that it is where rows of it are read there; empty where they never are."""
    rivals: tuple[int, ...] = ()
    """Streamed blocks whose addresses overlap this one's."""
    ticket: Ticket | None = None
    """There or on its way; None: away."""
    usable: bool = False
    """The compute has waited for it and the parameters point at it."""
    loads: int = 0
    misses: int = 0
    stall_s: float = 0.0

    @property
    def key(self) -> int:
        return self.block

    def point(self) -> None:
        """Point the parameters at the block. Raises RunError where one is trained by now: what it learned would be lost."""
        for tensor, there, _ in self.pointers:
            if tensor.requires_grad:
                raise RunError(
                    f"a weight of {self.name} was frozen when it was placed and is trained now, but memplan only ever "
                    "reads it: detach() first, then plan and attach anew"
                )
            tensor.data = there

    def unpoint(self) -> None:
        for tensor, _, away in self.pointers:
            tensor.data = away

    def point_home(self) -> None:
        for tensor, there in self.at_home:
            tensor.data = there
