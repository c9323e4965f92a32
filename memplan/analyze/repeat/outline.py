"""What a forward does between the layers of a long stack, looked at over its whole length.

[Note: only what is known] A stack is traced short, so a forward that treats layers otherwise by numbers that no setting
shows (the one in the middle, every one from the twelfth on, the first three) could go unseen. So the whole forward runs
once on fake tensors, with one layer of each kind in full and the others' outputs made from memory: what it does from
layer to layer, and with what, must repeat from period to period over the whole stack. What a layer does by its own
number shows in the trace, where the layers that are kept are the first and the last of the stack.
"""

from __future__ import annotations

import contextvars
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from memplan.analyze.inputs.autocast import outside_autocast
from memplan.analyze.inputs.batch import Batch
from memplan.analyze.repeat.periodic import KEPT, Run, find_runs, shortened
from memplan.analyze.trace.fake import caches_empty, eager_transformers, faked, numbers_in_lists, numbers_in_text
from memplan.analyze.trace.fake_values import Values
from memplan.model.live_storages import opens, storage_of
from memplan.state.process_state import random_states_kept

_DEVICE = torch.ops.prim.device.default


def runs_of(model: nn.Module, call: Batch) -> tuple[Run, ...]:
    """Return the runs of layers that need not all be traced, see ``periodic.py``; none where the forward, or what it is
    given, is not the same from period to period.
    """
    runs = find_runs(model)
    if not runs:
        return ()
    return runs if contextvars.copy_context().run(_repeats, model, call, runs) else ()


def _repeats(model: nn.Module, call: Batch, runs: Sequence[Run]) -> bool:
    """Whether each run repeats, and what is done outside of all is no more for more layers."""
    known: dict[str, dict[object, Any]] = {}
    whole = _events(model, call, runs, known)
    if whole is None or not all(_is_periodic(whole, run) for run in runs):
        return False
    with shortened(runs):
        short = _events(model, call, [replace(run, count=KEPT) for run in runs], known)
    return short is not None and len(whole) - len(short) == sum(_spared_events(whole, run) for run in runs)


def _events(
    model: nn.Module, call: Batch, runs: Sequence[Run], known: dict[str, dict[object, Any]]
) -> list[tuple[object, ...]] | None:
    """Return what a forward does outside the layers of the runs, and their calls; None where it fails. ``known``: what
    layers gave, by the name of their run.
    """
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    try:
        with ExitStack() as undo:
            for context in (random_states_kept(), eager_transformers(), numbers_in_text(), numbers_in_lists()):
                undo.enter_context(context)
            undo.enter_context(caches_empty(model))
            undo.enter_context(torch.inference_mode(False))
            undo.enter_context(torch.no_grad())
            undo.enter_context(outside_autocast())
            undo.enter_context(torch.compiler.set_stance("force_eager"))
            inputs = call.faked(mode)
            undo.enter_context(faked(model, mode))
            log = _Log(mode)
            for run in runs:
                undo.enter_context(_stubbed(run, log, known.setdefault(run.name, {})))
            undo.enter_context(mode)
            undo.enter_context(log)
            for one in inputs.calls:
                one.run(model)
    except Exception:
        return None
    return log.events


