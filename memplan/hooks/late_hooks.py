"""Hooks within a layer that memplan recomputes, which came after the plan was made: called once, as without a plan.

[Note: hooks that a plan knows] A trace runs the layers with the hooks that they have, twice where they are to be
recomputed: one that counts makes its layer stateful, so those run as ever. Of a hook that came later nobody knows. So
it is called once where nothing comes of it (it counts, averages, logs), and again in backward where the layer computes
with what it does (it returns another value, writes to a tensor, sets an attribute). One that does both is refused.

Hooks are seen where a forward begins, not where they are registered: whatever way they came, a handle removes them,
and their order and their options stay. While a forward runs others stand in their places.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.nn.modules import module as torchs
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from memplan.errors import RunError
from memplan.hooks.compiled import is_compiled
from memplan.hooks.recompute import hooks_around, run_hooked, without_graph
from memplan.model.names import canonical
from memplan.state.holders import is_ours
from memplan.state.reach import Reach, code_of, known_by
from memplan.state.setting import Held

_TRACED: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
"""Of each module that a plan has traced, the number of the first hook to come after that."""
_WAY_OUT = 'register it before memplan.plan(), which then knows of it, or plan with activations="keep"'


def note_traced(model: nn.Module) -> None:
    """Note that a plan knows the hooks that ``model`` has."""
    for module in model.modules():
        _TRACED[module] = RemovableHandle.next_id


class Calls:
    """What came of the hooks' calls in one forward, in turn."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        """``modules``: those of the layer."""
        self.modules = modules
        self.needed: dict[int, list[bool]] = {}
        """Of each hook, by its number: whether the layer computes with what a call did."""
        self.turn: dict[int, Iterator[bool]] | None = None
        """What is left of that, as the forward runs again."""
        self.thread = 0
        self.are_late = False
        """There are such hooks: what they save is not the layer's own."""
        self.error: BaseException | None = None
        """What was being handled as it began to run again."""


