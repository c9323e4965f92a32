"""A model's tensors replaced by fake ones on the CPU for a while: shapes and dtypes without memory, nothing loaded.

The module objects stay the same, so hooks and names hold; on the way out every module is what it was, whatever a
forward left in it.
"""

from __future__ import annotations

import contextlib
import copy
import random
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from memplan.analyze.values import remember
from memplan.weights import Weight, frozen_weights, is_quantized, is_quantizer_state, is_wrapper, rewrapped


@contextlib.contextmanager
def faked(model: nn.Module, mode: FakeTensorMode) -> Iterator[dict[int, torch.Tensor]]:
    """Have fake tensors in place of all parameters, buffers and tensors in attributes, in training mode.

    Gives the fake tensor of each parameter and buffer by the real one's id. The model is restored on any way out.
    """
    modules = list(model.modules())
    saved = [_Saved(module) for module in modules]
    stand_ins = _StandIns(mode)
    try:
        # A fake tensor records nothing of its making; grads off, lest a user's graph grow by our views.
        with torch.no_grad():
            for weight in frozen_weights("", model, deep=True):
                stand_ins.of_weight(weight)
            for module in modules:
                for held in (module._parameters, module._buffers):
                    for name, tensor in held.items():
                        if tensor is not None:
                            held[name] = stand_ins.of(tensor)
                for name, value in list(module.__dict__.items()):
                    if isinstance(value, torch.Tensor) or is_quantizer_state(value):
                        module.__dict__[name] = stand_ins.of(value)
                _refresh_recurrent(module)
                module.__dict__["_apply"] = partial(_apply_where_it_changes, module)
        model.train()
        yield stand_ins.fakes
    finally:
        for state in saved:
            state.restore()


class _StandIns:
    """Fake tensors, and quantizers' states that hold fake tensors, each made once."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self.fakes: dict[int, torch.Tensor] = {}
        """By the id of the real tensor."""
        self._states: dict[int, Any] = {}
        self._mode = mode

    def of(self, value: Any) -> Any:
        """Return what stands in for a tensor or a quantizer's state."""
        if not isinstance(value, torch.Tensor):
            return self._of_state(value)
        found = self.fakes.get(id(value))
        if found is None:
            if is_wrapper(value):
                found = rewrapped(value, self.of)
                if isinstance(value, nn.Parameter):
                    found = nn.Parameter(found, requires_grad=value.requires_grad)
            else:
                found = fake_of(value, self._mode)
            self.fakes[id(value)] = found
        if is_quantized(value) and id(value) not in self._states:
            self._states[id(value)] = found
            self._hold(value, found)
        return found

    def of_weight(self, weight: Weight) -> None:
        """Make the fake of a frozen weight, without values, and have its twins share its memory."""
        fake = self.fakes.get(id(weight.tensor))
        if fake is None:
            fake = self.fakes[id(weight.tensor)] = fake_of(weight.tensor, self._mode, valued=False)
        for twin in weight.twins:
            self.fakes.setdefault(id(twin), fake.detach())

    def _of_state(self, state: Any) -> Any:
        found = self._states.get(id(state))
        if found is None:
            found = self._states[id(state)] = copy.copy(state)
            self._hold(state, found)
        return found

    def _hold(self, value: Any, stand_in: Any) -> None:
        for name, kept in list(value.__dict__.items()):
            if isinstance(kept, torch.Tensor) or is_quantizer_state(kept):
                stand_in.__dict__[name] = self.of(kept)
            elif isinstance(value, torch.Tensor):
                stand_in.__dict__[name] = kept


