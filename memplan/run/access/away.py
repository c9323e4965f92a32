"""The classes that weights have while no access of them is under way, which hand every read and write on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from torch.utils.weak import WeakIdKeyDictionary

from memplan.errors import RunError
from memplan.hooks.compiled import untraced_deep
from memplan.hooks.nested import tensors_in
from memplan.model.weights import kind_of
from memplan.run.access.dispatched import announced_in, opened_in, unasked
from memplan.run.access.lent import StandIn
from memplan.run.access.metadata import DESCRIBE, LAYOUT, STORAGES
from memplan.run.schedule.streamed import Kinds

if TYPE_CHECKING:
    from memplan.run.transfer.lock import Lock

_GET_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]
_LOOK_AT_MEMORY = frozenset({torch.ops.aten.resolve_conj.default, torch.ops.aten.resolve_neg.default})
"""What torch's C++ calls before it reads by an address and by the strides of the tensor that it was given."""
SERVERS = WeakIdKeyDictionary()
"""Who serves each tensor that is not open, as a weak reference: a model that is dropped must not be kept."""
_FRAMES = 8
"""As far back as a caller is looked for: torch's own frames lie between."""
_AWAY: dict[type, type] = {}
_NOTING: dict[type, type] = {}


class Server(Protocol):
    """Who serves reads and writes of a weight that is away, as far as its class knows."""

    def is_of_backward(self, tensor: torch.Tensor) -> bool: ...

    def stand_in(self, tensor: torch.Tensor) -> StandIn: ...

    def take_back(self, stand_in: StandIn) -> None: ...

    def locked(self) -> Lock: ...

    def like_of(self, tensor: torch.Tensor) -> torch.Tensor | None: ...

    def taken(self, tensor: torch.Tensor, data: torch.Tensor, *, is_versioned: bool) -> None: ...


def kinds_of(tensor: torch.Tensor, is_plain: bool) -> Kinds:
    own = kind_of(tensor)
    away = _AWAY.get(own)
    if away is None:
        served = {
            name: _serving(getattr(own, name))
            for name in _COPIES
            if getattr(own, name, None) is not getattr(torch.Tensor, name, None)
        }
        looks = {name: _looking(getattr(own, name)) for name in ("grad", "requires_grad")}
        away = _AWAY[own] = _named(own, {**served, **looks, "__torch_function__": classmethod(_torch_function)})
    noting = own
    if own is nn.Parameter and not is_plain:
        noting = _NOTING.get(own) or _NOTING.setdefault(
            own, _named(own, {"data": property(_data, _set_data), "detach": _detach})
        )
    return Kinds(tensor=tensor, own=own, away=away, noting=noting)


def _named(own: type, more: dict[str, Any]) -> type:
    """Return a subclass that goes by its parent's name: libraries know quantized weights by it."""

    def new(kind: type, *args: Any, **kwargs: Any) -> Any:
        return own(*args, **kwargs)  # type(weight)(...) makes one of the same kind

    names = {"__module__": own.__module__, "__qualname__": own.__qualname__, "_memplan_kind": own, "__new__": new}
    made: type = type(own)(own.__name__, (own,), {**names, **more})
    return made


_COPIES = ("__copy__", "__deepcopy__", "__reduce_ex__", "to", "cuda", "cpu", "xpu")
"""Methods of which classes of parameters have their own, that look at ``type(self)`` before torch looks at them."""


