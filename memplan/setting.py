"""What a forward computes with beside its arguments, kept for the time that it runs once more in backward.

A layer that memplan recomputes runs a second time when the script is elsewhere: a context that was around the forward is
left (``sdpa_kernel``, ``disable_adapter``, ``torch.func.functional_call``), the model was switched to evaluation, an
adapter's scaling was changed. Without memplan the layer runs once. So the second time it is given what it had the first;
where that is gone (a weight that was written to since), it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from memplan.errors import RunError

_ATTRIBUTES = ("_disable_adapters", "_active_adapter", "scaling")
"""Of PEFT's layers."""


class Setting:
    """The settings of one module's forwards."""

    def __init__(self, name: str, module: nn.Module, writes: Callable[[], int]) -> None:
        """``writes``: how often frozen weights of it were written to so far."""
        self._name = name
        self._modules = tuple(module.modules())
        self._tuners = tuple(m for m in self._modules if hasattr(type(m), "adapter_layer_names"))
        self._writes = writes

    def now(self) -> Callable[[], Any]:
        """Return a context in which all is as it is now. Entering it raises RunError where that cannot be."""
        training = [module.training for module in self._modules]
        parameters = [tuple(module._parameters.items()) for module in self._modules]
        adapters = [
            {name: _own(tuner.__dict__[name]) for name in _ATTRIBUTES if name in tuner.__dict__}
            for tuner in self._tuners
        ]
        kernels, writes = _kernels(), self._writes()
        trained = [p for held in parameters for _, p in held if p is not None and p.requires_grad]
        versions = [(p._version, p.data_ptr()) for p in trained]
        flags = [(p, p.requires_grad) for tuner in self._tuners for p in tuner.parameters() if p.is_leaf]

        @contextmanager
        def again() -> Iterator[None]:
            if [(p._version, p.data_ptr()) for p in trained] != versions or self._writes() != writes:
                raise RunError(
                    f"weights of {self._name} were written to between its forward and its backward, in which the plan runs it once "
                    'more: write to them after backward(), or plan with activations="keep"'
                )
            had_training = [module.training for module in self._modules]
            had_adapters = [
                {name: tuner.__dict__.get(name) for name in kept}
                for tuner, kept in zip(self._tuners, adapters, strict=True)
            ]
            had_kernels = _kernels()
            others = [
                (module._parameters, dict(module._parameters), held)
                for module, held in zip(self._modules, parameters, strict=True)
                if not _same(module._parameters, held)
            ]
            trained_now = [(p, p.requires_grad) for p, flag in flags if p.requires_grad != flag]
            try:
                for parameter, is_trained in trained_now:
                    parameter.requires_grad_(not is_trained)
                for module, mode in zip(self._modules, training, strict=True):
                    module.training = mode
                for registered, _, held in others:
                    registered.clear()
                    registered.update(held)
                for tuner, attributes in zip(self._tuners, adapters, strict=True):
                    tuner.__dict__.update(attributes)
                _set_kernels(kernels)
                yield
            finally:
                _set_kernels(had_kernels)
                for parameter, is_trained in trained_now:
                    parameter.requires_grad_(is_trained)
                for tuner, attributes in zip(self._tuners, had_adapters, strict=True):
                    tuner.__dict__.update(attributes)
                for registered, before, _ in others:
                    registered.clear()
                    registered.update(before)
                for module, mode in zip(self._modules, had_training, strict=True):
                    module.training = mode

        return again


def _same(registered: dict[str, Any], held: tuple[tuple[str, Any], ...]) -> bool:
    return len(registered) == len(held) and all(registered.get(name) is value for name, value in held)


def _own(value: Any) -> Any:
    """Return a copy of a list or a dict: what is changed in place must not change here."""
    return type(value)(value) if isinstance(value, (list, dict)) else value


def _kernels() -> tuple[bool, bool, bool, bool, str]:
    cuda = torch.backends.cuda
    allowed = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    return (*allowed, torch.get_float32_matmul_precision())


def _set_kernels(given: tuple[bool, bool, bool, bool, str]) -> None:
    if given == _kernels():
        return
    flash, efficient, math, cudnn, precision = given
    torch.backends.cuda.enable_flash_sdp(flash)
    torch.backends.cuda.enable_mem_efficient_sdp(efficient)
    torch.backends.cuda.enable_math_sdp(math)
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
    torch.set_float32_matmul_precision(precision)