def fake_of(tensor: torch.Tensor, mode: FakeTensorMode, *, valued: bool = True) -> torch.Tensor:
    """Return a fake tensor on the CPU of the same shape, strides and dtype, a parameter for a parameter.

    ``valued``: small values of integers are remembered, since a forward may ask for them (masks, lengths).
    """
    expanded = any(stride == 0 for stride in tensor.stride()) and tensor.numel() > 1
    with mode:
        if expanded:
            made = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        else:
            made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="cpu")
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(made, requires_grad=tensor.requires_grad)
    if valued and not tensor.dtype.is_floating_point and not tensor.dtype.is_complex:
        known = tensor.device.type != "meta" and type(tensor) in (torch.Tensor, nn.Buffer)
        # Of a tensor without values: ones, so that a mask is a mask of everything.
        remember(made, tensor.detach().cpu() if known else torch.ones(tensor.shape, dtype=tensor.dtype))
    return made


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave torch's, NumPy's and Python's random states as they were."""
    python = random.getstate()
    numpy: Any = sys.modules.get("numpy")
    numpys = numpy.random.get_state() if numpy is not None else None
    cpu = torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None
    try:
        yield
    finally:
        random.setstate(python)
        if numpy is not None:
            numpy.random.set_state(numpys)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)


@contextlib.contextmanager
def eager_transformers() -> Iterator[None]:
    """Have transformers take the ways of a real run.

    It asks whether a mask is a fake tensor and then keeps masks that a run drops; values that it needs are known here.
    """
    utils: Any = sys.modules.get("transformers.utils.import_utils")
    asked = getattr(utils, "is_fake_tensor", None)
    if asked is None:
        yield
        return
    utils.is_fake_tensor = lambda tensor: False
    try:
        yield
    finally:
        utils.is_fake_tensor = asked


@contextlib.contextmanager
def numbers_in_text() -> Iterator[None]:
    """Have a fake tensor of one number written out in an f-string as a real one is: experts are found by such names."""

    def written(tensor: torch.Tensor, spec: str) -> str:
        return format(tensor.item(), spec) if tensor.dim() == 0 else object.__format__(tensor, spec)

    had = FakeTensor.__dict__.get("__format__")
    FakeTensor.__format__ = written  # type: ignore[method-assign]
    try:
        yield
    finally:
        if had is None:
            del FakeTensor.__format__
        else:
            FakeTensor.__format__ = had  # type: ignore[method-assign]


class _Saved:
    """A module's attributes, and what its lists and mappings held."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._attributes = dict(module.__dict__)
        self._mappings = [(v, dict(v)) for v in self._attributes.values() if isinstance(v, dict)]
        self._lists = [(v, list(v)) for v in self._attributes.values() if isinstance(v, list)]

    def restore(self) -> None:
        attributes = self._module.__dict__
        if not _same(attributes, self._attributes):
            attributes.clear()
            attributes.update(self._attributes)
        for mapping, held in self._mappings:
            if not _same(mapping, held):
                mapping.clear()
                mapping.update(held)
        for values, items in self._lists:
            if len(values) != len(items) or any(a is not b for a, b in zip(values, items, strict=True)):
                values[:] = items


def _same(mapping: dict[Any, Any], held: dict[Any, Any]) -> bool:
    return len(mapping) == len(held) and all(
        a is b and v is w for (a, v), (b, w) in zip(mapping.items(), held.items(), strict=True)
    )


def _apply_where_it_changes(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
    """Stand for ``_apply``: torch would swap a fake parameter even with itself, which our weak references forbid.

    Routers have a forward that casts them to the dtype that they have.
    """
    own = [tensor for held in (module._parameters, module._buffers) for tensor in held.values() if tensor is not None]
    with torch.no_grad():
        changed = any(moved.dtype != tensor.dtype for tensor in own for moved in (fn(tensor),))
    if changed:
        return type(module)._apply(module, fn, recurse)
    for child in module.children() if recurse else ():
        child._apply(fn)
    return module


def _refresh_recurrent(module: nn.Module) -> None:
    """A recurrent module keeps its weights in a list besides."""
    if isinstance(module, nn.RNNBase):
        module.__dict__["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]
