"""Ranks: how many processes train under one plan, and the all-reduce of their adapters' gradients. Plain data."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct


class Reduce(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The all-reduce of one bucket of gradients."""

    after: int
    """The access that makes the last of its gradients."""
    size_bytes: int
    time_s: float


class Ranks(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Data-parallel ranks. Times, rates and vram are those of one rank, RAM and disk those of a node."""

    nodes: int = 1
    per_node: int = 1
    reduces: tuple[Reduce, ...] = ()
    """Of the last backward of a step, one after another."""

    @property
    def count(self) -> int:
        """All ranks."""
        return self.nodes * self.per_node

    def node_bytes(self, shared_bytes: int, own_bytes: int) -> int:
        """Return the RAM of a node: what its ranks share, and what each has of its own."""
        return shared_bytes + self.per_node * own_bytes

    def unhidden_s(self, ends_s: Sequence[float]) -> float:
        """Return how much longer than the last backward the all-reduce takes. ``ends_s``: of each access of a
        micro-batch.
        """
        free_s = 0.0
        for reduce in self.reduces:
            free_s = max(free_s, ends_s[reduce.after]) + reduce.time_s
        return max(0.0, free_s - ends_s[-1]) if self.reduces else 0.0
