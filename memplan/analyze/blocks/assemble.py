"""Two traces -> LayerGraph: blocks in order of use, costs and memory of each access."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from msgspec.structs import replace
from torch import nn

from memplan.analyze.blocks.blocks import Draft, dtype_name, head_of
from memplan.analyze.blocks.optimizers import state_bytes, step_work, workspace_bytes
from memplan.analyze.graph import Access, Activations, Block, Fixed, FixedKind, LayerGraph, LifetimeKind, Rows
from memplan.analyze.inputs.batch import Batch, base_of
from memplan.analyze.trace.lifetimes import Lifetimes, Span
from memplan.analyze.trace.provenance import CASTS
from memplan.analyze.trace.recorder import Recorder, Work
from memplan.model.names import canonical
from memplan.model.weights import (
    Multiplicity,
    adapters_bytes,
    frozen_weights,
    once,
    small_tensors,
    trained,
    trained_bytes,
)
from memplan.units import KIB, format_bytes

if TYPE_CHECKING:
    from memplan.analyze.trace.traced import Traced

TINY_DERIVED_BYTES = 64 * KIB
"""Copies of weights below this (of norms) are counted, not named."""

_UNREAD_SHARE = 0.01
"""Of the weights: what no access reads is worth a note from there on."""


class _Pass:
    """One trace, brought from segments to accesses."""

    def __init__(self, traced: Traced) -> None:
        recorder = traced.recorder
        self.accesses = recorder.log.accesses
        owner = recorder.log.access_of()
        last = len(self.accesses) - 1
        self.work = [Work() for _ in self.accesses]
        for segment, work in enumerate(recorder.work):
            self.work[owner[segment]].add(work)
        self.peaks = [0] * len(self.accesses)
        for segment, peak in recorder.segment_peaks.items():
            self.peaks[owner[segment]] = max(self.peaks[owner[segment]], peak)
        self.rows: Counter[tuple[int, str]] = Counter()
        """Bytes of the rows of a block that an access reads, by the access and the block's name."""
        for (block, _, segment), size in recorder.rows.items():
            self.rows[owner[segment], block] += size
        self.of_rows = {(block, trigger) for block, trigger, _ in recorder.rows} - recorder.whole
        """Blocks and triggers under which no more than rows are read."""
        self.spans: Counter[Span] = Counter()
        for (born, died), size in traced.spans.items():
            self._add("activations", owner[born], owner[died], size)
        for kind, born, size in traced.left:
            self._add(kind, owner[born], last, size)
        self.gradients = [0] * len(self.accesses)
        for segment, size in traced.gradients:
            self.gradients[owner[segment]] += size
        self.derived = [0] * len(self.accesses)
        self.derived_how: Counter[str] = Counter()
        for (born, died, how), size in traced.derived.items():
            if owner[born] < owner[died] and self.accesses[owner[born]].kind == "forward":
                self.derived[owner[born]] += size
                self.derived_how[how] += size

    def _add(self, kind: LifetimeKind, born: int, last: int, size_bytes: int) -> None:
        if born < last and size_bytes:
            self.spans[kind, born, last] += size_bytes


