"""A fingerprint of all that a model is and holds, in depth, written apart from the way that memplan puts it back."""

from __future__ import annotations

import functools
import random
import types
from collections import deque
from enum import Enum

import numpy
import torch
from torch._subclasses.fake_tensor import FakeTensor

_LEFT_OUT = ("torch", "logging", "numpy", "builtins", "threading")


def fingerprint(*roots: object) -> dict[str, object]:
    """Return values by path: of each tensor its identity, bytes, version, flags and gradient; of each object its
    identity, attributes and state; of each function its shared variables and attributes; and the process's random
    states and settings.
    """
    found: dict[str, object] = {
        "torch": torch.get_rng_state().numpy().tobytes(),
        "python": random.getstate(),
        "numpy": repr(numpy.random.get_state()),
        "settings": (
            torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"), torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
        ),
    }  # fmt: skip
    seen: dict[int, object] = {}
    waiting = [(f"<{index}>", root) for index, root in enumerate(roots)]
    while waiting:
        path, value = waiting.pop()
        found[path] = _one(value)
        if id(value) in seen:
            continue
        seen[id(value)] = value
        waiting += [(f"{path}.{name}", part) for name, part in _parts(value)]
    return found


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    assert before.keys() == after.keys(), sorted(before.keys() ^ after.keys())[:5]
    changed = [path for path, value in before.items() if after[path] != value]
    assert not changed, changed[:5]


def _one(value):
    assert not isinstance(value, FakeTensor)
    if isinstance(value, torch.Tensor):
        contents = (
            None if value.device.type == "meta" else value.detach().contiguous().view(-1).view(torch.uint8).numpy()
        )
        grad = None if value.grad is None else (id(value.grad), value.grad.numpy().tobytes())
        version = None if value.is_inference() else value._version
        hooks = None if value._backward_hooks is None else list(value._backward_hooks)
        where = None if value.device.type == "meta" else value.data_ptr()
        return (
            id(value), type(value), None if contents is None else contents.tobytes(), value.dtype, tuple(value.shape),
            value.stride(), where, version, value.requires_grad, value.is_leaf, grad, hooks,
        )  # fmt: skip
    if isinstance(value, float):
        return repr(value)
    if isinstance(value, (bool, int, str, bytes, type(None), Enum, torch.dtype, torch.device)):
        return value
    if isinstance(value, torch.Generator):
        return id(value), value.get_state().numpy().tobytes()
    if isinstance(value, random.Random):
        return id(value), value.getstate()
    if isinstance(value, numpy.random.Generator):
        return id(value), repr(value.bit_generator.state)
    if isinstance(value, numpy.random.RandomState):
        return id(value), repr(value.get_state())
    if isinstance(value, numpy.ndarray):
        return id(value), value.tobytes(), value.flags.writeable
    if isinstance(value, (dict, list, tuple, set, frozenset, deque, bytearray)):
        return (id(value) if not isinstance(value, tuple) else 0), len(value)
    if hasattr(type(value), "__next__"):
        return id(value), repr(value.__reduce__()[1:]) if not isinstance(value, types.GeneratorType) else None
    return (id(value), type(value)) if not isinstance(value, types.MethodType) else type(value)


def _parts(value):
    if isinstance(value, dict):
        yield from ((f"{index}:{name!s:.40}", part) for index, (name, part) in enumerate(value.items()))
    elif isinstance(value, (list, tuple, deque)):
        yield from ((str(index), part) for index, part in enumerate(value))
    elif isinstance(value, (set, frozenset)):
        yield from ((str(index), part) for index, part in enumerate(sorted(value, key=repr)))
    elif isinstance(value, types.MethodType):
        yield from (("self", value.__self__), ("func", value.__func__))
    elif isinstance(value, functools.partial):
        yield from (("func", value.func), ("args", value.args), ("keywords", value.keywords))
    elif isinstance(value, types.FunctionType):
        cells = zip(value.__code__.co_freevars, value.__closure__ or (), strict=True)
        yield from ((f"cell {name}", cell.cell_contents) for name, cell in cells)
        yield from (("defaults", value.__defaults__), ("dict", value.__dict__))
        if not value.__module__.startswith(("torch", "transformers", "peft")):
            names = (name for name in value.__code__.co_names if name in value.__globals__)
            held = ((f"global {name}", value.__globals__[name]) for name in names)
            yield from ((name, part) for name, part in held if not isinstance(part, (types.ModuleType, type)))
    elif isinstance(value, type):
        if value.__module__.partition(".")[0] not in _LEFT_OUT:
            yield from ((n, v) for n, v in vars(value).items() if not n.startswith("__") and n != "_abc_impl")
    elif isinstance(value, torch.Tensor) or type(value).__module__.startswith("logging"):
        return
    else:
        if isinstance(getattr(value, "__dict__", None), dict):
            yield "dict", value.__dict__
        for kind in type(value).__mro__:
            slots = vars(kind).get("__slots__", ())
            for slot in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, slot):
                    yield f"slot {slot}", getattr(value, slot)
        yield "class", type(value)