def _serving(method: Callable[..., Any]) -> Callable[..., Any]:
    def served(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        server = server_of(tensor)
        if torch._C._current_graph_task_id() != -1 and server is not None and server.is_of_backward(tensor):
            return method(tensor, *args, **kwargs)
        return serve_call(method, (tensor, *args), kwargs, (tensor,))

    return served


def _looking(attribute: Any) -> property:
    """Return an attribute that is looked at of all parameters in each step, by the short way: nothing is read for
    it.
    """

    def get(tensor: torch.Tensor) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return attribute.__get__(tensor)

    def put(tensor: torch.Tensor, value: Any) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            attribute.__set__(tensor, value)

    def drop(tensor: torch.Tensor) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            attribute.__delete__(tensor)

    return property(get, put, drop)


def _data(tensor: torch.Tensor) -> torch.Tensor:
    data: torch.Tensor = nn.Parameter.data.__get__(tensor)  # type: ignore[attr-defined]
    server = server_of(tensor)
    if server is not None:
        server.taken(tensor, data, is_versioned=False)
    return data


def _detach(tensor: torch.Tensor) -> torch.Tensor:
    detached = torch.Tensor.detach(tensor)
    server = server_of(tensor)
    if server is not None:
        server.taken(tensor, detached, is_versioned=True)
    return detached


def _set_data(tensor: torch.Tensor, data: torch.Tensor) -> None:
    nn.Parameter.data.__set__(tensor, data)  # type: ignore[attr-defined]


@untraced_deep
def _torch_function(
    kind: type,
    func: Callable[..., Any],
    types: Sequence[type],
    args: tuple[Any, ...] = (),
    kwargs: dict[str, Any] | None = None,
) -> Any:
    kwargs = kwargs or {}
    if func in DESCRIBE or (func is torch.Tensor.type and len(args) == 1 and not kwargs):
        with torch._C.DisableTorchFunctionSubclass(), unasked():
            return func(*args, **kwargs)
    return _serve(func, args, kwargs)


def _serve(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if func is torch.Tensor.detach and is_for_a_parameter():
        raise RunError(
            "nn.Parameter was given a frozen weight that memplan streams, and torch makes no parameter of such: give "
            "it weight.data, or detach() from memplan first"
        )
    held = {id(tensor): tensor for tensor in away_in((args, kwargs))}
    # Of its ``data`` nothing tells whether a hook of the backward writes to it where it is open.
    if torch._C._current_graph_task_id() != -1 and func != _GET_DATA:
        servers = [(server_of(tensor), tensor) for tensor in held.values()]
        if all(server is not None and server.is_of_backward(tensor) for server, tensor in servers):
            return func(*args, **kwargs)
    if func in LAYOUT and len(held) == 1 and args and id(args[0]) in held:
        like = like_of(args[0])
        if like is not None:
            return func(like, *args[1:], **kwargs)
    return serve_call(func, args, kwargs, tuple(held.values()))


def serve_operator(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer an operator that torch's C++ gives weights that are away."""
    held = {id(tensor): tensor for tensor in announced_in((args, kwargs))}
    if operator is torch.ops.aten._has_compatible_shallow_copy_type.default:
        raise RunError(
            "a frozen weight that memplan streams was put in another tensor's place (other.data = weight), which "
            "would hold a placeholder: give it weight.data"
        )
    if torch._C._current_graph_task_id() != -1 and not torch.is_grad_enabled():
        # Of what autograd saved beside it, views lie in a slot that is another block's by now.
        raise RunError(
            "a backward read a frozen weight that was not there: it entered a layer by a tensor that was made inside "
            "of it (taken by "
            "a hook, or from a cache), not by what it returned, or a hook gave the weight to C++. Plan with "
            'activations="recompute", pin that layer to the device (pins={...: "device"}), or give weight.detach()'
        )
    if operator in _LOOK_AT_MEMORY:
        raise RunError(
            "a frozen weight that memplan streams was read by C++ that looks at its memory next (tolist() where "
            "torch asks no class): give it weight.detach()"
        )
    if any(server_of(tensor) is None for tensor in held.values()):
        raise gone()
    return serve_call(operator, args, kwargs, tuple(held.values()))


def serve_others(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Answer an operator that a thread that does not train gives weights in their slots."""
    held = {id(tensor): tensor for tensor in opened_in((args, kwargs))}
    if torch._C._current_graph_task_id() != -1:
        with unasked():  # a backward whose forward was another thread's: the block stays as long as it needs to
            return operator(*args, **kwargs)
    if any(server_of(tensor) is None for tensor in held.values()):
        raise RunError(
            "a thread was given a view of a frozen weight that was taken in another one, in which memplan streams it: "
            "what is there may be another block's by now. Give the thread the weight itself, or a copy of it"
        )
    return serve_call(operator, args, kwargs, tuple(held.values()))


def serve_call(func: Callable[..., Any], args: Any, kwargs: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """Call a function with weights' true values in their place."""
    given: list[tuple[Server, StandIn]] = []
    try:
        for tensor in tensors:
            server = server_of(tensor)
            if server is None:
                raise gone()
            with _outside_of_functorch():
                given.append((server, server.stand_in(tensor)))
        shown = {id(one.weight): one.shown for _, one in given}
        result = func(*_exchanged(args, shown), **_exchanged(kwargs, shown))
        if func in STORAGES:
            for _, one in given:
                for lent in one.lent:
                    lent.held.for_good = True
        # What is done in place gives back the tensor that it was done to.
        return next((one.weight for _, one in given if one.shown is result), result)
    finally:
        shown = {}
        failure: RunError | None = None
        for server, one in given:
            try:
                with _outside_of_functorch():
                    server.take_back(one)
            except RunError as error:
                failure = failure or error
        if failure is not None:
            raise failure


def _outside_of_functorch() -> AbstractContextManager[object]:
    """Return a context in which tensors are made as they are: within ``torch.func.grad`` they would be wrapped."""
    if torch._C._functorch.peek_interpreter_stack() is None:
        return nullcontext()
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def _exchanged(value: Any, shown: dict[int, torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return shown.get(id(value), value)
    if isinstance(value, (tuple, list)):
        parts = [_exchanged(part, shown) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _exchanged(part, shown) for key, part in value.items()}
    return value


def swap(function: Callable[..., None], one: torch.Tensor, other: torch.Tensor) -> None:
    """Exchange two tensors as ``torch.utils.swap_tensors`` does, where one of them is a weight that comes and goes:
    their values, as all else of them is the same. Raises RunError where it is not.
    """
    served = [tensor for tensor in (one, other) if server_of(tensor) is not None]
    if not served:
        return function(one, other)
    if one is other:
        return None
    with torch._C.DisableTorchFunctionSubclass():
        alike = [
            (kind_of(t), t.shape, t.dtype, t.device, t.requires_grad, t.grad is None, vars(t), _uses_of(t) == 1)
            for t in (one, other)
        ]
    if alike[0] != alike[1] or not all(now[-1] and now[-2] == {} for now in alike):
        raise RunError(
            "torch.utils.swap_tensors was given a frozen weight that memplan streams, and a tensor of another class, "
            "shape, dtype or device, a trained one, one with attributes, or one that a graph has saved: swap before "
            "plan(), or detach() first"
        )
    first, second = (t.data if server_of(t) is None else t.data.clone() for t in (one, other))
    one.data, other.data = second, first
    return None


def _uses_of(tensor: Any) -> int:
    """Return how many refer to a tensor: its object in Python, and graphs that have saved it."""
    uses: int = tensor._use_count()
    return uses


def refuse_home(block: int, **options: bool) -> None:
    raise gone()


def gone() -> RunError:
    return RunError(
        "a weight was read whose model ran under a plan and is gone: keep the model, or call detach() before it is "
        "dropped"
    )


def server_of(tensor: torch.Tensor) -> Server | None:
    found = SERVERS.get(tensor)
    return None if found is None else found()


def module_that_calls() -> int:
    """Return the id of the module in whose method a call is made, 0 where none is near."""
    frame = sys._getframe(1).f_back
    for _ in range(2 * _FRAMES):
        if frame is None:
            break
        held = frame.f_locals.get("self")
        if isinstance(held, nn.Module):
            return id(held)
        frame = frame.f_back
    return 0


def is_for_a_parameter() -> bool:
    """Whether a call comes from the making of a parameter, which then demands a tensor of the very same class."""
    frame = sys._getframe()
    for _ in range(_FRAMES):
        if frame.f_code is nn.Parameter.__new__.__code__:
            return True
        if frame.f_back is None:
            return False
        frame = frame.f_back
    return False


def away_in(value: Any) -> Iterator[torch.Tensor]:
    return (tensor for tensor in tensors_in(value) if type(tensor) is _AWAY.get(kind_of(tensor)))


def like_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return a tensor without memory that is laid out as a weight is at home."""
    server = server_of(tensor)
    return None if server is None else server.like_of(tensor)


class plain:
    """Has a tensor be of its own class for a while."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor
        self._kind: type = type(tensor)

    def __enter__(self) -> None:
        self._tensor.__class__ = kind_of(self._tensor)

    def __exit__(self, *error: object) -> None:
        self._tensor.__class__ = self._kind
