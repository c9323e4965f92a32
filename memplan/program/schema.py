"""The contract: what a Plan says. Frozen values only; reading and writing them is codec.py's.

A plan is a set of *residences*: this item is in this arena from the load that may start after access
``load_after``, is usable for accesses ``first_use`` … ``last_use``, and leaves after the latter. Accesses of a
micro-batch are numbered 0 … A-1 and repeat. An item has ONE address in an arena, so it always comes back to where it
was.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from msgspec import Struct

from memplan.analyze.graph import Activations
from memplan.cost.ranks import Ranks
from memplan.cost.table import CostTable
from memplan.program import codec
from memplan.program.codec import SCHEMA_VERSION as SCHEMA_VERSION
from memplan.units import format_bytes, format_seconds

VRAM_KINDS = (
    "weights",
    "slots",
    "adapters",
    "gradients",
    "optimizer",
    "buffers",
    "batch",
    "context",
    "communication",
    "activations",
    "workspace",
)
"""What device bytes are counted by."""
RAM_KINDS = ("weights", "activations", "optimizer", "staging")
"""What host bytes are counted by."""

STAGING_BYTES = 16 << 20
"""Host bytes through which a runtime reads the disk; counted in ``ram`` where any block's home is there."""

RING_BYTES = 16 << 20
"""Host bytes through which a GPU gets what is on the disk or in pageable memory; counted beside. Page-locked,
where so much may be.
"""

Tier = Literal["device", "host", "disk"]
LossKind = Literal["full", "chunked", "fused"]
StateHome = Literal["device", "host"]
"""Where the optimizer's state lies between steps."""
Channel = Literal["h2d", "d2h", "disk"]
Changed = Literal["vram", "ram", "link", "loss"]
"""What may be otherwise: more vram, more RAM, a faster link from the host, or the loss in chunks of tokens."""


