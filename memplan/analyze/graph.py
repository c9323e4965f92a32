"""LayerGraph: what a model and a batch are, as a frozen value. No torch here, so that readers stay light.

Positions are accesses of one *pass* (the forward and backward of one micro-batch), numbered 0 … A-1: the forward
of each trigger module in the order seen, the loss, the backwards in the order seen, and the optimizer step last.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from msgspec import Struct

if TYPE_CHECKING:
    import networkx

AccessKind = Literal["forward", "loss", "backward", "optimizer"]
BlockKind = Literal["layer", "expert", "embedding", "head", "shared", "other"]
Activations = Literal["keep", "recompute", "offload"]
FixedKind = Literal["adapters", "optimizer", "buffers", "batch", "context", "communication"]
LifetimeKind = Literal["activations", "gradients", "optimizer"]


class Tensor(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One frozen tensor of a block and its place in the block's flat layout."""

    name: str
    """Canonical parameter name (see names.py)."""
    shape: tuple[int, ...]
    dtype: str
    """torch's name without the module: ``"float32"``, ``"bfloat16"``."""
    offset_bytes: int
    """Where it starts in the block's layout: a multiple of 512."""
    size_bytes: int


class Block(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The unit that is placed and streamed."""

    id: int
    """Its index in ``LayerGraph.blocks``; blocks are in the order of their first access."""
    name: str
    """Canonical name of the module that it is made of, such as ``model.layers.3``."""
    kind: BlockKind
    stack: str
    """Name of the repeated stack that it is an element of, or empty."""
    tensors: tuple[Tensor, ...]
    size_bytes: int
    """Bytes of the flat layout, padding included."""
    pinned_because: str
    """Empty where the block may be streamed; else why it must stay on the device."""


class Rows(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A block of which an access reads some rows only, whatever its size: an embedding's table."""

    block: int
    size_bytes: int
    """Of the rows."""


class Access(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One use of a module's weights; it lasts from its trigger to the next access's trigger."""

    index: int
    kind: AccessKind
    module: str
    """Canonical name of the trigger module; empty for loss and optimizer (the root module is ``"."``)."""
    forward: int
    """Index of the forward access that this one belongs to (its own for a forward); -1 for loss and optimizer."""
    blocks: tuple[int, ...]
    """Ids of the blocks whose weights it reads."""
    rows: tuple[Rows, ...] = ()
    """Those of them of which it reads rows only: they may be read where they are on the host."""
    flops: int
    """Of matrix products and attention. In backward without any recompute of the model's own choice included."""
    float32_flops: int = 0
    """Of those, what is computed in float32, whatever the dtype of most: adapters' own products."""
    matmul_bytes: int
    """Bytes read and written by those."""
    other_bytes: int
    """Bytes read and written by every other operator."""
    kernels: int
    """Operators run."""
    recompute_flops: int
    """What a recompute planned by memplan would add here (backward accesses of recomputable modules), else 0."""
    recompute_matmul_bytes: int
    recompute_other_bytes: int
    recompute_kernels: int
    transient_bytes: int
    """Peak device bytes within the access less the lifetimes that span it, activations kept. May be negative:
    the lifetimes that are born and that die within it need not be alive at once."""
    transient_recompute_bytes: int
    """The same where this access's module is recomputed; equal to the former where it cannot be."""
    transient_offload_bytes: int = 0
    """The same where what this access's module saves is offloaded (where ``offload_bytes`` of its forward are > 0)."""
    offload_bytes: int = 0
    """Forward accesses: what its module made and saved for backward, each storage padded to a multiple of 512. 0 where
    nobody looked, or it cannot be offloaded."""
    weight_copy_bytes: int = 0
    """Forward accesses: of what it saves for backward where activations are kept, bytes that were made of weights
    alone, whatever the batch: autocast's casts, weights merged with an adapter, dequantized weights."""
    gradient_bytes: int = 0
    """Where a step has several micro-batches: of gradients that are there from the first access on, those that the
    first micro-batch makes in this access."""


class Lifetime(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Device bytes that outlive an access: alive from the access that makes them to the last that holds them."""

    kind: LifetimeKind
    born: int
    """Access that allocates them."""
    last: int
    """Last access during which they are alive; the optimizer's index for what a step keeps (gradients)."""
    size_bytes: int
    policy: Literal["keep", "recompute", "offload", "any"]
    """Counts where the module of access ``born`` has this activation policy; ``any``: always."""


class Stateful(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A module that changes what it computes with: run twice, it is another one than run once."""

    module: str
    """Canonical name of the trigger module."""
    reason: str
    """What its forward does, such as ``"it writes to layers.0.norm.running_mean (by native_batch_norm)"``."""


class Fixed(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Device bytes that are there all the time and are no frozen weights."""

    kind: FixedKind
    size_bytes: int


class LayerGraph(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What was seen of one model with one batch. Bytes and FLOPs are of one micro-batch."""

    model: str
    """A name for people: class or directory name."""
    fingerprint: str
    """SHA-256 over canonical names, shapes and dtypes of all frozen tensors."""
    blocks: tuple[Block, ...]
    accesses: tuple[Access, ...]
    lifetimes: tuple[Lifetime, ...]
    fixed: tuple[Fixed, ...]
    recomputable: tuple[str, ...]
    """Trigger modules that memplan may recompute: elements of stacks that the model does not checkpoint itself. What
    they save may be offloaded instead where their forward's ``offload_bytes`` say so."""
    checkpointed: tuple[str, ...] = ()
    """Layers in parts: modules within each have the accesses, and every plan recomputes it whole."""
    stateful: tuple[Stateful, ...] = ()
    """Those of them that may not be recomputed all the same: they may be offloaded."""
    tokens: int
    """Tokens (or samples, where there is no sequence) of one micro-batch."""
    trainable_bytes: int
    matmul_dtype: str
    """dtype of the matrix products that hold most FLOPs."""
    fragmentation_bytes: int = 0
    """What torch's caching allocator of a CUDA device holds at the peak beyond what is alive, weights apart: the pass
    replayed on it (:mod:`memplan.model.caching_allocator`), activations kept or recomputed, whichever is more."""
    notes: tuple[str, ...] = ()
    """What the reader of a report should know, one sentence each."""

    def to_networkx(self) -> networkx.DiGraph[int]:
        """Return the accesses as a DiGraph: nodes are access indices (attributes ``kind``, ``module``, ``blocks``),
        edges run from each access to the next and, with ``saved_bytes``, from each to the last that holds its bytes.
        """
        import networkx

        graph: networkx.DiGraph[int] = networkx.DiGraph(model=self.model)
        for access in self.accesses:
            graph.add_node(access.index, kind=access.kind, module=access.module, blocks=access.blocks)
        for before, after in zip(self.accesses, self.accesses[1:], strict=False):
            graph.add_edge(before.index, after.index, saved_bytes=0)
        for life in self.lifetimes:
            if life.policy != "recompute" and life.last > life.born:
                held = graph.get_edge_data(life.born, life.last, {"saved_bytes": 0})["saved_bytes"]
                graph.add_edge(life.born, life.last, saved_bytes=held + life.size_bytes)
        return graph