def assemble(
    model: nn.Module,
    drafts: tuple[Draft, ...],
    *,
    kept: Traced,
    recomputed: Traced,
    offloaded: Traced | None,
    recomputable: tuple[str, ...],
) -> LayerGraph:
    """Return the graph of what was traced, without what :func:`complete` adds: ``kept`` is the model's trace as it is,
    ``recomputed`` with ``recomputable`` checkpointed, ``offloaded`` with what those save offloaded. ``drafts``: with
    what is pinned.
    """
    one, two, three = _Pass(kept), _Pass(recomputed), None if offloaded is None else _Pass(offloaded)
    moved = {} if offloaded is None else _once(one, offloaded.offload_bytes)
    blocks, ids_of = _blocks(model, drafts, kept.recorder)
    traces: dict[Activations, _Pass] = {"keep": one, "recompute": two}
    if three is not None:
        traces["offload"] = three
    lifetimes = Lifetimes(
        {policy: traced.spans for policy, traced in traces.items()}, one.accesses, frozenset(recomputable)
    )
    accesses = []
    for index, access in enumerate(one.accesses):
        work, more = one.work[index], _more(one.work[index], two.work[index])
        can = access.module in recomputable
        transient = one.peaks[index] - lifetimes.spanning(index, "keep")
        transient_recompute = two.peaks[index] - lifetimes.spanning(index, "recompute") if can else transient
        transient_offload = transient
        if three is not None and can:
            transient_offload = three.peaks[index] - lifetimes.spanning(index, "offload")
        if not can or access.kind != "backward":
            more = Work()
        accesses.append(
            Access(
                index=index,
                kind=access.kind,
                module=access.module,
                forward=access.forward,
                blocks=tuple(sorted(ids_of.get(access.module, ()))),
                rows=_rows(one, index, blocks, ids_of),
                flops=work.flops,
                float32_flops=work.float32_flops,
                matmul_bytes=work.matmul_bytes,
                other_bytes=work.other_bytes,
                kernels=work.kernels,
                recompute_flops=more.flops,
                recompute_matmul_bytes=more.matmul_bytes,
                recompute_other_bytes=more.other_bytes,
                recompute_kernels=more.kernels,
                transient_bytes=transient,
                transient_recompute_bytes=transient_recompute,
                transient_offload_bytes=transient_offload,
                offload_bytes=moved.get(access.module, 0) if can and access.kind == "forward" else 0,
                weight_copy_bytes=one.derived[index],
                gradient_bytes=one.gradients[index],
            )
        )
    return LayerGraph(
        model="",
        fingerprint="",
        blocks=blocks,
        accesses=tuple(accesses),
        lifetimes=lifetimes.all,
        fixed=(),
        recomputable=recomputable,
        tokens=0,
        trainable_bytes=0,
        matmul_dtype="",
    )


def _main_dtype(kept: Traced, times: Callable[[str], int]) -> str:
    """Return the dtype of the matrix products that hold most FLOPs. ``times``: how often what a module does counts."""
    log = kept.recorder.log
    owner = log.access_of()
    totals: Counter[str] = Counter()
    for (segment, dtype), flops in kept.recorder.matmul_flops.items():
        totals[dtype] += flops * times(log.accesses[owner[segment]].module)
    return max(totals, key=lambda dtype: totals[dtype], default="float32")


def complete(
    graph: LayerGraph,
    model: nn.Module,
    batch: Batch,
    *,
    kept: Traced,
    ran_again: int,
    times: Callable[[str], int],
    optimizer: str,
    name: str,
    notes: Sequence[str],
    outside: Sequence[tuple[tuple[int, ...], int]] = (),
    left_out: Multiplicity = once,
) -> LayerGraph:
    """Return the graph with what is of the model as a whole. ``kept``: its trace, or that of some of its layers;
    ``ran_again``: how many of all its layers it checkpoints itself; ``times``: for how many modules a traced one
    stands. ``outside``: shape and bytes an element of what is trained beside the model. ``left_out``: the same of those
    of ``model``, where it holds a part of the whole one only.
    """
    trains = [(tuple(p.shape), p.element_size()) for p in trained(model, left_out)]
    workspace = workspace_bytes(optimizer, [*trains, *outside])
    operators, moved_bytes = step_work(optimizer, [*trains, *outside])
    beside = 2 * sum(math.prod(shape) * size for shape, size in outside) + state_bytes(optimizer, outside)
    fixed: dict[FixedKind, int] = {
        "adapters": adapters_bytes(model, left_out) + beside,
        "optimizer": state_bytes(optimizer, trains),
        "buffers": _buffer_bytes(model, left_out),
        "batch": batch.size_bytes(),
    }
    step = replace(
        graph.accesses[-1],
        kernels=operators,
        other_bytes=moved_bytes,
        transient_bytes=workspace,
        transient_recompute_bytes=workspace,
        transient_offload_bytes=workspace,
    )
    return replace(
        graph,
        model=name,
        fingerprint=_fingerprint(graph.blocks),
        accesses=(*graph.accesses[:-1], step),
        fixed=tuple(Fixed(kind=kind, size_bytes=size) for kind, size in fixed.items()),
        tokens=batch.tokens(),
        matmul_dtype=_main_dtype(kept, times),
        trainable_bytes=trained_bytes(model, left_out),
        notes=(
            *notes,
            *_notes(model, graph, kept, ran_again),
            *_derived_notes(graph, kept),
            *_entry_notes(batch),
            *_outside_notes(model, outside, beside),
        ),
    )