class _Log(TorchDispatchMode):
    """Writes down each operator outside the layers, and each call of a layer, with what went into it."""

    def __init__(self, mode: FakeTensorMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.events: list[tuple[object, ...]] = []
        """What was run, its arguments' shapes, and of which event before each was made."""
        self.within = 0
        """Layers that are under way."""
        self._mode = mode
        self._values = Values()
        self._made: dict[int, tuple[int, torch.UntypedStorage]] = {}
        """The event that made a storage, by its address, with the storage lest that be used again."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if opens(types):
            return NotImplemented
        if func is _DEVICE or self.within:
            return self._values.run(func, args, kwargs or {})
        described = self.described((args, kwargs or {}))
        result = self._values.run(func, args, kwargs or {})
        if not func.is_view:
            self.note((func, described), result)
        return result

    def note(self, event: tuple[object, ...], result: object) -> None:
        """Write an event down, and that it made the tensors of its result that nothing made before."""
        self.events.append(event)
        for tensor in _tensors(result):
            storage = storage_of(tensor)
            if storage is not None:
                self._made.setdefault(storage._cdata, (len(self.events) - 1, storage))

    def described(self, given: object) -> tuple[object, ...]:
        """Return arguments as a value: tensors by shape, dtype and the number of the event that made each."""
        leaves, structure = tree_flatten(given)
        return (str(structure), *(self._leaf(leaf) for leaf in leaves))

    def _leaf(self, leaf: object) -> object:
        if not isinstance(leaf, torch.Tensor):
            return leaf if isinstance(leaf, (int, float, str, bool, type(None), torch.dtype)) else type(leaf)
        storage = storage_of(leaf)
        made = None if storage is None else self._made.get(storage._cdata)
        return _Tensor((tuple(leaf.shape), leaf.dtype, None if made is None else made[0]))


class _Tensor(tuple[Any, ...]):
    """Shape, dtype, and the number of the event that made it; None: it was there before."""

    __slots__ = ()


@contextmanager
def _stubbed(run: Run, log: _Log, known: dict[object, Any]) -> Iterator[None]:
    """Have each layer of a run give what the first one of its kind gave for arguments of the same shapes."""
    elements = list(run.stack._modules.items())

    def stub(index: int, module: nn.Module) -> Any:
        forward = module.forward
        kind = (index - run.first) % run.period

        def run_or_remember(*args: Any, **kwargs: Any) -> Any:
            if log.within:
                return forward(*args, **kwargs)
            described = log.described((args, kwargs))
            key = (kind, tuple(part[:2] if isinstance(part, _Tensor) else part for part in described))
            log.within += 1
            try:
                if key in known:
                    result = tree_map(_again, known[key])
                else:
                    result = known[key] = forward(*args, **kwargs)
            finally:
                log.within -= 1
            log.note(((run.name, index), described), result)
            return result

        return run_or_remember

    try:
        for name, module in elements[run.first : run.first + run.count * run.period]:
            assert module is not None
            module.__dict__["forward"] = stub(int(name), module)
        yield
    finally:
        for _, module in elements:
            if module is not None and getattr(module.__dict__.get("forward"), "__name__", "") == "run_or_remember":
                del module.__dict__["forward"]


def _again(value: Any) -> Any:
    if not isinstance(value, FakeTensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")


def _is_periodic(events: Sequence[tuple[object, ...]], run: Run) -> bool:
    """Whether the layers of a run are called one after another, or none of them, and what lies between the calls is the
    same in each period but the first and the last.
    """
    calls = [place for place, (what, _) in enumerate(events) if isinstance(what, tuple) and what[0] == run.name]
    if not calls:
        return True
    indices = [events[place][0][1] for place in calls]  # type: ignore[index]
    if indices != list(range(run.first, run.first + run.count * run.period)):
        return False
    begins = calls[:: run.period]

    def relative(place: int, event: tuple[object, ...]) -> object:
        what, described = event
        name = "call" if isinstance(what, tuple) else what

        def leaf(part: object) -> object:
            if not isinstance(part, _Tensor):
                return part
            made = part[2]
            return (*part[:2], made - place if made is not None and made >= begins[0] else ("outside", made))

        return name, tuple(leaf(part) for part in described)  # type: ignore[attr-defined]

    periods = [[relative(place, events[place]) for place in range(begin, end)] for begin, end in pairwise(begins[1:])]
    return all(period == periods[0] for period in periods[1:])


def _spared_events(events: Sequence[tuple[object, ...]], run: Run) -> int:
    """Return how many events of a run are not there once it is short."""
    calls = [place for place, (what, _) in enumerate(events) if isinstance(what, tuple) and what[0] == run.name]
    return (run.count - KEPT) * (calls[2 * run.period] - calls[run.period]) if calls else 0


def _tensors(value: object) -> Iterator[torch.Tensor]:
    yield from (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, torch.Tensor))
