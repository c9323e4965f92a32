"""Values behind fake tensors: what a forward asks of masks, lengths and routings, answered without running it.

Fake tensors have no values, yet models ask for some: is the mask all ones, how many tokens went to this expert. So
integers that come from the batch are computed for real beside the trace, as long as everything that they come from is
known. A choice that rests on activations is made up: ``topk`` and its kin spread evenly (a balanced routing), a
truth value asked of activations is False, a number is 1; of random numbers see ``draws.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

from memplan.analyze.trace.draws import DRAWS, drawn
from memplan.analyze.trace.fake_cache import Replay

_MOST_ELEMENTS = 1 << 24
"""Values of larger tensors are not followed."""
_MOST_FLOATS = 1 << 20
"""The same for floating-point tensors, which are rarely asked for."""

_aten = torch.ops.aten
_ASKS = {_aten._local_scalar_dense.default, _aten.equal.default, _aten.is_nonzero.default}
_RECURRENT = _aten.mkldnn_rnn_layer.default
_UNCOUNTED = {_aten._cudnn_rnn.default, _aten.miopen_rnn.default}
"""Operators that keep memory of a size that only their library knows."""
_CHOICES = {
    _aten.topk,
    _aten.sort,
    _aten.argsort,
    _aten.argmax,
    _aten.argmin,
    _aten.multinomial,
}
_PLACES = {_aten.max, _aten.min, _aten.median, _aten.nanmedian, _aten.mode, _aten.kthvalue}
"""They tell where beside what, where they are given a dimension: the first place is within any."""
_FEW_ELEMENTS = 1 << 12
_FAULTS = {_aten.isnan.default, _aten.isinf.default}
"""Activations are taken to be sound."""
_SHAPED_BY_VALUES = {
    _aten.nonzero.default,
    _aten.masked_select.default,
    _aten._unique2.default,
    _aten.unique_dim.default,
    _aten.unique_consecutive.default,
    _aten.repeat_interleave.Tensor,
    _aten.bincount.default,
    _aten.index.Tensor,
}


def _recurrent(func: Any, args: tuple[Any, ...]) -> tuple[torch.Tensor, ...]:
    """Return what a layer of an LSTM makes on the CPU, with what it keeps for its backward: the fake one is empty."""
    found = func(*args)
    with unset_fake_temporarily(), torch.enable_grad():  # without gradients it keeps nothing
        zeros = (torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for v in args)
        kept = func(*zeros)[-1]
    return (*found[:-1], found[-1].new_empty(kept.shape))


def remember(fake: torch.Tensor, value: torch.Tensor) -> None:
    """Note what a fake tensor's values are."""
    limit = _MOST_FLOATS if value.dtype.is_floating_point or value.dtype.is_complex else _MOST_ELEMENTS
    if value.numel() <= limit:
        fake.__dict__["_memplan_value"] = value


def value_of(tensor: torch.Tensor) -> torch.Tensor | None:
    """Return what a tensor's values are, or None where they are not known. A real tensor is its own value."""
    if not isinstance(tensor, FakeTensor):
        return tensor if tensor.device.type == "cpu" else None
    found: torch.Tensor | None = tensor.__dict__.get("_memplan_value")
    return found if found is not None else tensor.constant