def _buffer_bytes(model: nn.Module, times: Multiplicity) -> int:
    """Return the bytes of buffers that are no weights, of what quantizers keep beside those, and of placeholders.

    While a block is away its tensors are one element of each dtype, expanded.
    """
    weights = {id(weight.tensor): weight.tensor for weight in frozen_weights("", model, deep=True)}
    elements = {tensor.dtype: tensor.element_size() for tensor in weights.values()}
    found: dict[int, int] = {
        id(tensor): tensor.numel() * tensor.element_size() * times(canonical(name))
        for name, module in model.named_modules()
        for tensor in (*module._buffers.values(), *small_tensors(module))
        if tensor is not None and id(tensor) not in weights
    }
    return sum(elements.values()) + sum(found.values())


def pin(drafts: Sequence[Draft], recorder: Recorder) -> None:
    """Note which blocks cannot be streamed, for a read of them would not be seen before it happens."""
    called, nested = recorder.log.called(), recorder.log.nested
    for draft in drafts:
        if draft.name in recorder.written:
            draft.pin(f"its weights are written to in the forward (by {recorder.written[draft.name]})")
        silent = [trigger for trigger in draft.triggers if trigger not in called]
        if draft.name in recorder.stray:
            how = recorder.stray[draft.name]
            if len(silent) == len(draft.triggers):
                draft.pin(f"its weights are read (by {how}), but the forward of {silent[0]} is never called")
            else:
                draft.pin(f"its weights are read (by {how}) outside the forward of {draft.triggers[0]}")
        for trigger in draft.triggers:
            if trigger in nested:
                draft.pin(f"{trigger} calls {nested[trigger]}, a block of its own, before it has read all of its own")


def _blocks(
    model: nn.Module, drafts: tuple[Draft, ...], recorder: Recorder
) -> tuple[tuple[Block, ...], dict[str, list[int]]]:
    """Return the blocks in the order of their first access, and the ids of those that each trigger reads."""
    forwards = [access.module for access in recorder.log.accesses if access.kind == "forward"]
    first: dict[str, int] = {}
    for index, module in enumerate(forwards):
        first.setdefault(module, index)
    never = len(forwards)
    ordered = sorted(drafts, key=lambda draft: min(first.get(trigger, never) for trigger in draft.triggers))
    head = head_of(base_of(model), drafts, forwards)
    blocks, ids_of = [], dict[str, list[int]]()
    for index, draft in enumerate(ordered):
        tensors, size_bytes = draft.layout()
        blocks.append(
            Block(
                id=index,
                name=draft.name,
                kind="head" if draft is head else draft.kind,
                stack=draft.stack,
                tensors=tensors,
                size_bytes=size_bytes,
                pinned_because=draft.pinned_because,
            )
        )
        for trigger in draft.triggers:
            ids_of.setdefault(trigger, []).append(index)
    return tuple(blocks), ids_of


def _rows(one: _Pass, index: int, blocks: Sequence[Block], ids_of: Mapping[str, Sequence[int]]) -> tuple[Rows, ...]:
    """Return of which blocks an access reads rows only. Mostly its backward reads none of them: no bytes."""
    module = one.accesses[index].module
    return tuple(
        Rows(block=block, size_bytes=one.rows[index, blocks[block].name])
        for block in sorted(ids_of.get(module, ()))
        if (blocks[block].name, module) in one.of_rows
    )


def _once(one: _Pass, sizes_bytes: Mapping[str, int]) -> dict[str, int]:
    """Return the sizes of those modules whose forward comes once a pass: an item has one place to be in."""
    forwards = Counter(access.module for access in one.accesses if access.kind == "forward")
    return {module: size for module, size in sizes_bytes.items() if forwards[module] == 1}


def _more(work: Work, recomputed: Work) -> Work:
    return Work(
        flops=max(0, recomputed.flops - work.flops),
        matmul_bytes=max(0, recomputed.matmul_bytes - work.matmul_bytes),
        other_bytes=max(0, recomputed.other_bytes - work.other_bytes),
        kernels=max(0, recomputed.kernels - work.kernels),
    )


def _fingerprint(blocks: Sequence[Block]) -> str:
    rows = sorted(f"{tensor.name} {tensor.shape} {tensor.dtype}" for block in blocks for tensor in block.tensors)
    return hashlib.sha256("\n".join(rows).encode()).hexdigest()


