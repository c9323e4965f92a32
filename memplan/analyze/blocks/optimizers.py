"""Bytes that an optimizer keeps for the trained parameters, and those it needs for a moment, by formula.

Names are those of transformers' ``optim`` where it has one, settings its libraries' defaults: no weight decay outside
of AdamW, no AMSGrad, SGD without momentum (``momentum`` is SGD with it). Both ways of torch count, its loop over single
tensors (the CPU) and ``foreach`` (CUDA), whichever needs more; ``adamw_foreach`` and ``adamw_fused`` are one way alone.

Paged states (bitsandbytes, ``paged_…``) count as on the device, which is an upper bound: where memory is short the
driver moves their pages to the host's, a few at a time. On the CPU bitsandbytes has no pages, and its 8-bit optimizers
work on float32 copies of one parameter at a time, which do not count; its CUDA kernels need none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from memplan.errors import InputError
from memplan.model.arguments import like

_STEP_BYTES = 4
"""A float32 scalar beside each parameter."""
_QUANTIZED_FROM = 4096
"""bitsandbytes keeps the state of smaller tensors in float32."""
_QUANTIZED_BLOCK = 256
"""Elements that share one float32 scale there."""
_CODE_BYTES = 4 * 256
"""What an 8-bit number stands for, in float32: one table for all parameters."""

Shape = tuple[tuple[int, ...], int]
"""Shape and bytes of an element."""
_Trained = Sequence[Shape]


@dataclass(frozen=True, slots=True)
class _Optimizer:
    state: Callable[[tuple[int, ...], int], int]
    """Bytes kept for one parameter of this shape and element size."""
    workspace: Callable[[_Trained], int]
    """Bytes of a moment for all of them."""
    tables: int = 0
    """Of ``_CODE_BYTES``, where any parameter's state is of 8 bits."""
    operators: int = 1
    """Run for each parameter, in a loop over them: for Adam the two moments (``lerp_``; ``mul_``, ``addcmul_``), the
    square root and its two operations, the step's own three: 9.
    """
    moves: int = 8
    """Times that those read or write a parameter's bytes, each operand once: about two for each operator, 20 for Adam.
    It only estimates the time of the step.
    """


# ---- what is kept ---------------------------------------------------------------------------------------------------


def _moments(count: int, step_bytes: int = _STEP_BYTES) -> Callable[[tuple[int, ...], int], int]:
    """torch's: ``count`` tensors like the parameter, in its dtype, and ``step_bytes`` for the number of the step."""
    return lambda shape, item_bytes: count * math.prod(shape) * item_bytes + step_bytes


def _moments_32bit(count: int) -> Callable[[tuple[int, ...], int], int]:
    """bitsandbytes': in float32 whatever the parameter is, the step a number of Python's."""
    return lambda shape, item_bytes: 4 * count * math.prod(shape)