class LateHooks:
    """The late hooks within one layer that is recomputed."""

    def __init__(self, name: str, layer: nn.Module, apart: frozenset[int]) -> None:
        """``apart``: ids of streamed weights, of which others hear when they are written to."""
        self._name = name
        self._layer = layer
        self._apart = apart
        self._now: Calls | None = None
        """Of the forward that runs."""
        # What dynamo traces is not touched: its graphs would be others.
        self._beside = {layer} | {part for m in layer.modules() if is_compiled(m) for part in m.modules()}
        self._is_compiled = is_compiled(layer)
        self._judged: dict[Hashable, frozenset[Hashable]] = {}
        """Hooks that were looked at in depth, by their code and module, and what each changed."""
        self._again: set[Hashable] = set()
        """Those that are always called again: what they write to is seen by nothing but its values."""
        self._changed: set[Hashable] = set()
        """What hooks that are called once have changed."""
        self._read: dict[Hashable, Any] = {}
        """What hooks that are called again can reach, and its owners."""

    @contextmanager
    def first(self, calls: Calls) -> Iterator[None]:
        """Write down what comes of the hooks' calls. Raises RunError."""
        since = RemovableHandle.next_id
        with self._in_place(calls):
            yield
        if RemovableHandle.next_id != since:
            for module in calls.modules:
                if any(key >= since for key in (*module._forward_hooks, *module._forward_pre_hooks)):
                    # One on the layer itself comes a call too early: without memplan's the layer has no hooks yet.
                    raise RunError(
                        f"the forward of {self._name} registered a hook within itself, which would be called too "
                        f"often or too early where the plan runs it a second time in backward: {_WAY_OUT}"
                    )

    @contextmanager
    def again(self, calls: Calls) -> Iterator[None]:
        """Call those of the hooks that the layer computes with, as often as the first time."""
        calls.turn = {key: iter(needed) for key, needed in calls.needed.items()}
        calls.error = sys.exc_info()[1]
        try:
            with self._in_place(calls):
                yield
        finally:
            calls.turn, calls.error = None, None

    @contextmanager
    def _in_place(self, calls: Calls) -> Iterator[None]:
        """Have others stand in the late hooks' places."""
        stands: list[tuple[dict[int, Any], _Late]] = []
        before, self._now, calls.thread = self._now, calls, threading.get_ident()
        try:
            for module in calls.modules:
                if (module._forward_pre_hooks or module._forward_hooks) and module not in self._beside:
                    since = _TRACED.get(module, 0)
                    self._stand(module._forward_pre_hooks, since, stands, is_pre=True)
                    self._stand(module._forward_hooks, since, stands, is_pre=False)
            if not self._is_compiled and (torchs._global_forward_pre_hooks or torchs._global_forward_hooks):
                since = _TRACED.get(self._layer, 0)
                self._stand(torchs._global_forward_pre_hooks, since, stands, is_pre=True)
                self._stand(torchs._global_forward_hooks, since, stands, is_pre=False)
            calls.are_late = calls.are_late or bool(stands)
            yield
        finally:
            self._now = before
            for hooks, late in stands:
                if hooks.get(late.key) is late:
                    hooks[late.key] = late.hook

    def _stand(
        self, hooks: dict[int, Any], since: int, stands: list[tuple[dict[int, Any], _Late]], *, is_pre: bool
    ) -> None:
        for key, hook in hooks.items():
            if key >= since and not is_ours(hook):
                late = _Late(self, key, hook, is_pre=is_pre)
                stands.append((hooks, late))
                hooks[key] = late  # of a key that there is: that changes no order

    def call(self, late: _Late, module: nn.Module, given: tuple[Any, ...]) -> Any:
        """Call a hook, or leave it out. Raises RunError."""
        calls = self._now
        if calls is None or calls.thread != threading.get_ident():
            return late.hook(module, *given)
        if calls.turn is None:
            saved = _Saved()
            result, is_needed = self._called_first(late, module, given, saved)
            if is_needed:
                saved.hand_on()
            calls.needed.setdefault(late.key, []).append(is_needed)
            return result
        # A recompute is left by an error once it has all that is wanted, and some hooks are called upon errors.
        if sys.exc_info()[1] is calls.error and next(calls.turn.get(late.key, iter(())), False):
            return late.hook(module, *given)
        return None

    def _called_first(self, late: _Late, module: nn.Module, given: tuple[Any, ...], saved: _Saved) -> tuple[Any, bool]:
        """Call a hook, and return with its result whether the layer computes with what it did."""
        leaves = tree_leaves(given)
        versions = [_version(leaf) for leaf in leaves]
        attributes = Held([module]).state()
        weights = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in self._apart]
        held = [_version(weight) for weight in weights]
        key = (code_of(late.hook), id(module))
        if is_new := key not in self._judged:
            reach = Reach(hook=late.hook)
            before, prints = [_print(leaf) for leaf in leaves], [_print(weight) for weight in weights]
        result = saved.of(lambda: late.hook(module, *given))
        if [_version(weight) for weight in weights] != held or (
            is_new and [_print(weight) for weight in weights] != prints
        ):
            raise self._refused(module, "writes to a weight or a buffer")
        if is_new:
            if [_print(leaf) for leaf in leaves] != before:
                self._again.add(key)
            self._judged[key] = reach.changed() - self._put_back()
        changed = self._judged[key]
        now = tree_leaves(given)
        is_needed = (
            key in self._again
            or not late.is_nothing(result, given)
            or len(now) != len(leaves)
            or any(a is not b for a, b in zip(now, leaves, strict=True))
            or [_version(leaf) for leaf in leaves] != versions
            or attributes.is_changed(ignored=_hooks_of(module))
        )
        if is_needed and changed:
            raise self._refused(module, "changes what the layer computes with, and keeps something of its own beside")
        if is_new:
            self._compare(module, reach, changed, is_needed=is_needed)
        return result, is_needed

    def _compare(self, module: nn.Module, reach: Reach, changed: frozenset[Hashable], *, is_needed: bool) -> None:
        """Raise RunError where the layer, or a hook that is called again, may read what one changes that is called
        once.
        """
        if is_needed:
            self._read |= reach.tokens()
        elif changed:
            self._changed |= changed
            self._read |= Reach(**{f"m{i}": part for i, part in enumerate(self._layer.modules())}).tokens()
        if not self._changed.isdisjoint(self._read):
            raise self._refused(module, "shares what it keeps with the layer, or with another hook")

    def _put_back(self) -> set[Hashable]:
        """Return what the setting of a forward holds, which is put back when it has run again."""
        modules = tuple(self._layer.modules())
        return {*map(known_by, modules), *map(known_by, Held(modules).state().containers())}

    def _refused(self, module: nn.Module, what: str) -> RunError:
        name = next((name for name, part in self._layer.named_modules() if part is module), "")
        where = canonical(f"{self._name}.{name}".rstrip("."))
        return RunError(
            f"a hook on {where}, which came after the plan was made, {what}, and the plan runs {self._name} a second "
            f"time in backward, where that would happen twice: {_WAY_OUT}"
        )