def _notes(model: nn.Module, graph: LayerGraph, kept: Traced, ran_again: int) -> list[str]:
    found, blocks, accesses = [], graph.blocks, graph.accesses
    frozen_bytes: Counter[str] = Counter()
    for block in blocks:
        for tensor in block.tensors:
            frozen_bytes[tensor.dtype] += tensor.size_bytes
    base = frozen_bytes.most_common(1)[0][0]
    kinds = {dtype_name(p.dtype) for p in model.parameters() if p.requires_grad}
    if "float32" in kinds and base in ("bfloat16", "float16"):
        found.append(
            f"The adapters are float32 on a {base} base: float32 copies of their inputs add to the saved activations."
        )
    if ran_again:
        found.append(f"The model checkpoints {ran_again} of its layers, or of their parts, itself.")
    if graph.stateful:
        one, count = graph.stateful[0], len(graph.stateful)
        found.append(
            f"{count} {'layer is' if count == 1 else 'layers are'} never recomputed, since that would change their "
            f"state twice: {one.module}, for example: {one.reason}."
        )
    pinned = [block for block in blocks if block.pinned_because]
    if pinned:
        found.append(
            f"{pinned[0].name} must stay on the device, since {pinned[0].pinned_because}."
            if len(pinned) == 1
            else f"{len(pinned)} blocks must stay on the device: {pinned[0].name}, since {pinned[0].pinned_because}, "
            f"and others."
        )
    read = {block for access in accesses for block in access.blocks}
    # A loss that takes the head's weight itself reads it outside of every access.
    unread = [block for block in blocks if block.id not in read and block.name not in kept.recorder.read]
    unread_bytes = sum(block.size_bytes for block in unread)
    if unread_bytes > _UNREAD_SHARE * sum(block.size_bytes for block in blocks):
        found.append(
            f"{format_bytes(unread_bytes)} of its weights "
            f"({unread[0].name}{' and others' if len(unread) > 1 else ''}) are never read with this batch, and stay "
            "on the device: give a batch of all that the training gives it (images, sound), as tensors."
        )
    experts = sum(block.kind == "expert" for block in blocks)
    if experts:
        found.append(
            f"Its {experts} experts are loaded only where they are chosen: the plan counts with every one that an even "
            "routing calls, so its loads are about the most there can be."
        )
    assumed = sorted(kept.recorder.values.assumed)
    if assumed:
        found.append(
            f"The model decides by values that a trace does not have ({', '.join(assumed)}): an even choice was "
            "assumed."
        )
    if uncounted := sorted(kept.recorder.values.uncounted):
        found.append(
            f"What the recurrent layers keep for their backward ({', '.join(uncounted)}) is known to the GPU's library "
            "alone, and not counted: leave room for it."
        )
    return found


def _entry_notes(batch: Batch) -> list[str]:
    """Say what a plan of calls of modules within the model leaves out."""
    within = dict.fromkeys(call.entry for call in batch.calls if call.entry)
    if not within:
        return []
    others = f" and {len(within) - 1} others" if len(within) > 1 else ""
    return [
        f"Planned for calls of {canonical(next(iter(within)))}{others}, which the script makes itself: what it "
        "computes with their results is not counted."
    ]


def _outside_notes(model: nn.Module, outside: Sequence[object], size_bytes: int) -> list[str]:
    """Say what of a training counts that goes on beside the model, and what does not."""
    left = "what is computed beside the model and saved for backward there is not counted"
    if outside:
        return [
            f"{len(outside)} parameters beside the model are trained: with their gradients and the optimizer's state "
            f"they are counted among the adapters ({format_bytes(size_bytes)}); {left}."
        ]
    if not trained(model):
        return [f"Nothing of the model is trained, and what is trained beside it is not known, nor counted; {left}."]
    return []


def _derived_notes(graph: LayerGraph, kept: Traced) -> list[str]:
    """Say what copies of weights are saved, and the way out."""
    total = sum(access.weight_copy_bytes for access in graph.accesses)
    if total < TINY_DERIVED_BYTES:
        return []
    how = _Pass(kept).derived_how
    most = max(how, key=lambda name: how[name])
    way_out = "recompute those layers"
    if most.removeprefix(CASTS) in ("bfloat16", "float16"):
        way_out += f", or load the base in {most.removeprefix(CASTS)}"
    return [
        f"{format_bytes(total)} of what autograd saves are copies of frozen weights ({most}), counted with the "
        f"activations: where they are too many, {way_out}."
    ]