def _moments_8bit(count: int) -> Callable[[tuple[int, ...], int], int]:
    def state(shape: tuple[int, ...], item_bytes: int) -> int:
        elements = math.prod(shape)
        if elements < _QUANTIZED_FROM:
            return 4 * count * elements
        return count * (elements + 4 * -(-elements // _QUANTIZED_BLOCK))

    return state


def _factored(shape: tuple[int, ...], item_bytes: int) -> int:
    """Sums over rows and columns instead of a full second moment (Shazeer and Stern, 2018): torch's, in the dtype."""
    return item_bytes * (_factors(shape) if len(shape) > 1 else math.prod(shape)) + _STEP_BYTES


def _factored_float32(shape: tuple[int, ...], item_bytes: int) -> int:
    """The same in transformers, in float32; in the place of the step it keeps the parameter's norm."""
    return _factored(shape, 4)


def _factors(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1]) + math.prod(shape[:-2]) * shape[-1]


# ---- what is there for a moment -------------------------------------------------------------------------------------


def _none(trained: _Trained) -> int:
    return 0


def _copies(count: int) -> Callable[[_Trained], int]:
    """``foreach``: so many copies of all."""
    return lambda trained: count * sum(_sizes(trained))


def _loop(count: int, trained: _Trained) -> int:
    """A loop: so many copies of one parameter, while one of the parameter before it is still alive."""
    largest, *others = sorted(_sizes(trained), reverse=True)
    return count * largest + max(others, default=0)


def _either(looped: int, copies: int) -> Callable[[_Trained], int]:
    return lambda trained: max(_loop(looped, trained), _copies(copies)(trained))


def _torch_adafactor(trained: _Trained) -> int:
    """One copy, and in a loop the sums over rows and columns anew, with foreach the means of the former."""
    sums = max((item * (_factors(s) + math.prod(s[:-2])) for s, item in trained if len(s) > 1), default=0)
    means = sum(item * math.prod(shape[:-2]) for shape, item in trained if len(shape) > 1)
    return max(_loop(1, trained) + sums, _copies(1)(trained) + means)


def _transformers_adafactor(trained: _Trained) -> int:
    """A loop in float32: the squared gradient twice beside the update before it, or the sums over rows and columns anew
    beside their product and the former; and of a parameter of 16 bits itself and its gradient.
    """
    peak = max(4 * math.prod(shape) * (4 if item < 4 else 2) for shape, item in trained)
    before = sorted((4 * math.prod(shape) for shape, _ in trained), reverse=True)[1:2]
    sums = max((4 * _factors(shape) for shape, _ in trained if len(shape) > 1), default=0)
    return peak + max(sums, *before, 0)


def _sizes(trained: _Trained) -> list[int]:
    return [math.prod(shape) * item_bytes for shape, item_bytes in trained]


# ---- all of them ----------------------------------------------------------------------------------------------------

_ADAM = _Optimizer(_moments(2), _either(2, 1), operators=9, moves=20)
_ADAM_FUSED = _Optimizer(_moments(2), _none)
_ADAM_32BIT = _Optimizer(_moments_32bit(2), _none)
_ADAM_8BIT = _Optimizer(_moments_8bit(2), _none, tables=2)
_ADEMAMIX_32BIT = _Optimizer(_moments_32bit(3), _none)
_ADEMAMIX_8BIT = _Optimizer(_moments_8bit(3), _none, tables=2)
_ONE_32BIT = _Optimizer(_moments_32bit(1), _none)
_ONE_8BIT = _Optimizer(_moments_8bit(1), _none, tables=1)

_OPTIMIZERS: dict[str, _Optimizer] = {
    "adam": _ADAM,
    "adamw": _ADAM,
    "adamw_hf": _ADAM,
    "adamw_torch": _ADAM,
    "adamw_foreach": _Optimizer(_moments(2), _copies(1), operators=9, moves=20),
    "adamw_fused": _ADAM_FUSED,
    "adamw_torch_fused": _ADAM_FUSED,
    "adamw_8bit": _ADAM_8BIT,
    "adamw_bnb_8bit": _ADAM_8BIT,
    "paged_adamw_8bit": _ADAM_8BIT,
    "paged_adamw_32bit": _ADAM_32BIT,
    "ademamix": _ADEMAMIX_32BIT,
    "ademamix_8bit": _ADEMAMIX_8BIT,
    "paged_ademamix_32bit": _ADEMAMIX_32BIT,
    "paged_ademamix_8bit": _ADEMAMIX_8BIT,
    "adafactor": _Optimizer(_factored_float32, _transformers_adafactor, operators=20, moves=24),
    "adafactor_torch": _Optimizer(_factored, _torch_adafactor, operators=16, moves=18),
    "adagrad": _Optimizer(_moments(1), _either(1, 2), operators=5, moves=13),
    "lion": _Optimizer(
        _moments(1, 0), lambda trained: _loop(2, trained), operators=6, moves=15
    ),  # of the package lion-pytorch
    "lion_32bit": _ONE_32BIT,
    "lion_8bit": _ONE_8BIT,
    "paged_lion_32bit": _ONE_32BIT,
    "paged_lion_8bit": _ONE_8BIT,
    "rmsprop": _Optimizer(_moments(1), _either(1, 1), operators=6, moves=15),
    "rmsprop_bnb": _ONE_32BIT,
    "rmsprop_bnb_32bit": _ONE_32BIT,
    "rmsprop_bnb_8bit": _ONE_8BIT,
    "momentum": _Optimizer(_moments(1, 0), _none, operators=2, moves=6),
    "sgd": _Optimizer(_moments(0, 0), _none, moves=3),
}


def check_optimizer(name: str) -> None:
    """Raise InputError where the optimizer is not known."""
    if name not in _OPTIMIZERS:
        raise InputError(
            f"the optimizer {name!r} is not known: give one of "
            f"{', '.join(sorted(_OPTIMIZERS))}{like(name, _OPTIMIZERS)}"
        )


def optimizer_name(given: str) -> str:
    """Return the name by which an optimizer is known here; case and hyphens do not matter. Raises InputError."""
    plain = given.strip().lower().replace("-", "_")
    name = given if given in _OPTIMIZERS else plain
    if name not in _OPTIMIZERS:
        name = next((one for one in _OPTIMIZERS if one.replace("_", "") == plain.replace("_", "")), given)
    check_optimizer(name)
    return name


def state_bytes(name: str, trained: Iterable[Shape]) -> int:
    """Return the bytes of an optimizer's state. ``trained``: shape and element size of each parameter."""
    optimizer, shapes = _OPTIMIZERS[name], list(trained)
    quantized = any(math.prod(shape) >= _QUANTIZED_FROM for shape, _ in shapes)
    return sum(optimizer.state(*shape) for shape in shapes) + quantized * optimizer.tables * _CODE_BYTES


def workspace_bytes(name: str, trained: Sequence[Shape]) -> int:
    """Return the bytes that are alive only within a step of the optimizer, at most."""
    return _OPTIMIZERS[name].workspace(trained) if trained else 0


def step_work(name: str, trained: Sequence[Shape]) -> tuple[int, int]:
    """Return the operators of a step in a loop over the parameters, and the bytes that they read and write, about."""
    optimizer = _OPTIMIZERS[name]
    return optimizer.operators * len(trained), optimizer.moves * sum(_sizes(trained))
