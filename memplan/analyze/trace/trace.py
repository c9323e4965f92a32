"""model + batch -> LayerGraph: one training pass on fake tensors, and the same pass with every layer recomputed.

Nothing is loaded and nothing computed; the model is as it was afterwards, on any way out.
"""

from __future__ import annotations

import contextvars
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import torch
from msgspec.structs import replace
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from memplan.analyze.blocks.assemble import assemble, complete, pin
from memplan.analyze.blocks.blocks import Draft, Unit, check_model, draft_blocks, find_units
from memplan.analyze.blocks.experts import pinned_layers, routed_layers
from memplan.analyze.blocks.optimizers import check_optimizer
from memplan.analyze.graph import Activations, LayerGraph, LifetimeKind, Stateful
from memplan.analyze.inputs.autocast import dtype_of_autocast, outside_autocast, outside_saving
from memplan.analyze.inputs.batch import Batch, base_of, batch_for
from memplan.analyze.inputs.loss import loss_of_pass
from memplan.analyze.repeat.outline import runs_of
from memplan.analyze.repeat.periodic import Run, shortened
from memplan.analyze.repeat.unroll import (
    NotPeriodicError,
    extended,
    times,
    whole_names,
    with_gradients,
    with_whole_names,
)
from memplan.analyze.repeat.whole_events import Event, whole_events
from memplan.analyze.trace.draws import dropout_of
from memplan.analyze.trace.fake import (
    caches_empty,
    eager_transformers,
    faked,
    numbers_in_lists,
    numbers_in_text,
)
from memplan.analyze.trace.offloads import Offloads
from memplan.analyze.trace.recorder import Recorder
from memplan.analyze.trace.stateful import refuse_replaced, stateful_at_first, stateful_twice, watch_draws
from memplan.analyze.trace.traced import Traced
from memplan.device_kinds import is_apart
from memplan.errors import InputError, MemplanError, ModelError, type_and_line
from memplan.hooks import offload as offloading
from memplan.hooks import recompute
from memplan.hooks.flows import leaves_behind
from memplan.hooks.late_hooks import note_traced
from memplan.hooks.triggers import Triggers, in_backward
from memplan.model.caching_allocator import fragmentation_bytes
from memplan.model.live_storages import storage_of
from memplan.model.weights import once, trained_bytes
from memplan.state.process_state import random_states_kept
from memplan.state.snapshot import Snapshot

_DEEPEST = 8
"""Levels of containers within containers that are taken apart."""

_STEP_RUNS = "check that one training step of it runs"