class Workload(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What is trained on."""

    batch: dict[str, tuple[int, ...]]
    """Shape of each tensor of one micro-batch."""
    tokens: int
    """Of one micro-batch; its samples where it has no sequence of tokens: see :attr:`unit`."""
    accumulation: int
    """Micro-batches per step."""
    optimizer: str
    adapter: str
    """For people, such as ``"LoRA r=16 on all-linear"``; empty where the model came with its trainables."""
    steps: int | None = None
    """Of the whole run; None where nobody said."""
    examples: int | None = None
    """Of an epoch, where ``steps`` are counted from them."""
    epochs: int | None = None
    """With ``examples``."""
    loss: LossKind = "full"
    """``chunked``: memplan's own, for a few tokens at a time; ``fused``: one that another library would bring."""

    @property
    def unit(self) -> str:
        """What ``tokens`` counts: ``"tokens"``, or ``"samples"`` such as images and spectrograms."""
        for name, shape in self.batch.items():
            is_text = name.rpartition(".")[2] in ("input_ids", "inputs_embeds") or name.isdigit()
            if is_text and len(shape) > 1 and self.tokens and self.tokens % (shape[0] * shape[1] or 1) == 0:
                return "tokens"
        return (
            "tokens"
            if not self.batch or any(self.tokens == s[0] * s[1] for s in self.batch.values() if len(s) == 2)
            else "samples"
        )

    @property
    def size(self) -> str:
        """How much a micro-batch is, for people: ``"512 tokens"``, ``"1 sample"``."""
        return f"{self.tokens:,} {self.unit if self.tokens != 1 else self.unit[:-1]}"


class Budgets(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes that memplan may use of a tier: vram of a rank, RAM and disk of a node."""

    vram_bytes: int
    ram_bytes: int
    disk_bytes: int | None
    """None: no disk beyond the checkpoint's own files."""
    page_lock_bytes: int | None = None
    """Of ``ram`` what may be pinned for a GPU; None: all of it."""
    margin_bytes: int = 0
    """Of the device, beside ``vram_bytes``: what was asked to be left for fragmentation. A run that has some is held to
    both.
    """


class Item(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What moves. ``saved``: what autograd saves in a module's forward, offloaded; ``boundary``: what it keeps of a
    recomputed one (no solver makes these yet).
    """

    id: int
    kind: Literal["weights", "saved", "boundary"]
    block: int
    size_bytes: int
    home: Tier
    """Where the permanent copy lies; of activations: where they wait."""
    module: str = ""
    """Trigger module whose activations these are; empty for weights."""


class Segment(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Bytes of an arena that are there together. No address reaches over the end of one."""

    offset_bytes: int
    size_bytes: int
    absent: tuple[tuple[int, int], ...] = ()
    """First and last access of each stretch of a micro-batch in which its bytes are given back; empty where they never
    are, as in an arena's first segment. They go before the first access begins, and come back for a load
    after the last one.
    """


class Arena(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One line of offsets in a tier, in segments. Those of the device may be elastic: given back for part of a
    micro-batch.
    """

    id: int
    tier: Literal["device", "host"]
    segments: tuple[Segment, ...]
    pageable: bool = False
    """Of the host beside a GPU: not pinned. What is there passes through the staging ring."""

    @property
    def size_bytes(self) -> int:
        """With every segment there."""
        return sum(segment.size_bytes for segment in self.segments)

    def size_bytes_at(self, access: int) -> int:
        """Return the bytes of the segments that are there in an access of the micro-batch."""
        return sum(
            segment.size_bytes
            for segment in self.segments
            if not any(first <= access <= last for first, last in segment.absent)
        )


class Address(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where an item is in an arena whenever it is there."""

    item: int
    arena: int
    offset_bytes: int
    size_bytes: int


class Residence(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One stay of an item in an arena.

    ``begins``: ``always`` (there all the time), ``load`` (brought), ``made`` (written by the compute: activations).
    ``source``: ``home``; ``staging`` (from the disk through the staging ring); ``residence:ID``; empty for always/made.
    ``ends``: ``drop``; or ``store``: another residence's load reads it, whose ``first_use`` the compute does not pass
    before that load has ended (so what is ``made`` next in its place may begin there, what is loaded one access later).
    ``order`` is total on a channel within a cycle (0, 1, …; loads run so, cycle after cycle); -1 without one.
    ``first_use`` is in 0 … A-1; ``load_after`` < ``first_use`` and ``last_use`` >= ``first_use`` count on beyond the
    micro-batch where the stay crosses its boundary (-1 is the last access of the one before). ``last_use -
    load_after`` <= A.
    """

    id: int
    item: int
    arena: int
    begins: Literal["always", "load", "made"]
    source: str
    channel: Channel | None
    order: int
    load_after: int
    first_use: int
    last_use: int
    ends: Literal["drop", "store"]


class ActivationPolicy(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What becomes of the activations of one module: kept, recomputed in backward by memplan, or offloaded."""

    module: str
    activations: Activations


class Peaks(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Greatest bytes of each tier in a step."""

    vram_bytes: int
    ram_bytes: int
    disk_bytes: int


class Prediction(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the plan expects. Bytes include padding; times are of the steady state, of one micro-batch or of all those
    of a group (``Plan.group``).
    """

    compute_s: float
    """Compute of one micro-batch or group, recomputes included."""
    pass_s: float
    last_pass_s: float = 0.0
    """Of the smaller group that a step ends with; 0 where there is none."""
    step_s: float
    """``accumulation`` micro-batches, what of the all-reduce is not hidden, and the optimizer."""
    reduce_s: float = 0.0
    """Of several ranks: the part of the gradients' all-reduce that the last backward of a step does not hide."""
    bound_s: float
    """No plan of these blocks within this vram has a shorter pass (design: window bound)."""
    stall_s: float
    """pass_s - compute_s."""
    binds: str
    """What sets the micro-batch time: ``compute``, ``link`` or ``disk``."""
    loads_per_pass: int
    loaded_bytes_per_pass: int
    """Of frozen weights."""
    offloaded_bytes_per_pass: int
    """Of saved activations that go to the host in forward, and come back in backward."""
    rows_bytes_per_pass: int = 0
    """Of rows that are read from blocks on the host where they lie (embeddings)."""
    peaks: Peaks
    vram_peak_at: int
    """Access at which device memory peaks."""
    vram_parts: dict[str, int]
    """Device bytes at that access: weights (always there), slots, adapters, gradients, optimizer, buffers, batch,
    context, communication, activations, workspace. They sum to ``peaks.vram_bytes``."""
    ram_parts: dict[str, int]
    """Of a node: weights (one copy for all ranks), activations (offloaded), optimizer (its state, where it waits
    there), staging, these three of every rank. They sum to ``peaks.ram_bytes``.
    """


class Gain(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a micro-batch or group would take if one thing were otherwise, by the solver."""

    of: Changed
    more: int
    """Bytes; bytes a second of the link; tokens of a chunk."""
    pass_s: float


class Plan(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where every frozen block lives and when it moves, with the rows it was made from and what it predicts."""

    schema_version: int
    model: str
    fingerprint: str
    workload: Workload
    group: int = 1
    """Micro-batches that pass each access one after another before any of them goes on, so that they share each load.
    Accesses, residences and the prediction are those of a group; ``table.group`` says the same of the rows.
    """
    budgets: Budgets
    hardware: str
    table: CostTable
    items: tuple[Item, ...]
    arenas: tuple[Arena, ...]
    addresses: tuple[Address, ...]
    residences: tuple[Residence, ...]
    activations: tuple[ActivationPolicy, ...]
    """One for each module in ``table.recomputable``."""
    prediction: Prediction
    staging_bytes: int
    """Host bytes of a rank through which the disk is read, and the ring of what is pageable; counted in ``ram``."""
    notes: tuple[str, ...] = ()
    pins: dict[int, Tier] = {}
    """Homes that were asked for, by block; the others were chosen."""
    asked: dict[str, Activations] = {}
    """Activations that were asked for, by module; the others were chosen."""
    elastic: bool = False
    """Whether segments of the device arena might be absent for part of a micro-batch, be there any or not."""
    gains: tuple[Gain, ...] = ()
    """What would make a micro-batch shorter, each alone, where that was looked at."""
    least_vram_bytes: int | None = None
    """The least vram for which there is a plan with the other budgets as given, where that was looked at."""

    @property
    def ranks(self) -> Ranks:
        """Processes that train under it, each with its own device."""
        return self.table.ranks

    @property
    def groups(self) -> tuple[int, int]:
        """How many full groups a step has, and how many micro-batches are in the smaller one behind them."""
        return divmod(self.workload.accumulation, self.group)

    @property
    def micro_batch_s(self) -> float:
        """Seconds of a micro-batch, the mean of a step's."""
        full, said = self.groups[0], self.prediction
        return (full * said.pass_s + said.last_pass_s) / self.workload.accumulation if self.group > 1 else said.pass_s

    @property
    def optimizer_state(self) -> StateHome:
        """Where the optimizer's state lies between steps."""
        return "host" if self.table.state_on_host_bytes else "device"

    def __repr__(self) -> str:
        """Say what it is in a line; its rows would fill pages."""
        said, budgets = self.prediction, self.budgets
        return (
            f"<Plan of {self.model!r} on {self.hardware!r}: {format_bytes(said.peaks.vram_bytes)} of "
            f"{format_bytes(budgets.vram_bytes)} vram, a micro-batch of {format_seconds(said.pass_s)}>"
        )

    def _ipython_display_(self) -> None:
        """Show the report where a notebook shows the plan."""
        import memplan

        memplan.report(self)

    def policies(self) -> dict[str, Activations]:
        """Return the activation policy of each recomputable module."""
        return {policy.module: policy.activations for policy in self.activations}

    def recomputed(self) -> frozenset[str]:
        """Return the modules whose forward memplan runs again in backward: those of this policy, and layers in
        parts.
        """
        chosen = (policy.module for policy in self.activations if policy.activations == "recompute")
        return frozenset((*chosen, *self.table.checkpointed))

    def recomputed_triggers(self) -> frozenset[str]:
        """Return those of the modules with accesses that run again in backward, by themselves or within a layer."""
        again = self.recomputed()
        layers = tuple(f"{layer}." for layer in self.table.checkpointed)
        return again | {access.module for access in self.table.accesses if access.module.startswith(layers)}

    def home_of(self, block: int) -> Tier:
        """Return the tier where the block's permanent copy lies."""
        for item in self.items:
            if item.kind == "weights" and item.block == block:
                return item.home
        raise KeyError(block)

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, whole or not at all; ``-`` is standard output. Same plan, same bytes. Raises
        PlanFormatError.
        """
        codec.save(self, path)

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan and check it. Raises PlanFormatError or PlanCheckError; changes nothing."""
        return codec.load(cls, path).judged()

    def judged(self) -> Plan:
        """Return the plan itself. Raises PlanCheckError where it is not valid."""
        for require in JUDGES:
            require(self)
        return self


JUDGES: list[Callable[[Plan], None]] = []
"""Who looks at a plan that is read. The judge knows what a plan is, and not the other way round: it is put here by the
package.
"""
