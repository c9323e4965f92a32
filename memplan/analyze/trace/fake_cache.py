"""Fake results made from memory: an operator on tensors of the same shapes makes tensors of the same shapes again.

A trace runs the same operators layer after layer. torch's own cache of fake results costs most of a trace: it asks far
more of each argument than one device, no symbols and no subclasses need. Views are taken of the fake's own memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._mode_utils import no_dispatch

_CPU = torch.device("cpu")
_PLAIN = (str, type(None), torch.dtype, torch.layout, torch.memory_format, torch.device)
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default
"""A view that does not say that it is one, of what nothing else sees any more."""
_UNFIT = (torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output, torch.Tag.inplace_view)

_Result = tuple[torch.Size, tuple[int, ...], torch.dtype] | None
"""Shape, strides and dtype of a tensor; None for none."""


class _UnfitError(Exception):
    """An argument's description does not tell all that a result may depend on."""


class Replay:
    """Runs operators on fake tensors, from memory where it can."""

    def __init__(self) -> None:
        self._fit: dict[Any, bool] = {}
        self._known: dict[tuple[object, ...], tuple[bool, tuple[_Result, ...]] | None] = {}
        """By operator and arguments: whether the result is a tuple, and its tensors; None where it cannot be made so.
        """

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func`` under the fake tensor mode that is active."""
        fit = self._fit.get(func)
        if fit is None:
            fit = self._fit[func] = _is_fit(func)
        if not fit:
            return func(*args, **kwargs)
        key: list[object] = [func]
        modes: list[FakeTensorMode] = []
        try:
            _describe(args, key.append, modes)
            for name, value in kwargs.items():
                key.append(name)
                _describe((value,), key.append, modes)
        except _UnfitError:
            return func(*args, **kwargs)
        if not modes:
            return func(*args, **kwargs)
        if func.is_view or func is _UNSAFE_VIEW:
            return _view(func, args, kwargs, modes[0])
        whole = tuple(key)
        if func._schema.is_mutable:  # what it writes to has its shape already, and no values
            if whole not in self._known:
                func(*args, **kwargs)
                self._known[whole] = None
            return args[0]
        if whole not in self._known:
            result = func(*args, **kwargs)
            self._known[whole] = _description(result, args)
            return result
        known = self._known[whole]
        if known is None:
            return func(*args, **kwargs)
        several, made = known
        results = tuple(None if one is None else _made(one, modes[0]) for one in made)
        return results if several else results[0]


def _is_fit(func: Any) -> bool:
    """Whether an operator only makes new tensors, of shapes that its arguments' shapes decide, or writes to its first
    argument alone.
    """
    schema = func._schema
    if func.namespace != "aten" or any(tag in func.tags for tag in _UNFIT) or not schema.returns:
        return False
    if schema.is_mutable:
        written = [argument for argument in schema.arguments if argument.is_write]
        return written == [schema.arguments[0]] and len(schema.returns) == 1 and schema.returns[0].is_write
    plain = all(str(one.type) == "Tensor" and one.alias_info is None for one in schema.returns)
    return (func.is_view or plain) and func is not torch.ops.aten.lift_fresh.default


def _describe(arguments: Any, tell: Callable[[object], None], modes: list[FakeTensorMode]) -> None:
    for value in arguments:
        kind = type(value)
        if kind is FakeTensor:
            if (
                value.constant is not None
                or value.fake_device != _CPU
                or value.is_sparse
                or value.is_conj()
                or value.is_neg()
            ):
                raise _UnfitError
            modes.append(value.fake_mode)
            tell((value.shape, value.stride(), value.dtype))
        elif kind in (int, float, bool):
            tell(kind)
            tell(value)
        elif kind in (list, tuple):
            tell(len(value))
            _describe(value, tell, modes)
        elif isinstance(value, _PLAIN):
            tell(value)
        else:
            raise _UnfitError


def _view(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], mode: FakeTensorMode) -> Any:
    with in_kernel_invocation_manager(mode):
        result = func(*args, **kwargs)
        if isinstance(result, (tuple, list)):
            return type(result)(FakeTensor(mode, one, _CPU) for one in result)
        return FakeTensor(mode, result, _CPU)


def _description(result: Any, args: tuple[Any, ...]) -> tuple[bool, tuple[_Result, ...]] | None:
    several = isinstance(result, (tuple, list))
    given = {tensor.untyped_storage()._cdata for tensor in args if isinstance(tensor, FakeTensor)}
    found: list[_Result] = []
    for one in result if several else (result,):
        if one is None:
            found.append(None)
            continue
        if type(one) is not FakeTensor or one.constant is not None or one.layout != torch.strided or one.device != _CPU:
            return None
        if one.untyped_storage()._cdata in given:  # a view that does not say that it is one
            return None
        described = (one.shape, one.stride(), one.dtype)
        with no_dispatch():
            again = torch.empty_strided(*described[:2], dtype=one.dtype, device="meta")
        if one.storage_offset() or again.untyped_storage().nbytes() != one.untyped_storage().nbytes():
            return None
        found.append(described)
    return several, tuple(found)


def _made(described: tuple[torch.Size, tuple[int, ...], torch.dtype], mode: FakeTensorMode) -> FakeTensor:
    shape, strides, dtype = described
    with no_dispatch():
        return FakeTensor(mode, torch.empty_strided(shape, strides, dtype=dtype, device="meta"), _CPU)