def analyze(
    model: nn.Module,
    batch: object,
    *,
    accumulation: int = 1,
    optimizer: str = "adamw",
    name: str | None = None,
    loss: Callable[[Any], torch.Tensor] | None = None,
    offload: bool | Literal["try"] = False,
    autocast: object = None,
    device: str = "cpu",
    short: bool = False,
    runs: Sequence[Run] = (),
    notes: tuple[str, ...] = (),
) -> LayerGraph:
    """Return what a training pass of ``model`` on ``batch`` reads, keeps and costs.

    ``model``: on any device, ``meta`` included. ``batch``: see :func:`batch_for`. ``autocast``: a dtype or its name
    ("bf16", "fp16"), where the forward will run so; None: as the caller's own autocast, which counts. ``device``: the
    kind of device it will run on, whose own operators count. ``accumulation``: passes of a step; where there are
    several, gradients are there from the first access on. ``loss``: from the model's output to a scalar, where the
    output holds none. ``offload``: look also at what would be saved of each layer where that is offloaded (a trace
    more); ``"try"``: without a word where that cannot be. ``short``: of layers that are alike trace a few, see
    ``periodic.py``; for models that were built from a configuration it knows. ``runs``: stacks of which the model holds
    what is traced alone; then NotPeriodicError tells that the whole is needed. ``notes``: what to say of the model
    besides.

    Raises ModelError for a model that cannot be placed or traced, InputError for a batch or an optimizer that cannot
    be used. The model is unchanged.
    """
    if accumulation < 1:
        raise InputError(
            f"accumulation was given as {accumulation!r}: give a whole number of micro-batches, at least 1"
        )
    check_optimizer(optimizer)
    autocast_dtype = dtype_of_autocast(autocast)
    call = batch_for(model, batch)
    check_model(model, [(one.args, one.kwargs) for one in call.calls])
    note_traced(model)
    look = partial(
        _look,
        model,
        call,
        accumulates=accumulation > 1,
        loss=loss,
        autocast_dtype=autocast_dtype,
        device=device,
        offload=offload,
    )
    seen = None
    if runs:
        seen = _counted_for_all(look(), runs)
    elif short:
        seen = _looked_at_short(model, call, look, accumulates=accumulation > 1)
    if seen is None:
        seen = look()
    left_out = seen.times if runs else once
    if runs and accumulation > 1:
        more = trained_bytes(model, left_out) - trained_bytes(model)
        seen = dataclasses.replace(seen, graph=with_gradients(seen.graph, more))
    fragmentation = max((fragmentation_bytes(event[1:] for event in events) for events in seen.passes), default=0)
    return complete(
        replace(seen.graph, fragmentation_bytes=fragmentation),
        model,
        call,
        kept=seen.kept,
        ran_again=seen.ran_again,
        times=seen.times,
        optimizer=optimizer,
        name=name or type(base_of(model)).__name__,
        notes=(*notes, *seen.notes),
        outside=(*seen.kept.outside, *_outside(model, call)),
        left_out=left_out,
    )


