"""A model on the device, some blocks' worth of memory -> how long each access takes there.

The model runs as it trains, hooks and all, with random values in place of its weights. Those share a pool of memory
that is as large as the largest block, or as the processor's caches are small beside it: frozen weights are only read,
so what they hold is no matter. Of stacks whose layers are alike, a few layers run for all (``periodic.py``).
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from msgspec import Struct
from torch import nn

from memplan.analyze.graph import Access, LayerGraph
from memplan.analyze.inputs.autocast import dtype_of_autocast, outside_autocast, outside_saving
from memplan.analyze.inputs.batch import Batch, batch_for, is_shape, random_tokens
from memplan.analyze.inputs.loss import loss_of_pass
from memplan.analyze.repeat.outline import runs_of
from memplan.analyze.repeat.periodic import Run, shortened
from memplan.analyze.repeat.unroll import short_name
from memplan.analyze.trace.accesses import AccessLog
from memplan.analyze.trace.swap_tensors import exchanged
from memplan.errors import InputError, MemplanError, ModelError, type_and_line
from memplan.hooks import recompute
from memplan.hooks.flows import leaves_behind
from memplan.hooks.triggers import Triggers, modules_by_name
from memplan.state.snapshot import Snapshot, unchanged
from memplan.units import MIB

POOL_BYTES = 256 * MIB
"""Weights beyond this share memory with others: more than processors' caches hold, so that they come from RAM."""

ENOUGH_S, LEAST_PASSES, MOST_PASSES = 2.0, 5, 60
"""Passes are run until they took this long together, at least and at most so many."""

_OPTIMIZERS: dict[str, Callable[[list[torch.Tensor]], torch.optim.Optimizer]] = {
    "adamw": torch.optim.AdamW,
    "adamw_torch": torch.optim.AdamW,
    "adamw_torch_fused": partial(torch.optim.AdamW, fused=True),
    "adamw_fused": partial(torch.optim.AdamW, fused=True),
    "adamw_foreach": partial(torch.optim.AdamW, foreach=True),
    "adam": torch.optim.Adam,
    "adafactor": torch.optim.Adafactor,  # in the place of transformers' own
    "adafactor_torch": torch.optim.Adafactor,
    "adagrad": torch.optim.Adagrad,
    "rmsprop": torch.optim.RMSprop,
    "momentum": partial(torch.optim.SGD, momentum=0.9),
    "sgd": torch.optim.SGD,
}
"""Those that torch has."""

_Key = tuple[str, str, int]
"""Kind and module of an access in the short model, and which of its accesses of that kind it is."""


