"""The one place that sees every access of a module's weights before it happens, forward and backward.

The analyzer numbers the accesses with it and the runtime serves them with it, so that both see the same sequence.
A trigger module tells its watcher when its forward begins and ends, and when the backward of one of its calls begins.

[Note: produced, not passed through] The backward trigger watches only tensors that the call *produced*. A tensor that
is handed on (T5's ``position_bias``) gets its gradient late, after other blocks' backwards have begun.

[Note: hook orders] Where a layer is checkpointed, its forward runs again in backward: inside the layer's hooks
(transformers 5.23) or around them (before, and users' own checkpoints), reentrant or not. So one backward access may be
announced more than once, by ``forward_begins(in_backward=True)``, by ``backward_begins``, or both, in any order: a
watcher takes each as the same access.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import MappingProxyType
from typing import Any, Protocol
from weakref import ref

import torch
from torch import nn
from torch.autograd.graph import register_multi_grad_hook

from memplan.errors import RunError
from memplan.hooks.compiled import (
    OptimizedModule,
    call_of,
    in_region,
    keep_call,
    refuse_beside,
    refuse_region,
    replace_call,
    takes_no_hooks,
    untraced,
    untraced_deep,
)
from memplan.hooks.nested import tensors_in
from memplan.hooks.taps import Taps
from memplan.model.names import canonical


class Watcher(Protocol):
    """Who is told. Called in whichever thread autograd runs in."""

    def forward_begins(self, module: str, *, in_backward: bool) -> int:
        """A forward of the trigger module begins. What is returned names this call to ``backward_begins``."""

    def forward_ends(self, module: str, call: int, *, in_backward: bool) -> None:
        """That forward has ended."""

    def forward_failed(self) -> None:
        """A forward was left by an error."""

    def backward_begins(self, module: str, call: int) -> None:
        """A gradient of what this call produced is there: its backward begins."""

    def backward_ends(self) -> None:
        """The outermost backward that accesses were seen in has ended."""


class Turns(Protocol):
    """Who lets the micro-batches of a group take turns: asked before anything is told of an access."""

    def before_forward(self, module: str, *, in_backward: bool) -> None:
        """A forward of the trigger module is to begin. Returns when it may."""

    def before_backward(self, module: str, call: int) -> None:
        """The backward of one of its calls is to begin. Returns when it may."""


_CALLER = "memplan.caller"
_STASHED: list[int] = []
"""What was ever kept for :func:`caller`, one for each thread that computes: torch 2.11 takes a reference over that it
was never given, and an object without another would be freed while it is still there."""


def compute_here() -> None:
    """Have this thread, and what of autograd's works for it, be told from others by :func:`caller`."""
    if "identity" not in _OWN.__dict__:
        _OWN.identity = threading.get_ident()
        _STASHED.extend((_OWN.identity,) * 2)
        torch._C._stash_obj_in_tls(_CALLER, _OWN.identity)


_OWN = threading.local()
_ON_BEHALF: dict[int, int] = {}
"""By thread, the one that it computes for."""


@contextmanager
def computing_for(identity: int) -> Iterator[None]:
    """Have this thread, in which autograd's backwards run too, be taken by :func:`caller` for another, which waits."""
    own = threading.get_ident()
    _OWN.identity, _ON_BEHALF[own] = identity, identity
    try:
        yield
    finally:
        del _OWN.identity, _ON_BEHALF[own]


def caller() -> int:
    """Return the thread that called what runs here: autograd's threads take over what is kept of it."""
    if torch._C._is_key_in_tls(_CALLER):
        found: int = torch._C._get_obj_in_tls(_CALLER)
        return found
    own = threading.get_ident()
    return _ON_BEHALF.get(own, own)


def in_backward() -> bool:
    """Whether this thread runs inside a backward (of any depth)."""
    return torch._C._current_graph_task_id() != -1