def _outside(model: nn.Module, call: Batch) -> Iterator[tuple[tuple[int, ...], int]]:
    """Yield shape and bytes an element of what is trained before a model of which nothing is: a prompt, a network."""
    if any(parameter.requires_grad for parameter in model.parameters()):
        return  # what it is given may come of a model with a plan of its own
    for leaf in leaves_behind(tensor for tensor in call.tensors() if tensor.requires_grad):
        yield tuple(leaf.shape), leaf.element_size()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What the traces of a model, or of some of its layers, came to."""

    graph: LayerGraph
    kept: Traced
    ran_again: int
    notes: tuple[str, ...]
    passes: tuple[Sequence[Event], ...] = ()
    """Births and deaths of the traces in which all is kept and all is recomputed."""
    times: Callable[[str], int] = lambda module: 1
    """For how many modules a traced one stands."""


def _looked_at_short(model: nn.Module, call: Batch, look: Callable[[], _Seen], *, accumulates: bool) -> _Seen | None:
    """Trace a few layers of long stacks and count them for all; None where there are none, or what is seen does not
    repeat.
    """
    runs = runs_of(model, call)
    if not runs:
        return None
    left_out_bytes = trained_bytes(model)
    try:
        with shortened(runs):
            left_out_bytes -= trained_bytes(model)
            seen = look()
        seen = _counted_for_all(seen, runs)
    except (ModelError, NotPeriodicError):
        return None
    if accumulates:
        seen = dataclasses.replace(seen, graph=with_gradients(seen.graph, left_out_bytes))
    return seen


def _counted_for_all(seen: _Seen, runs: Sequence[Run]) -> _Seen:
    """Return what was seen of a few layers as of all. Raises NotPeriodicError."""
    graph, ran_again, passes = seen.graph, sorted(seen.kept.ran_again), seen.passes
    for run in runs:
        passes = tuple(whole_events(events, graph, run) or events for events in passes)
        stateful = with_whole_names(graph.stateful, run)
        graph, ran_again = replace(extended(graph, run), stateful=stateful), whole_names(ran_again, run)
    place = {module: index for index, module in enumerate(graph.recomputable)}
    graph = replace(graph, stateful=tuple(sorted(graph.stateful, key=lambda layer: place[layer.module])))
    return dataclasses.replace(
        seen, graph=graph, ran_again=len(ran_again), passes=passes, times=partial(times, runs=runs)
    )


def _look(
    model: nn.Module,
    call: Batch,
    *,
    accumulates: bool,
    loss: Callable[[Any], torch.Tensor] | None,
    autocast_dtype: torch.dtype | None,
    device: str,
    offload: bool | Literal["try"],
) -> _Seen:
    """Trace the model as it is, and with its layers' activations under the other policies."""
    snapshot = Snapshot(model=model, loss=loss, calls=call.calls)
    # In a context of its own: what a forward sets of the context variables stays there.
    trace = partial(
        _trace_apart,
        model,
        call,
        snapshot=snapshot,
        accumulates=accumulates,
        loss=loss,
        autocast_dtype=autocast_dtype,
        device=device,
    )

    def traced_apart(routed: frozenset[str]) -> tuple[tuple[Unit, ...], tuple[Draft, ...], Traced]:
        """Trace the model as it is, with its containers and the ``routed`` layers taken apart."""
        containers: frozenset[str] = frozenset()
        for _ in range(_DEEPEST):
            units = find_units(model, containers, routed)
            drafts = draft_blocks(units)
            kept = trace(units, drafts)
            found = _containers(units, drafts, kept.recorder)
            if found <= containers:
                break
            containers |= found
        pin(drafts, kept.recorder)
        return units, drafts, kept

    units, drafts, kept = traced_apart(frozenset())
    routed = routed_layers(units, kept.recorder)
    while routed:
        try:
            apart = traced_apart(routed)
        except ModelError:  # it can be traced whole: so it stays
            break
        too_much = pinned_layers(routed, drafts, apart[1])
        if not too_much:
            units, drafts, kept = apart
            break
        routed -= too_much
    recomputable = _recomputable(units, kept)
    notes: list[str] = []

    def traced(policy: Activations, done: str, names: Iterable[str]) -> Traced | None:
        """Trace with the layers of these names under another policy; None where that cannot be."""
        try:
            found = trace(units, drafts, policies=dict.fromkeys(names, policy))
        except ModelError as error:
            why = str(error).removesuffix(f": {_STEP_RUNS}")
        else:
            if found.recorder.log.accesses_alike(kept.recorder.log):
                return found
            why = "the order of accesses differs"
        if policy != "offload" or offload != "try":
            notes.append(f"No activations can be {done}: with every layer's so {why}.")
        return None

    offloaded = traced("offload", "offloaded", recomputable) if offload and recomputable else None
    again: Traced | None = kept
    stateful = stateful_at_first(kept, units, snapshot)
    while names := [name for name in recomputable if name not in stateful]:
        again = traced("recompute", "recomputed", names)
        if again is None:
            again, recomputable = kept, ()
            break
        found = stateful_twice(kept, again, [unit for unit in units if unit.name in names], snapshot)
        if not found:
            break
        stateful |= found
        again = kept
    assert again is not None
    graph = assemble(model, drafts, kept=kept, recomputed=again, offloaded=offloaded, recomputable=recomputable)
    graph = replace(
        graph,
        stateful=tuple(Stateful(module=name, reason=stateful[name]) for name in recomputable if name in stateful),
    )
    passes = (kept.events,) if again is kept else (kept.events, again.events)
    return _Seen(graph=graph, kept=kept, ran_again=len(kept.ran_again), notes=tuple(notes), passes=passes)


def _trace_apart(*args: Any, **options: Any) -> Traced:
    return contextvars.copy_context().run(_trace, *args, **options)