class Times(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Measured seconds by access of a graph; None where it was not seen to run."""

    access_s: tuple[float | None, ...]
    """Activations kept; of the optimizer's access the whole step of the optimizer."""
    recompute_s: tuple[float | None, ...]
    """What recomputing the module's activations adds."""
    passes: int

    @property
    def unseen(self) -> int:
        """How many accesses were not measured."""
        return sum(time_s is None for time_s in self.access_s)


def measure(
    model: nn.Module,
    batch: object,
    graph: LayerGraph,
    *,
    device: str,
    room_bytes: int,
    loss: Callable[[Any], torch.Tensor] | None = None,
    optimizer: str = "adamw",
    autocast: object = None,
    short: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Times:
    """Run training passes of ``model`` on ``device`` and return how long each access of ``graph`` took.

    ``model``: what ``graph`` is of; its buffers must hold values. ``room_bytes``: device memory that may be used; where
    keeping all activations needs more, layers are recomputed while they are measured. The other arguments: as
    ``analyze`` was given them.

    Raises ModelError where a pass cannot be run, InputError for a batch without values. The model is unchanged.
    """
    say = progress if progress is not None else (lambda text: None)
    there = torch.device(device)
    if there.type == "cuda":
        torch.cuda.init()  # else its random state would not be among those that are kept
    call = batch_for(model, batch)
    runs = runs_of(model, call) if short else ()
    autocast_dtype = dtype_of_autocast(autocast)  # the caller's own, where none is given
    try:
        with ExitStack() as undo:
            undo.enter_context(unchanged(model=model, batch=batch, loss=loss))
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.enable_grad())
            undo.enter_context(outside_saving())
            undo.enter_context(outside_autocast())
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            whole = sum(parameter.requires_grad for parameter in model.parameters())
            undo.enter_context(shortened(runs))
            pool = _Pool(there, graph)
            inputs = _placed(random_tokens(model, call) if is_shape(batch) else call, there)
            snapshot = Snapshot(model=model, loss=loss, calls=call.calls)
            undo.enter_context(exchanged(model, pool.make, snapshot, as_it_is=call.as_it_is))
            modules = modules_by_name(model)
            names = {access.module: short_name(access.module, runs) for access in graph.accesses if access.module}
            watched = {name: modules[name] for name in names.values()}
            stateful = {layer.module for layer in graph.stateful}
            layers = {names[name]: modules[names[name]] for name in graph.recomputable if name not in stateful}
            trained = [parameter for parameter in model.parameters() if parameter.requires_grad and parameter.is_leaf]
            run = _Passes(model, inputs, watched, trained, loss, autocast_dtype)
            kept = None
            if pool.held_bytes + _kept_bytes(graph, runs) <= room_bytes:
                say("layers, activations kept")
                kept = run.measured()
            again = kept
            if layers or kept is None:
                say("layers, activations recomputed")
                with ExitStack() as wrapped:
                    for module in layers.values():
                        wrapped.callback(recompute.wrap(module))
                    again = run.measured()
            say("the optimizer")
            step_s = _optimizer_s(optimizer, trained, whole)
    except MemplanError:
        raise
    except Exception as error:
        raise ModelError(
            f"a micro-batch of {graph.model} could not be run on {device} to measure it ({type_and_line(error)}): "
            "check that one training step runs there, give smaller batches, or leave measure out"
        ) from error
    if there.type == "cuda":
        torch.cuda.empty_cache()  # what stays reserved is not free to the plan
    assert again is not None
    return _times(graph, names, kept, again, step_s, run.passes)


class _Pool:
    """Memory for what stands in: weights share it, all else has its own."""

    def __init__(self, device: torch.device, graph: LayerGraph) -> None:
        self._device = device
        self._largest = max((block.size_bytes for block in graph.blocks), default=0)
        self._held: dict[torch.dtype, torch.Tensor] = {}
        self._next: Counter[torch.dtype] = Counter()
        self.held_bytes = 0
        """Of the pools, and of all else that stands in."""

    def make(self, tensor: torch.Tensor, *, is_weight: bool) -> torch.Tensor:
        if is_weight:
            made = self._share(tensor)
        elif tensor.device.type == "meta":
            made = self._random(tensor.shape, tensor.dtype)
        else:
            made = tensor.detach().to(self._device, copy=True)
            self.held_bytes += made.nbytes
        return nn.Parameter(made, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made

    def _share(self, tensor: torch.Tensor) -> torch.Tensor:
        dtype, count = tensor.dtype, tensor.numel()
        held = self._held.get(dtype)
        if held is None:
            size = max(self._largest, POOL_BYTES) // tensor.element_size()
            held = self._held[dtype] = self._random((max(size, count),), dtype)
        begin = self._next[dtype]
        if begin + count > held.numel():
            begin = 0
        self._next[dtype] = begin + -(-count // 512) * 512
        return held[begin : begin + count].as_strided(tensor.shape, _dense_strides(tensor))

    def _random(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        made = torch.empty(tuple(shape), dtype=dtype, device=self._device)
        self.held_bytes += made.nbytes
        if dtype.is_floating_point and dtype.itemsize > 1:
            return made.normal_(0, 0.02)
        if dtype.itemsize > 1 or dtype == torch.bool:
            return made.fill_(dtype == torch.bool)  # they may be indices: zeros are within any range
        return made.view(torch.uint8).random_(0, 127).view(dtype)


def _dense_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Return the tensor's strides where it is dense, else those of a dense one: of a placeholder, or a part of
    another.
    """
    if torch.empty_like(tensor, device="meta").stride() == tensor.stride():  # it keeps the strides of what is dense
        return tensor.stride()
    return torch.empty(tensor.shape, device="meta").stride()


class _Passes:
    """Runs passes and times their accesses."""

    def __init__(
        self,
        model: nn.Module,
        inputs: Batch,
        watched: Mapping[str, nn.Module],
        trained: Sequence[torch.Tensor],
        loss: Callable[[Any], torch.Tensor] | None,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self._model, self._inputs, self._watched, self._trained = model, inputs, watched, trained
        self._loss, self._lowered = loss, autocast_dtype
        self._device = next(iter(inputs.tensors())).device
        self.passes = 0

    def measured(self) -> dict[_Key, float]:
        """Return the median time of each access over several passes, two warm-ups before."""
        found: dict[_Key, list[float]] = defaultdict(list)
        self._once()
        start = time.perf_counter()
        self._once()
        count = min(MOST_PASSES, max(LEAST_PASSES, int(ENOUGH_S / (time.perf_counter() - start))))
        for _ in range(count):
            for key, time_s in self._once().items():
                found[key].append(time_s)
        self.passes += count
        return {key: statistics.median(times) for key, times in found.items()}

    def _once(self) -> dict[_Key, float]:
        for parameter in self._trained:
            parameter.grad = None
        clock = _Clock(self._device)
        log = AccessLog(lambda segment: clock.mark())
        triggers = Triggers(self._watched, log)
        try:
            clock.mark()
            with torch.autocast(self._device.type, self._lowered) if self._lowered is not None else nullcontext():
                value = loss_of_pass(self._model, self._inputs, self._loss)
            log.loss_begins()
            own = {id(parameter) for parameter in self._trained}
            others = [(leaf, leaf.grad) for leaf in leaves_behind(iter([value])) if id(leaf) not in own]
            for leaf, _ in others:
                leaf.grad = None
            try:
                value.backward()
            finally:
                for leaf, gradient in others:
                    leaf.grad = gradient
            log.optimizer_begins()
        finally:
            triggers.remove()
        totals = [0.0] * len(log.accesses)
        for owner, time_s in zip(log.access_of(), clock.spans_s(), strict=False):
            totals[owner] += time_s
        seen: Counter[tuple[str, str]] = Counter()
        found: dict[_Key, float] = {}
        for access, time_s in zip(log.accesses[:-1], totals, strict=False):
            found[access.kind, access.module, seen[access.kind, access.module]] = time_s
            seen[access.kind, access.module] += 1
        return found


class _Clock:
    """Marks on the device's own time. [Note: CUDA unproven]"""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []

    def mark(self) -> None:
        if not self._cuda:
            self._marks.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append(event)

    def spans_s(self) -> list[float]:
        """Return the time from each mark to the next."""
        if not self._cuda:
            return [b - a for a, b in zip(self._marks, self._marks[1:], strict=False)]
        torch.cuda.synchronize()
        return [a.elapsed_time(b) / 1e3 for a, b in zip(self._marks, self._marks[1:], strict=False)]


def _placed(call: Batch, device: torch.device) -> Batch:
    """Return the batch on the device. Raises InputError where it holds no values."""
    for tensor in call.tensors():
        if tensor.device.type == "meta":
            raise InputError("the batch is on the meta device, without values: give one that can be trained on")
    return call.changed(lambda tensor: tensor.to(device, copy=True))  # a forward may write into it


def _kept_bytes(graph: LayerGraph, runs: Sequence[Run]) -> int:
    """Return the bytes of a pass of all the layers that run, activations kept, as far as the graph tells."""
    names = {access.module for access in graph.accesses}
    share = len({short_name(name, runs) for name in names}) / max(1, len(names))
    kept = sum(life.size_bytes for life in graph.lifetimes if life.policy in ("any", "keep"))
    return int(kept * share) + max(access.transient_bytes for access in graph.accesses)


def _optimizer_s(name: str, trained: Sequence[torch.Tensor], count: int) -> float | None:
    """Return the time of a step for ``count`` parameters like those, None where there is no such optimizer here."""
    make = _OPTIMIZERS.get(name)
    if make is None or not trained:
        return None
    made = make(list(trained))
    clocked: list[float] = []
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    device = trained[0].device
    for _ in range(LEAST_PASSES + 2):
        clock = _Clock(device)
        clock.mark()
        made.step()
        clock.mark()
        clocked += clock.spans_s()
    return statistics.median(clocked[2:]) * count / len(trained)


def _times(
    graph: LayerGraph,
    names: Mapping[str, str],
    kept: Mapping[_Key, float] | None,
    again: Mapping[_Key, float],
    step_s: float | None,
    passes: int,
) -> Times:
    """Return the times of the graph's accesses. ``names``: of modules in the short model by those in the graph."""
    keys = _keys(graph.accesses, names)
    access_s: list[float | None] = []
    recompute_s: list[float | None] = []
    for access, key in zip(graph.accesses, keys, strict=True):
        forward = keys[access.forward] if access.forward >= 0 else key
        can = access.kind == "backward" and access.module in graph.recomputable
        if access.kind == "optimizer":
            plain: float | None = step_s
            more: float | None = 0.0
        elif kept is not None:
            plain = kept.get(key)
            more = None if plain is None or key not in again else max(0.0, again[key] - plain)
        else:  # all was recomputed: a layer's recompute takes about what its forward takes
            more = again.get(forward) if can else 0.0
            plain = None if key not in again or more is None else max(0.0, again[key] - more)
        access_s.append(plain)
        recompute_s.append(more if can else 0.0)
    return Times(access_s=tuple(access_s), recompute_s=tuple(recompute_s), passes=passes)


def _keys(accesses: Iterable[Access], names: Mapping[str, str]) -> list[_Key]:
    seen: Counter[tuple[str, str]] = Counter()
    found: list[_Key] = []
    for access in accesses:
        found.append((access.kind, names.get(access.module, ""), seen[access.kind, access.module]))
        seen[access.kind, access.module] += 1
    return found