class Values:
    """Runs operators on fake tensors and keeps the values that are known beside them."""

    def __init__(self) -> None:
        self.assumed: set[str] = set()
        """Operators whose answer was made up."""
        self.uncounted: set[str] = set()
        """Operators that keep more for their backward than a trace sees."""
        self.decisions = 0
        """How often what runs next, or on how much, rested on values of activations."""
        self._replay = Replay()

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run ``func`` under the fake tensor mode that is active."""
        if func in _ASKS:
            return self._answer(func, args, kwargs)
        if func is _aten._grouped_mm.default and args[0].dtype is not torch.bfloat16:
            return _grouped_product(args[0], args[1], args[2])
        if func is _aten._ctc_loss.Tensor:
            return _ctc_loss(*args[:4])
        if func is _aten.sparse_mask.default:
            return _masked(args[0], args[1])
        if func is _RECURRENT:
            return _recurrent(func, args)
        if func in _UNCOUNTED:
            self.uncounted.add(func._overloadpacket.__name__)
        if func in _SHAPED_BY_VALUES and _depends(func, args):
            return self._shaped(func, args, kwargs)
        if func._overloadpacket in DRAWS:
            return self._draw(func, args, kwargs)
        writes = func._schema.is_mutable
        known = _with_values(args, kwargs) if writes or _may_matter(func, args, kwargs) else None
        result = self._replay.run(func, args, kwargs)
        if known is None:
            if writes:
                _forget(func, args)
            elif func._overloadpacket in _CHOICES:
                self._choose(func, result, args)
            elif func in _FAULTS and result.numel() <= _MOST_FLOATS:
                with unset_fake_temporarily():
                    remember(result, torch.zeros(result.shape, dtype=torch.bool))
            elif func._overloadpacket in _PLACES and isinstance(result, tuple) and result[1].numel() <= _FEW_ELEMENTS:
                with unset_fake_temporarily():
                    remember(result[1], torch.zeros(result[1].shape, dtype=result[1].dtype))
            return result
        with unset_fake_temporarily(), torch.no_grad():
            values = func(*known[0], **known[1])
        _remember_all(result, values)
        return result

    def _draw(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator that draws random numbers, and make them up."""
        result = self._replay.run(func, args, kwargs)
        with unset_fake_temporarily():
            values = drawn(func, args, kwargs, result)
        if values is None:
            _forget(func, args)
        elif isinstance(result, FakeTensor):
            remember(result, values)
        if result.numel() == 1:
            self.assumed.add(func._overloadpacket.__name__.rstrip("_"))
        return result

    def _answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        known = _with_values(args, kwargs)
        if known is not None:
            with unset_fake_temporarily():
                return func(*known[0], **known[1])
        self._decide(".item()")
        dtype = args[0].dtype
        if func is not _aten._local_scalar_dense.default or dtype is torch.bool:
            return False
        return 1.0 if dtype.is_floating_point else 1

    def _shaped(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operator whose output has as many elements as the values say."""
        invented = _with_values(args, kwargs, invent=True)
        assert invented is not None
        known = _with_values(args, kwargs) is not None
        if not known:
            self._decide(func._overloadpacket.__name__)
        with unset_fake_temporarily(), torch.no_grad():
            values = func(*invented[0], **invented[1])
        several = values if isinstance(values, tuple) else (values,)
        fakes = tuple(torch.empty(value.shape, dtype=value.dtype, device="cpu") for value in several)
        if known or func is not _aten.index.Tensor:
            _remember_all(fakes, several)
        return fakes if isinstance(values, tuple) else fakes[0]

    def _choose(self, func: Any, result: Any, args: tuple[Any, ...]) -> None:
        """Make up the indices of a choice: every index equally often."""
        indices = result[-1] if isinstance(result, (tuple, list)) else result
        source = args[0]
        dim = next((a for a in args[1:] if isinstance(a, int) and not isinstance(a, bool)), -1)
        if func._overloadpacket in (_aten.topk, _aten.multinomial):
            dim = args[2] if len(args) > 2 and func._overloadpacket is _aten.topk else -1
        size = source.shape[dim] if source.dim() else 1
        if indices.numel() <= _MOST_ELEMENTS and not indices.dtype.is_floating_point:
            with unset_fake_temporarily():
                value = (torch.arange(indices.numel()) % max(1, size)).reshape(indices.shape)
            self._decide(func._overloadpacket.__name__)
            remember(indices, value)

    def _decide(self, name: str) -> None:
        self.assumed.add(name)
        self.decisions += 1


def _grouped_product(left: torch.Tensor, right: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Return what a grouped product makes: torch's rule for fake tensors knows bfloat16 only, its kernels more."""
    if left.dim() == 2 and right.dim() == 2:
        return left.new_empty(offsets.shape[0], left.shape[0], right.shape[1])
    return left.new_empty(*left.shape[:-1], right.shape[-1])


def _ctc_loss(
    log_probs: torch.Tensor, targets: torch.Tensor, input_lengths: torch.Tensor, target_lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a CTC loss and what its backward needs: for each position the target's tokens and the blanks about
    them.
    """
    lengths = value_of(target_lengths)
    with unset_fake_temporarily():
        longest = int(lengths.max()) if lengths is not None else targets.shape[-1]
    positions, rows = log_probs.shape[0], log_probs.shape[1]
    return log_probs.new_empty(rows), log_probs.new_empty(rows, positions, 2 * longest + 1)


def _masked(dense: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return a dense tensor where a sparse one has elements: torch's rule for fake tensors has none of them."""
    indices = _aten._indices.default(mask)
    values = dense.new_empty((indices.shape[1], *dense.shape[mask.sparse_dim() :]))
    made: torch.Tensor = _aten._sparse_coo_tensor_with_dims_and_tensors.default(
        mask.sparse_dim(), mask.dense_dim(), dense.shape, indices, values, dtype=dense.dtype, layout=torch.sparse_coo
    )
    return made


def _may_matter(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether values are worth following: not of random numbers, and of integers where nothing goes in."""
    if torch.Tag.nondeterministic_seeded in func.tags:
        return False
    if any(isinstance(a, (torch.Tensor, list, tuple)) for a in args):
        return True
    dtype = kwargs.get("dtype")
    if dtype is None:
        return func._overloadpacket is _aten.arange and all(type(a) is int for a in args)
    return not dtype.is_floating_point


def _depends(func: Any, args: tuple[Any, ...]) -> bool:
    """Whether the output's shape rests on values here: ``index`` only does with a mask among its indices."""
    if func is not _aten.index.Tensor:
        return True
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])


def _with_values(
    args: tuple[Any, ...], kwargs: dict[str, Any], *, invent: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Return the arguments with values in place of tensors, or None where one is not known (and not to be made up)."""
    try:
        return tuple(_value(a, invent) for a in args), {k: _value(v, invent) for k, v in kwargs.items()}
    except KeyError:
        return None


def _value(argument: Any, invent: bool) -> Any:
    if isinstance(argument, torch.Tensor):
        found = value_of(argument)
        if found is not None:
            return found
        if not invent:
            raise KeyError
        with unset_fake_temporarily():
            return torch.ones(argument.shape, dtype=argument.dtype)
    if isinstance(argument, (list, tuple)):
        return type(argument)(_value(part, invent) for part in argument)
    return argument


def _remember_all(result: Any, values: Any) -> None:
    if isinstance(result, torch.Tensor):
        if isinstance(values, torch.Tensor) and values.shape == result.shape and isinstance(result, FakeTensor):
            remember(result, values)
    elif isinstance(result, (tuple, list)):
        for one, value in zip(result, values, strict=True):
            _remember_all(one, value)


def _forget(func: Any, args: tuple[Any, ...]) -> None:
    """What an operator wrote to from unknown values is unknown."""
    for argument, described in zip(args, func._schema.arguments, strict=False):
        if described.alias_info is not None and described.alias_info.is_write:
            for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
                if isinstance(tensor, FakeTensor):
                    tensor.__dict__.pop("_memplan_value", None)