class _Late:
    """Stands in a hook's place while a forward runs."""

    def __init__(self, hooks: LateHooks, key: int, hook: Any, *, is_pre: bool) -> None:
        self.key = key
        self.hook = hook
        self._hooks = hooks
        self._is_pre = is_pre

    def __call__(self, module: nn.Module, *given: Any) -> Any:
        return self._hooks.call(self, module, given)

    def is_nothing(self, result: Any, given: tuple[Any, ...]) -> bool:
        """Whether a result has the module go on with what it was given."""
        if result is None:
            return True
        if not self._is_pre:
            return result is given[-1]
        if len(given) == 1:
            return _are_same(result if isinstance(result, tuple) else (result,), given[0])
        args, kwargs = result if isinstance(result, tuple) and len(result) == 2 else (None, None)
        return (
            isinstance(args, tuple)
            and isinstance(kwargs, dict)
            and _are_same(args, given[0])
            and list(kwargs) == list(given[1])
            and _are_same(tuple(kwargs.values()), tuple(given[1].values()))
        )


class _Saved:
    """What autograd saves in a hook's call, kept from the checkpoint, which counts it, until it is known if there is
    another.

    The hook that is not called again would leave the second run with less than the first has saved.
    """

    def __init__(self) -> None:
        self._boxes: list[_Box] = []
        self._around = hooks_around() if torch.is_grad_enabled() else None

    def of(self, call: Callable[[], Any]) -> Any:
        """Return ``call()``."""
        return call() if self._around is None else run_hooked(call, self._pack, _Box.value)

    def _pack(self, tensor: torch.Tensor) -> _Box:
        self._boxes.append(_Box(tensor))
        return self._boxes[-1]

    def hand_on(self) -> None:
        """Give what was saved to the checkpoint, as the second run does."""
        for box in self._boxes:
            box.give(self._around)


class _Box:
    """A saved tensor, or what the hooks around have made of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._held: Any = without_graph(tensor)
        self._unpack: Callable[[Any], torch.Tensor] | None = None

    def give(self, around: Any) -> None:
        pack, self._unpack = around
        self._held = pack(self._held)

    def value(self) -> torch.Tensor:
        found: torch.Tensor = self._held if self._unpack is None else self._unpack(self._held)
        return found


def _are_same(values: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return len(values) == len(others) and all(a is b for a, b in zip(values, others, strict=True))


def _hooks_of(module: nn.Module) -> frozenset[int]:
    """Return the ids of where a module's hooks are: one that comes or goes is none of what it computes with."""
    return frozenset(id(held) for name, held in module.__dict__.items() if "_hooks" in name)


def _version(value: Any) -> int:
    if not isinstance(value, torch.Tensor) or value.is_inference():
        return 0
    with torch._C.DisableTorchFunctionSubclass():
        return value._version


def _print(value: Any) -> object:
    """Return what tells of a write to a tensor that its version does not (by ``data``)."""
    if not isinstance(value, torch.Tensor) or type(value) not in (torch.Tensor, nn.Parameter) or value.is_meta:
        return None
    with torch.no_grad():
        total = value.sum(dtype=torch.complex128 if value.is_complex() else torch.float64)
        norm = torch.linalg.vector_norm(value) if value.is_floating_point() else total
        return repr((total.item(), norm.item()))
