"""What a solver starts from: the cost rows as arrays, and which blocks may be streamed at all."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from memplan.analyze.graph import Activations
from memplan.cost.table import CostTable
from memplan.device_kinds import is_apart
from memplan.errors import InputError
from memplan.place.layout.offload import Saves, make_saves
from memplan.program.page_lock import is_state_locked, rings_bytes
from memplan.program.schema import Budgets, Tier
from memplan.units import KIB, align_up

TINY_BYTES = 64 * KIB
"""A block below this stays on the device: a load of its own would cost more than its room."""

MOST_LEVELS = 256
"""Numbers of recomputed modules that are looked at, beside none: each expert is a module."""

Bytes = NDArray[np.int64]

MOST_SUBSETS = 4
"""Free modules up to which every choice of them is looked at, not their number alone."""

FEW_BLOCKS = 20
"""Movable blocks up to which the search is thorough: each changes a pass by much, and there are few choices."""

_POLICIES: tuple[Activations, ...] = ("keep", "recompute", "offload")


@dataclass(frozen=True, slots=True, kw_only=True)
class Problem:
    """Cost rows, budgets and pins, and what follows from them."""

    table: CostTable
    budgets: Budgets
    staging_bytes: int
    pins: Mapping[int, Tier]
    activations: Mapping[str, Activations]
    """Of the modules for which they are given; those of the others are free."""
    saves: Saves
    """What is offloaded, which ``activations`` alone say."""
    movable: tuple[int, ...]
    """Blocks that may be streamed, in order of first access."""
    bundles: tuple[tuple[int, ...], ...]
    """Blocks that may leave the device, those together that are always read together, in order of first access."""
    resident: tuple[int, ...]
    """Blocks that stay on the device whatever happens."""
    forced: tuple[int, ...]
    """Blocks that are pinned to the host or the disk."""
    sizes_bytes: tuple[int, ...]
    """Room that each block takes in an arena, by block."""
    uses: tuple[tuple[int, ...], ...]
    """Accesses that read each block, by block."""
    whole_uses: tuple[tuple[int, ...], ...]
    """Those of them that read more than rows of it: these need it on the device."""
    ranks: tuple[tuple[int, int], ...]
    """What the blocks are sorted by: their first access, then their number."""
    rows: tuple[tuple[int, int], ...]
    """Each reading of rows: of which block, and their bytes, of all micro-batches of a group."""

    @property
    def ram_bytes(self) -> int:
        """The budget for weights and staging: what offloaded activations and the optimizer's state leave of it."""
        own = self.saves.host_bytes + self.table.state_on_host_bytes
        return self.budgets.ram_bytes - self.table.ranks.node_bytes(0, own)

    @property
    def disk_may_help(self) -> bool:
        """Whether the disk brings bytes beside what RAM does: on the CPU; to a card both take the one link."""
        return not is_apart(self.table.device) and self.budgets.disk_bytes != 0

    @property
    def page_lock_bytes(self) -> int | None:
        """What may be page-locked; None where all may be. On the CPU there is nothing to lock pages for."""
        return self.budgets.page_lock_bytes if is_apart(self.table.device) else None

    def is_pageable(self, host_bytes: int, *, reads_disk: bool) -> bool:
        """Whether some of so many bytes of weights on the host, and of offloaded activations, cannot be page-locked."""
        limit = self.page_lock_bytes
        if limit is None:
            return False
        held = host_bytes + self.saves.host_bytes
        rings = rings_bytes(reads_disk=reads_disk, is_pageable=False)
        return held > 0 and held + self.locked_state_bytes + rings > limit

    @property
    def locked_state_bytes(self) -> int:
        """Of the optimizer's state, where it waits in RAM and is page-locked there."""
        state = self.table.state_on_host_bytes
        return state if is_state_locked(state, self.page_lock_bytes) else 0

    def staged_bytes(self, host_bytes: int, *, reads_disk: bool) -> int:
        """Return a node's bytes of RAM for staging beside so many of weights."""
        is_pageable = self.is_pageable(host_bytes, reads_disk=reads_disk)
        each = rings_bytes(reads_disk=False, is_pageable=is_pageable) + (self.staging_bytes if reads_disk else 0)
        return self.table.ranks.node_bytes(0, each)

    @property
    def free_modules(self) -> list[str]:
        """Recomputable modules whose activations are to be chosen."""
        return [module for module in self.table.recomputable if module not in self.activations]

    @property
    def levels(self) -> int:
        """How many choices of recomputed modules there are, from none to all of those that are free."""
        free = len(self.free_modules)
        return 1 << free if free <= MOST_SUBSETS else 1 + min(free, MOST_LEVELS)

    def recomputed_at(self, level: int) -> tuple[str, ...]:
        """Return the modules that are recomputed at a level: of a few every choice, by their number; of more as many as
        it says, of many in even steps, spread evenly.
        """
        free = self.free_modules
        if len(free) <= MOST_SUBSETS:
            return subsets(free)[level]
        count = level if len(free) <= MOST_LEVELS else -(-level * len(free) // MOST_LEVELS)
        return tuple(free[index] for index in evenly(count, len(free))) if count else ()

    @property
    def length(self) -> int:
        """Accesses of a pass."""
        return len(self.table.accesses)

    def size(self, block: int) -> int:
        """Bytes of a block that a load moves."""
        return self.table.blocks[block].size_bytes

    def room(self, blocks: Iterable[int]) -> int:
        """Bytes that blocks take in an arena."""
        return sum(map(self.sizes_bytes.__getitem__, blocks))

    def bundles_of(self, blocks: Iterable[int]) -> list[tuple[int, ...]]:
        """Return the bundles of these blocks alone, in order of first access."""
        among = set(blocks)
        return [kept for bundle in self.bundles if (kept := tuple([block for block in bundle if block in among]))]

    def needs(self, block: int, home: Tier) -> tuple[int, ...]:
        """Return the accesses for which a streamed block must be on the device: rows are read in RAM where it is
        there.
        """
        return self.whole_uses[block] if home == "host" else self.uses[block]

    def in_order(self, blocks: Iterable[int]) -> list[int]:
        """Return blocks in the order of their first access."""
        return sorted(blocks, key=self.ranks.__getitem__)


def make_problem(
    table: CostTable,
    budgets: Budgets,
    staging_bytes: int,
    pins: Mapping[int, Tier],
    activations: Mapping[str, Activations] = MappingProxyType({}),
) -> Problem:
    """Sort the blocks by what may become of them. Raises InputError for a pin or activations that cannot be as
    given.
    """
    for module in activations:
        if module not in table.recomputable:
            raise InputError(
                f"the activations of {module!r} were given as {activations[module]}, but memplan cannot set them: "
                + (f"name modules such as {table.recomputable[0]}" if table.recomputable else "leave them out")
            )
    reads: list[list[int]] = [[] for _ in table.blocks]
    for access in table.accesses:
        for read in dict.fromkeys(access.blocks):
            reads[read].append(access.index)
    _refuse_strange_pins(table, pins)
    beside = _read_beside_others(table, pins, reads)
    total = sum(block.size_bytes for block in table.blocks)
    movable, resident, forced = [], [], []
    for block in table.blocks:
        pin = pins.get(block.id)
        stays = block.pinned_because or ("it is read beside another streamed block" if block.id in beside else "")
        # What no planned access reads may be pinned anywhere: a read beside the plan is served as any other. Else it
        # stays.
        stays = stays or ("" if reads[block.id] or pin is not None else "no access reads it")
        if pin in ("host", "disk") and stays:
            raise InputError(
                f"{block.name} was pinned to {pin}, but must stay on the device ({stays}): leave the pin out"
            )
        if stays or pin == "device":
            resident.append(block.id)
        elif pin is not None:
            forced.append(block.id)
        elif block.kind not in ("layer", "expert") and block.size_bytes < max(TINY_BYTES, total // 200):
            resident.append(block.id)
        else:
            movable.append(block.id)
    movable.sort(key=lambda block: (reads[block][0], block))
    bundles: dict[tuple[int, ...], list[int]] = {}
    for streamable in sorted([*movable, *(block for block in forced if reads[block])], key=lambda b: (reads[b][0], b)):
        bundles.setdefault(tuple(reads[streamable]), []).append(streamable)
    return Problem(
        table=table,
        budgets=budgets,
        staging_bytes=staging_bytes,
        pins=pins,
        activations=activations,
        saves=make_saves(table, activations),
        movable=tuple(movable),
        bundles=tuple(tuple(bundle) for bundle in bundles.values()),
        resident=tuple(resident),
        forced=tuple(forced),
        sizes_bytes=tuple(align_up(block.size_bytes) for block in table.blocks),
        uses=tuple(tuple(indices) for indices in reads),
        whole_uses=tuple(
            tuple(index for index in indices if not table.accesses[index].reads_rows_of(block))
            for block, indices in enumerate(reads)
        ),
        ranks=tuple((indices[0] if indices else len(table.accesses), block) for block, indices in enumerate(reads)),
        rows=tuple((rows.block, table.group * rows.size_bytes) for access in table.accesses for rows in access.rows),
    )


def _refuse_strange_pins(table: CostTable, pins: Mapping[int, Tier]) -> None:
    for block, tier in pins.items():
        if not 0 <= block < len(table.blocks):
            raise InputError(
                f"block {block} was pinned to {tier}, but there are blocks 0 to {len(table.blocks) - 1} only"
            )
        if tier not in ("device", "host", "disk"):
            raise InputError(f"{table.blocks[block].name} was pinned to {tier!r}: give device, host or disk")


def _read_beside_others(table: CostTable, pins: Mapping[int, Tier], reads: list[list[int]]) -> set[int]:
    """Return the blocks to keep so that no access reads two streamed ones, but for those that are always read together.

    Of those read at once the ones stay free that are pinned away from the device, else are read least often.
    """
    kept: set[int] = set()
    for access in table.accesses:
        free: dict[tuple[int, ...], list[int]] = {}
        for block in dict.fromkeys(access.blocks):
            if block not in kept and not table.blocks[block].pinned_because and pins.get(block) != "device":
                free.setdefault(tuple(reads[block]), []).append(block)
        if len(free) < 2:
            continue

        def worth(bundle: list[int]) -> tuple[bool, bool, int, int]:
            kinds, sizes = [table.blocks[b].kind for b in bundle], [table.blocks[b].size_bytes for b in bundle]
            return (any(b in pins for b in bundle), "shared" not in kinds, -len(reads[bundle[0]]), sum(sizes))

        for bundle in sorted(free.values(), key=worth)[:-1]:
            kept.update(bundle)
    return kept


class Memory:
    """Device bytes at every access, frozen weights apart, for any choice of activations.

    The same sums as :meth:`memplan.cost.table.CostTable.device_bytes_at`, as arrays, for all choices at once.
    """

    def __init__(self, table: CostTable) -> None:
        length = len(table.accesses)
        position = {module: index for index, module in enumerate(table.recomputable)}
        self._table = table
        self._modules = table.recomputable
        self._base = np.full(length, sum(row.size_bytes for row in table.fixed), dtype=np.int64)
        zeros = np.zeros((len(position), length), dtype=np.int64)
        self._more: dict[Activations, Bytes] = {policy: zeros.copy() for policy in _POLICIES}
        waits = np.zeros((len(position), length + 1) if table.group > 1 else (0, 0), dtype=np.int64)
        self._waits_base = np.full(length + 1, table.batch_bytes, dtype=np.int64)
        self._waits: dict[Activations, Bytes] = {policy: waits.copy() for policy in _POLICIES}
        """Of activations what crosses from each access to the next; where groups pass."""
        for life in table.lifetimes:
            module = position.get(table.accesses[life.born].module)
            is_each = table.group > 1 and life.kind == "activations"
            if life.policy == "any" or module is None:
                if life.policy in ("any", "keep"):
                    self._base[life.born : life.last + 1] += life.size_bytes
                    if is_each:
                        self._waits_base[life.born + 1 : life.last + 1] += life.size_bytes
            else:
                self._more[life.policy][module, life.born : life.last + 1] += life.size_bytes
                if is_each:
                    self._waits[life.policy][module, life.born + 1 : life.last + 1] += life.size_bytes
        for access in table.accesses:
            module = position.get(access.module)
            if module is None:
                self._base[access.index] += access.transient_bytes
            else:
                for policy, more in self._more.items():
                    more[module, access.index] += access.transient(policy)

    def at(self, policies: Mapping[str, Activations]) -> Bytes:
        """Return the bytes at each access."""
        total, waits = self._base.copy(), self._waits_base.copy()
        group = self._table.group
        for policy, more in self._more.items():
            chosen = [policies.get(module, "keep") == policy for module in self._modules]
            total += more[chosen].sum(axis=0)
            if group > 1:
                waits += self._waits[policy][chosen].sum(axis=0)
        if group == 1:
            return total
        found: Bytes = total + (group - 1) * np.maximum(waits[:-1], waits[1:])
        if (around := self._table.turn_around) is not None:
            first, last = around
            most_waiting = max(waits[first], waits[last + 1])
            found[first : last + 1] = total[first : last + 1].max() + (group - 1) * most_waiting
        return found


def evenly(count: int, of: int) -> tuple[int, ...]:
    """Return ``count`` of the indices 0 … of-1, spread evenly."""
    return tuple((2 * index + 1) * of // (2 * count) for index in range(count))


def subsets(modules: Sequence[str]) -> list[tuple[str, ...]]:
    """Return every choice of modules, the fewest first."""
    return [chosen for count in range(len(modules) + 1) for chosen in itertools.combinations(modules, count)]


def policies_for(problem: Problem, level: int) -> dict[str, Activations]:
    """Return the policies that recompute the modules that a level says."""
    modules, given, chosen = problem.table.recomputable, problem.activations, set(problem.recomputed_at(level))
    return {module: given.get(module, "recompute" if module in chosen else "keep") for module in modules}


def nonweight_bytes(problem: Problem) -> list[Bytes]:
    """Return the device bytes at each access apart from frozen weights, by number of recomputed modules."""
    memory, slots_bytes = Memory(problem.table), problem.saves.device_bytes
    return [memory.at(policies_for(problem, level)) + slots_bytes for level in range(problem.levels)]
