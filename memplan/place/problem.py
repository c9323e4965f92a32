"""What a solver starts from: the cost rows as arrays, and which blocks may be streamed at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.program.schema import Budgets, Tier
from memplan.units import KIB

TINY_BYTES = 64 * KIB
"""A block below this stays on the device: a load of its own would cost more than its room."""

Bytes = NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Cost rows, budgets and pins, and what follows from them."""

    table: CostTable
    budgets: Budgets
    staging_bytes: int
    pins: Mapping[int, Tier]
    stack: tuple[int, ...]
    """Streamable elements of stacks, in order of first access."""
    specials: tuple[int, ...]
    """Other streamable blocks that are worth streaming (embedding, head, shared), largest first, at most four."""
    resident: tuple[int, ...]
    """Blocks that stay on the device whatever happens."""
    forced: tuple[int, ...]
    """Blocks that are pinned to the host or the disk."""

    @property
    def length(self) -> int:
        """Accesses of a pass."""
        return len(self.table.accesses)

    def size(self, block: int) -> int:
        """Bytes of a block."""
        return self.table.blocks[block].size_bytes


def make_problem(table: CostTable, budgets: Budgets, staging_bytes: int, pins: Mapping[int, Tier]) -> Problem:
    """Sort the blocks by what may become of them."""
    first = {block: access.index for access in reversed(table.accesses) for block in access.blocks}
    joint = {
        block
        for access in table.accesses
        for block in access.blocks
        if len(access.blocks) > 1 and table.blocks[block].kind == "shared"
    }
    total = sum(block.size_bytes for block in table.blocks)
    stack, specials, resident, forced = [], [], [], []
    for block in table.blocks:
        pin = pins.get(block.id)
        if block.pinned_because or block.id not in first or pin == "device" or block.id in joint:
            resident.append(block.id)
        elif pin is not None:
            forced.append(block.id)
        elif block.kind == "layer":
            stack.append(block.id)
        elif block.size_bytes < max(TINY_BYTES, total // 200):
            resident.append(block.id)
        else:
            specials.append(block.id)
    specials.sort(key=lambda block: (-table.blocks[block].size_bytes, block))
    return Problem(
        table=table,
        budgets=budgets,
        staging_bytes=staging_bytes,
        pins=pins,
        stack=tuple(sorted(stack, key=lambda block: first[block])),
        specials=tuple(specials[:4]),
        resident=tuple(sorted([*resident, *specials[4:]])),
        forced=tuple(forced),
    )


class Memory:
    """Device bytes at every access, frozen weights apart, for any number of recomputed modules.

    The same sums as :meth:`memplan.cost.table.CostTable.device_bytes_at`, as arrays, for all choices at once.
    """

    def __init__(self, table: CostTable) -> None:
        length = len(table.accesses)
        position = {module: index for index, module in enumerate(table.recomputable)}
        self._modules = table.recomputable
        self._base = np.full(length, sum(row.size_bytes for row in table.fixed), dtype=np.int64)
        self._keep = np.zeros((len(position), length), dtype=np.int64)
        self._recompute = np.zeros((len(position), length), dtype=np.int64)
        for life in table.lifetimes:
            module = position.get(table.accesses[life.born].module)
            if life.policy == "any" or module is None:
                if life.policy != "recompute":
                    self._base[life.born : life.last + 1] += life.size_bytes
            elif life.policy == "keep":
                self._keep[module, life.born : life.last + 1] += life.size_bytes
            else:
                self._recompute[module, life.born : life.last + 1] += life.size_bytes
        for access in table.accesses:
            module = position.get(access.module)
            if module is None:
                self._base[access.index] += access.transient_bytes
            else:
                self._keep[module, access.index] += access.transient_bytes
                self._recompute[module, access.index] += access.transient_recompute_bytes

    def at(self, policies: Mapping[str, Activations]) -> Bytes:
        """Return the bytes at each access."""
        recomputed = np.array([policies.get(module, "keep") == "recompute" for module in self._modules], dtype=bool)
        total: Any = self._base + self._keep[~recomputed].sum(axis=0) + self._recompute[recomputed].sum(axis=0)
        return total  # type: ignore[no-any-return]


def evenly(count: int, of: int) -> tuple[int, ...]:
    """Return ``count`` of the indices 0 … of-1, spread evenly."""
    return tuple((2 * index + 1) * of // (2 * count) for index in range(count))


def to_the_ends(count: int, of: int) -> tuple[int, ...]:
    """Return ``count`` of the indices 0 … of-1, spread evenly from the first to the last.

    What is streamed there is used again at the turn-arounds, where its slot holds it anyway.
    """
    return tuple(index * (of - 1) // max(count - 1, 1) for index in range(count))


def policies_for(table: CostTable, recomputed: int) -> dict[str, Activations]:
    """Return the policies that recompute that many of the recomputable modules, spread evenly."""
    chosen = set(evenly(recomputed, len(table.recomputable)))
    return {module: "recompute" if i in chosen else "keep" for i, module in enumerate(table.recomputable)}
