"""CostTable: the graph's rows with a time beside each access. Plain data: a Plan carries the rows it was made from."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import accumulate

from msgspec import Struct

from memplan.analyze.graph import AccessKind, Activations, Block, Fixed, Lifetime, Rows
from memplan.cost.ranks import Ranks


class AccessRow(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One access and its cost. Indices and meanings as in :class:`memplan.analyze.graph.Access`."""

    index: int
    kind: AccessKind
    module: str
    forward: int
    blocks: tuple[int, ...]
    rows: tuple[Rows, ...] = ()
    time_s: float
    """Compute time on the device, weights being there, activations kept."""
    recompute_s: float
    """Time that recomputing this module's activations adds here; 0 where it cannot be."""
    transient_bytes: int
    transient_recompute_bytes: int
    transient_offload_bytes: int = 0
    offload_bytes: int = 0
    offload_s: float = 0.0
    """Forward accesses: the time in which the device sets aside what is offloaded."""
    weight_copy_bytes: int = 0
    gradient_bytes: int = 0

    def reads_rows_of(self, block: int) -> bool:
        """Whether it reads no more than rows of the block."""
        return any(rows.block == block for rows in self.rows)

    def transient(self, policy: Activations) -> int:
        """Return the transient bytes under an activation policy of this access's module."""
        if policy == "keep":
            return self.transient_bytes
        return self.transient_recompute_bytes if policy == "recompute" else self.transient_offload_bytes


class Reserved(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a CUDA device reserves beyond what is alive (:mod:`memplan.cost.reserved`); it is in no peak."""

    what: str
    size_bytes: int
    source: str
    """Where its constants come from."""


class CostTable(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Everything the placement may know of the model and the machine."""

    blocks: tuple[Block, ...]
    accesses: tuple[AccessRow, ...]
    lifetimes: tuple[Lifetime, ...]
    fixed: tuple[Fixed, ...]
    recomputable: tuple[str, ...]
    checkpointed: tuple[str, ...] = ()
    """Layers that every plan recomputes, the time of which is in the accesses of the modules within them."""
    device: str
    """Its kind, by torch's name: ``"cpu"``, ``"cuda"`` (ROCm too) or ``"xpu"``."""
    host_to_device_bytes_per_s: float
    device_to_host_bytes_per_s: float
    disk_bytes_per_s: float
    load_latency_s: float
    """Added to each load, whatever its size."""
    pageable_bytes_per_s: float | None = None
    """Between a GPU and RAM that is not pinned, either way; None on the CPU."""
    duplex_factor: float = 1.0
    """Share of its own rate that a direction of the link reaches while the other is busy too."""
    group: int = 1
    """Micro-batches that pass each access one after another before any of them goes on (:mod:`memplan.cost.group`);
    rows and lifetimes are those of one of them."""
    ranks: Ranks = Ranks()
    """Processes that train under the plan. Rates are those with all of a node loading at once."""
    reserved: tuple[Reserved, ...] = ()

    @property
    def state_on_host_bytes(self) -> int:
        """Of the optimizer's state, where it is in RAM between steps (:mod:`memplan.cost.optimizer_state`); else
        0.
        """
        return sum(life.size_bytes for life in self.lifetimes if life.kind == "optimizer")

    def device_bytes_at(self, index: int, policies: Mapping[str, Activations]) -> int:
        """Return the device bytes at the peak of access ``index``, frozen weights apart.

        ``policies`` maps a trigger module to its activation policy; a module not in it keeps.
        """
        return self.device_bytes(policies)[index]

    def device_bytes(self, policies: Mapping[str, Activations]) -> list[int]:
        """Return what :meth:`device_bytes_at` says of each access, of all of them at once."""
        length = len(self.accesses)
        changes, crossing = [0] * (length + 1), [0] * (length + 1)
        for life in self.lifetimes:
            if life.policy in ("any", policies.get(self.accesses[life.born].module, "keep")):
                changes[life.born] += life.size_bytes
                changes[life.last + 1] -= life.size_bytes
                if life.kind == "activations":
                    crossing[life.born + 1] += life.size_bytes
                    crossing[life.last + 1] -= life.size_bytes
        always = sum(row.size_bytes for row in self.fixed)
        alone = [
            always + alive + row.transient(policies.get(row.module, "keep"))
            for alive, row in zip(accumulate(changes), self.accesses, strict=False)
        ]
        if self.group == 1:
            return alone
        waits = list(accumulate(crossing))
        return [
            max(alone[first : last + 1]) + (self.group - 1) * (max(waits[first], waits[last + 1]) + self.batch_bytes)
            for first, last in map(self.visit, range(length))
        ]

    @property
    def batch_bytes(self) -> int:
        """What one micro-batch is given."""
        return sum(row.size_bytes for row in self.fixed if row.kind == "batch")

    @property
    def turn_around(self) -> tuple[int, int] | None:
        """The accesses, first and last, that a micro-batch of a group passes in one visit, so that its logits are gone
        before the next one makes its own: the last forward, the loss and the first backward. None where these two are
        not of one module: then no group can pass.
        """
        at = next((row.index for row in self.accesses if row.kind == "loss"), 0)
        if not 0 < at < len(self.accesses) - 1:
            return None
        before, behind = self.accesses[at - 1], self.accesses[at + 1]
        is_one = (before.kind, behind.kind) == ("forward", "backward") and behind.forward == before.index
        return (at - 1, at + 1) if is_one else None

    def visit(self, index: int) -> tuple[int, int]:
        """Return the accesses, first and last, that each micro-batch of a group passes before the next one begins the
        first of them: ``index`` itself, but at the turn-around.
        """
        around = self.turn_around if self.group > 1 else None
        return around if around is not None and around[0] <= index <= around[1] else (index, index)