def modules_by_name(model: nn.Module) -> dict[str, nn.Module]:
    """Return the modules by canonical name; where a wrapper and what it wraps share one, the wrapper.

    The wrapper's call encloses every read (DoRA reads ``base_layer.weight`` itself).
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        found.setdefault(canonical(name), module)
    return found


class Triggers:
    """The hooks of a set of modules. Installed on construction, gone after ``remove``."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        watcher: Watcher,
        within: Mapping[str, Sequence[nn.Module]] = MappingProxyType({}),
        around: Sequence[nn.Module] | None = None,
        taps: Mapping[str, Taps] = MappingProxyType({}),
        look: Callable[[str, int, object, object], bool] | None = None,
    ) -> None:
        """``within``: modules inside of some, each of whose outputs announces the backward too; as long as it needs to,
        where there are ``taps`` of that trigger. ``around``: those that call some, from which an error comes out as
        well: so failed forwards are told, at no cost to those that do not fail. None: they are not told. ``look``: is
        shown each forward as it ends (module, call, what went in, what came out) until it says that it has seen all.

        [Note: entered from within] A backward that comes to a layer by a tensor that was made inside of it, and by none
        that it returned, is announced by nothing else. Functions that keep views of weights (torch's linear,
        bitsandbytes) would then read another block's bytes, which look like any others. Mostly a forward hook has
        handed out that tensor.
        """
        self._watcher = watcher
        self.modules = modules
        """The trigger modules by name."""
        self.turns: Turns | None = None
        """Who is asked before each access, where micro-batches take turns."""
        self._taps = taps
        self._announced: set[tuple[str, int]] = set()
        """The calls whose backward was announced, of the outermost backward under way."""
        self.told: tuple[str, int] = ("", -1)
        """The call whose backward was announced last."""
        self._calls: dict[str, int] = {}
        self._outermost = -1
        self._computes: tuple[int, Callable[[], object]] = (0, lambda: None)
        """Whose that backward is, and what returns None once it is over, by an error too."""
        self._look = look
        self._undo: list[Callable[[], None]] = []
        self._inside: list[str] = []
        """Compiled modules whose calls are under way."""
        self._tells_failures = around is not None
        self._around: set[int] = set()
        """Ids of the modules around whose calls are under way. An interrupt, of which hooks are not told, leaves them
        there.
        """
        self._alone: set[str] = set()
        """Those that were called by none of these: they are hooked themselves."""
        self._beside = refuse_beside(self._inside)
        try:
            for module in around or ():
                self._undo.append(module.register_forward_pre_hook(self._goes_in, prepend=True).remove)
                self._watch_failure(module, self._comes_out)
            for name, module in modules.items():
                self._watch(name, module)
                self._watch_within(name, within.get(name, ()))
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Take the hooks away. Backwards of calls made before still reach the watcher, which must bear it."""
        while self._undo:
            self._undo.pop()()

    def own_hooks(self) -> frozenset[int]:
        """Return the ids of where modules have hooks that come and go by themselves."""
        return frozenset(id(module._forward_hooks) for taps in self._taps.values() for module in taps.watched)

    def lane(self) -> tuple[Any, ...]:
        """Return what is one micro-batch's own, for :meth:`be_lane`."""
        return self._calls, self._announced, self.told, self._outermost, self._computes, self._around

    def be_lane(self, lane: tuple[Any, ...] | None) -> None:
        """Go on with another micro-batch; None: with one that has not begun."""
        if lane is None:
            lane = {}, set(), ("", -1), -1, (0, lambda: None), set()
        self._calls, self._announced, self.told, self._outermost, self._computes, self._around = lane

    def _watch(self, name: str, module: nn.Module) -> None:
        before, after = self._before(name), self._after(name)
        if not takes_no_hooks(module):
            self._undo.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            self._undo.append(module.register_forward_hook(after, with_kwargs=True).remove)
            return
        call = call_of(module)

        def watched(*args: Any, **kwargs: Any) -> Any:
            before(module, args, kwargs)
            self._inside.append(name)
            try:
                output = call(*args, **kwargs)
            except BaseException:
                self._watcher.forward_failed()
                raise
            finally:
                self._inside.pop()
            after(module, args, kwargs, output)
            return output

        self._undo.append(replace_call(module, untraced(watched)))
        self._undo.append(keep_call(module))
        if isinstance(module, OptimizedModule):
            self._undo.append(module._orig_mod.register_forward_pre_hook(self._beside).remove)

    def _watch_within(self, name: str, within: Sequence[nn.Module]) -> None:
        taps = self._taps.get(name)
        for inner in within:
            handle = inner.register_forward_hook(self._inside_of(name))
            self._undo.append(handle.remove)
            if taps is not None:
                taps.watched[inner] = handle

    def _before(self, name: str) -> Any:
        def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            refuse_region(name)
            if torch._C._get_tracing_state() is not None:
                raise RunError(
                    f"{name} was traced by torch.jit while memplan streams its weights, which the traced module "
                    "would read where they are not: detach() first"
                )
            backward = torch._C._current_graph_task_id() != -1
            if self.turns is not None:
                self.turns.before_forward(name, in_backward=backward)
            if backward:
                self._watch_end(name)
            else:
                self._refuse_beside_backward(name)
                self._outermost = -1  # a backward that raised never announced its end
                self._announced.clear()
            if self._tells_failures and not self._around and name not in self._alone and not takes_no_hooks(module):
                self._alone.add(name)
                self._watch_failure(module, self._ends_alone)
            if (taps := self._taps.get(name)) is not None and (again := taps.begins(args, kwargs)):
                self._watch_within(name, again)
            self._calls[name] = self._watcher.forward_begins(name, in_backward=backward)

        return untraced(pre_hook)

    def _refuse_beside_backward(self, name: str) -> None:
        """Raise RunError where the backward that is under way is another thread's."""
        if self._outermost != -1 and self._computes[0] != caller() and self._computes[1]() is not None:
            raise RunError(
                f"{name} was reached in a thread while another one runs a backward of the same model, whose weights "
                "memplan brings one after the other: let them take turns, or detach() first"
            )

    def _after(self, name: str) -> Any:
        def post_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            call = self._calls[name]
            if torch.is_grad_enabled():
                produced = _produced(output, args, kwargs)
                if len(produced) == 1:
                    # A tensor's hook: it comes before those of the node, which an inner module may have made.
                    produced[0].register_hook(partial(_tell, self, name, call))
                elif produced:
                    register_multi_grad_hook(produced, partial(_tell, self, name, call), mode="any")
                if (taps := self._taps.get(name)) is not None and taps.stops is not None:
                    taps.ends()
            if self._look is not None and self._look(name, call, (args, kwargs), output):
                self._look = None
            self._watcher.forward_ends(name, call, in_backward=torch._C._current_graph_task_id() != -1)

        return untraced(post_hook)

    def _inside_of(self, name: str) -> Any:
        taps = self._taps.get(name)

        def hook(module: nn.Module, args: object, output: object) -> None:
            made = (output,) if type(output) is torch.Tensor else tensors_in(output)
            for tensor in made:
                # Of the node: to put it there takes two thirds of what a tensor's hook does.
                if (node := tensor.grad_fn) is not None and torch._C._current_graph_task_id() == -1:
                    node.register_prehook(partial(_tell_from_within, self, name, self._calls.get(name, -1)))
            if taps is not None and taps.stops is not None:
                taps.look(module, [tensor for tensor in made if tensor.grad_fn is not None])

        return untraced(hook)

    def _watch_failure(self, module: nn.Module, ends: Any) -> None:
        # Called first where all is well, and alone where an error has left the forward.
        self._undo.append(module.register_forward_hook(ends, prepend=True, always_call=True).remove)

    @untraced
    def _goes_in(self, module: nn.Module, args: object) -> None:
        if id(module) in self._around:
            self._around.clear()
        self._around.add(id(module))

    @untraced
    def _comes_out(self, module: nn.Module, args: object, output: object) -> None:
        self._around.discard(id(module))
        self._ends_alone(module, args, output)

    @untraced
    def _ends_alone(self, module: nn.Module, args: object, output: object) -> None:
        if sys.exc_info()[0] is not None:
            self._watcher.forward_failed()

    def backward_begins(self, name: str, call: int) -> None:
        """Tell that a gradient of what a call produced is there."""
        if self.turns is not None:
            self.turns.before_backward(name, call)
        self._watch_end(name)
        self.told = (name, call)
        self._announced.add((name, call))
        self._watcher.backward_begins(name, call)

    def backward_goes_on(self, name: str, call: int) -> None:
        """Tell the same of a tensor that was made inside of a call, where that was not told already."""
        taps = self._taps.get(name)
        if taps is None or not taps.is_settled:
            self.backward_begins(name, call)
        elif (name, call) not in self._announced:
            taps.refuse()

    def _watch_end(self, name: str) -> None:
        """Have the end of the outermost backward announced. Raises RunError where another thread's is under way.

        The first trigger of a backward always runs in its outermost graph task: a reentrant checkpoint's recompute
        begins there, and only what it calls then is nested.
        """
        self._refuse_beside_backward(name)
        if self._outermost == -1 or self._computes[0] != caller():
            self._outermost = torch._C._current_graph_task_id()
            ends = partial(_tell_end, self)
            self._computes = caller(), ref(ends)  # the graph task alone holds it
            torch.autograd.Variable._execution_engine.queue_callback(ends)

    def backward_ends(self) -> None:
        """Tell that the outermost backward is over."""
        self._outermost = -1
        self.told = ("", -1)
        self._announced.clear()
        self._watcher.backward_ends()


def _produced(output: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """Return the tensors of an output that the call has made. [Note: produced, not passed through]"""
    produced = [tensor for tensor in tensors_in(output) if tensor.grad_fn is not None]
    given = {id(tensor) for tensor in tensors_in((args, kwargs))} if produced else ()
    return [tensor for tensor in produced if id(tensor) not in given]


# A backward may be called from within a compiled region: dynamo leaves alone what is disabled, and what that calls.


@untraced
def _tell(triggers: Triggers, name: str, call: int, gradients: object) -> None:
    if in_region():
        _tell_in_region(triggers, name, call)
    else:
        triggers.backward_begins(name, call)


@untraced_deep
def _tell_in_region(triggers: Triggers, name: str, call: int) -> None:
    triggers.backward_begins(name, call)


@untraced
def _tell_from_within(triggers: Triggers, name: str, call: int, gradients: object) -> None:
    if triggers.told != (name, call) and call != -1:
        _goes_on(triggers, name, call)


@untraced_deep
def _goes_on(triggers: Triggers, name: str, call: int) -> None:
    triggers.backward_goes_on(name, call)


@untraced_deep
def _tell_end(triggers: Triggers) -> None:
    triggers.backward_ends()