def _trace(
    model: nn.Module,
    batch: Batch,
    units: Sequence[Unit],
    drafts: Sequence[Draft],
    *,
    snapshot: Snapshot,
    accumulates: bool,
    loss: Callable[[Any], torch.Tensor] | None,
    autocast_dtype: torch.dtype | None,
    device: str,
    policies: Mapping[str, Activations] = MappingProxyType({}),
) -> Traced:
    """Run one forward and backward on fake tensors. ``autocast_dtype``: what autocast has the forward compute in.
    ``device``: kind of device whose operators are to be seen.
    ``policies``: units whose activations are not kept, by name.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    mode.cache_enabled = False  # what it makes anew does not share memory as what it was made of did
    own = {id(parameter) for parameter in model.parameters()}  # before fake ones take their place
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    ran_again: set[str] = set()
    with ExitStack() as undo:
        undo.enter_context(random_states_kept())
        undo.enter_context(eager_transformers())
        undo.enter_context(numbers_in_text())
        undo.enter_context(numbers_in_lists())
        undo.enter_context(caches_empty(model))
        undo.enter_context(torch.inference_mode(False))
        undo.enter_context(torch.enable_grad())
        undo.enter_context(outside_saving())
        undo.enter_context(outside_autocast())  # it is for the forward alone
        undo.enter_context(torch.compiler.set_stance("force_eager"))
        undo.enter_context(dropout_of(device))
        if torch.get_default_device().type != "cpu":
            undo.enter_context(torch.device("cpu"))
        inputs = batch.faked(mode)
        fakes = undo.enter_context(faked(model, mode, snapshot, as_it_is=batch.as_it_is))
        frozen = {fakes[id(w.tensor)].untyped_storage()._cdata: draft for draft in drafts for w in draft.weights}
        recorder = Recorder((*fakes.values(), *inputs.tensors()), frozen, inputs.tensors())
        undo.callback(recorder.put_back)
        origins = {id(fake): real for real, fake in fakes.items()}
        state: dict[tuple[int, str], object] = {}
        # As the model is left: called when memplan's own wrappers and triggers are off again.
        undo.callback(lambda: state.update(snapshot.state(lambda tensor: origins.get(id(tensor)))))
        addresses = {
            real: storage._cdata
            for real, fake in fakes.items()
            for storage in (storage_of(fake),)
            if storage is not None
        }
        recorder.names = {addresses[id(tensor)]: name for name, tensor in snapshot.tensors() if id(tensor) in addresses}
        placed = [(m, n, p) for m in model.modules() for n, p in m._parameters.items() if p is not None]
        trainables = [fakes[id(parameter)] for parameter in trained]
        others = [fake for real, fake in fakes.items() if real not in own and _is_trained(fake)]
        with mode:
            for parameter in others:  # counted by themselves: see Traced.outside
                parameter.grad = torch.empty_like(parameter)
        versions = [parameter.grad._version for parameter in others if parameter.grad is not None]
        made: dict[int, tuple[int, int]] = {}
        if accumulates:
            with mode:
                for parameter in trainables:
                    parameter.grad = torch.empty_like(parameter)
                    recorder.add(parameter.grad)
                    undo.callback(parameter.register_post_accumulate_grad_hook(partial(_note, made, recorder)).remove)
        recorder.events = [] if is_apart(device) else None  # for the allocator of such a device
        _notice_recomputes(units, ran_again)
        drawn = watch_draws(units)
        offloads = Offloads(recorder, mode)
        for unit in units:
            if policies.get(unit.name) == "recompute":
                undo.callback(recompute.wrap(unit.module))
            elif policies.get(unit.name) == "offload":
                undo.callback(offloading.wrap(unit.module, unit.name, offloads.beginning(unit.name)))
        undo.callback(Triggers({unit.name: unit.module for unit in units}, recorder.log).remove)
        try:
            with mode, recorder:
                with torch.autocast("cpu", autocast_dtype) if autocast_dtype is not None else nullcontext():
                    value = loss_of_pass(model, inputs, loss)
                if batch.reads_rest:
                    recorder.log.assume([unit.name for unit in units if unit.name not in recorder.log.called()])
                recorder.log.loss_begins()
                value.backward()
                recorder.log.optimizer_begins()
        except MemplanError:
            raise
        except Exception as error:
            raise ModelError(
                f"the model could not be traced with this batch ({type_and_line(error)}): {_STEP_RUNS}"
            ) from error
        recorder.finish()
        refuse_replaced(model, placed)
        for draft in drafts:
            for weight in draft.weights:
                if fakes[id(weight.tensor)].untyped_storage()._cdata != addresses[id(weight.tensor)]:
                    recorder.written.setdefault(draft.name, ".data")
                    for trigger in draft.triggers:
                        recorder.stateful.setdefault(trigger, f"it writes to {weight.name} (by .data)")
        read = {real for real, address in addresses.items() if address in recorder.touched}
        updated = {
            holder: name
            for holder, tensor, name in snapshot.dropped(lambda tensor: origins.get(id(tensor)))
            if tensor in read
        }
        gradients = {id(recorder.held(p.grad)) for p in trainables if p.grad is not None}
        left: list[tuple[LifetimeKind, int, int]] = [
            ("gradients" if id(held) in gradients else "activations", held.born, held.size_bytes)
            for held in recorder.alive()
        ]
        outside = [other for other, version in zip(others, versions, strict=True) if _was_written(other.grad, version)]
        outside += [parameter for parameter, _ in recorder.strangers.values() if parameter.grad is not None]
        owner, events = recorder.log.access_of(), recorder.events or []
        born = {number for _, number, size in events if size > 0}
        # Copies: what is left dies as soon as this returns, which is no part of the step.
        return Traced(
            recorder=recorder,
            spans=dict(recorder.spans),
            left=tuple(left),
            gradients=tuple(made.values()),
            ran_again=frozenset(ran_again),
            derived=recorder.derived(),
            offload_bytes=dict(offloads.size_bytes),
            stateful={**drawn, **recorder.stateful},
            state=state,
            outside=tuple((tuple(parameter.shape), parameter.element_size()) for parameter in outside),
            events=[(owner[segment], number, size) for segment, number, size in events if size and number in born],
            updated=updated,
        )


def _note(made: dict[int, tuple[int, int]], recorder: Recorder, parameter: torch.Tensor) -> None:
    """Note in which segment a parameter is given its first gradient."""
    held = None if parameter.grad is None else recorder.held(parameter.grad)
    if held is not None:
        made.setdefault(id(parameter), (recorder.segment, held.size_bytes))


def _is_trained(tensor: torch.Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and tensor.requires_grad and tensor.is_leaf


def _was_written(gradient: torch.Tensor | None, version: int) -> bool:
    return gradient is not None and gradient._version != version


def _notice_recomputes(units: Sequence[Unit], ran_again: set[str]) -> None:
    """Hook all modules within layers and experts, to see which run in backward. ``faked`` takes the hooks away."""

    def notice(unit: str) -> Callable[..., None]:
        def pre_hook(module: nn.Module, args: object) -> None:
            if in_backward():
                ran_again.add(unit)

        return pre_hook

    for unit in units:
        if unit.kind in ("layer", "expert"):
            hook = notice(unit.name)
            inside = list(unit.module.modules())
            # What is within an adapter's wrapper runs when that does; some adapters warn of hooks there.
            wrapped = {id(module._modules.get("base_layer")) for module in inside}
            for module in inside:
                if id(module) not in wrapped:
                    module.register_forward_pre_hook(hook)


def _containers(units: Sequence[Unit], drafts: Sequence[Draft], recorder: Recorder) -> frozenset[str]:
    """Return the layers that are mere containers: never called, though what they hold is read."""
    called = recorder.log.called()
    read = {trigger for draft in drafts if draft.name in recorder.read for trigger in draft.triggers}
    return frozenset(
        unit.name
        for unit in units
        if unit.kind == "layer" and unit.name not in called and unit.name in read and any(unit.module.children())
    )


def _recomputable(units: Sequence[Unit], kept: Traced) -> tuple[str, ...]:
    """Return the layers and experts that a recompute could spare memory for: with a backward, and not checkpointed
    already.
    """
    log = kept.recorder.log
    backward = {access.module for access in log.accesses if access.kind == "backward"}
    return tuple(
        unit.name
        for unit in units
        if unit.kind in ("layer", "expert")
        and unit.name in backward
        and unit.name not in kept.ran_again
        and unit.name not in log.nested
    )
