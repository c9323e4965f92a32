"""What of a process a forward may change beside its model: random states, settings of torch's, the environment."""

from __future__ import annotations

import _random
import contextlib
import ctypes
import os
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch


class RandomStates:
    """The states of torch's generators, an accelerator's among them, NumPy's and Python's, when this is made."""

    def __init__(self) -> None:
        self._python = random.getstate()
        numpy: Any = sys.modules.get("numpy")
        self._numpy = None if numpy is None else (numpy.random.set_state, numpy.random.get_state())
        self._cpu = torch.get_rng_state()
        devices: Any = torch.get_device_module() if torch.accelerator.is_available() else None
        is_used = hasattr(devices, "get_rng_state_all") and devices.is_initialized()
        self._devices = (devices.set_rng_state_all, devices.get_rng_state_all()) if is_used else None

    def restore(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._cpu)
        for kept in (self._numpy, self._devices):
            if kept is not None:
                put, states = kept
                put(states)


@contextlib.contextmanager
def random_states_kept() -> Iterator[None]:
    """Leave torch's, NumPy's and Python's random states as they were."""
    states = RandomStates()
    try:
        yield
    finally:
        states.restore()


_HEADER_BYTES = object.__basicsize__
_PYTHONS_BYTES = _random.Random.__basicsize__ - _HEADER_BYTES
_NUMPYS_BYTES = 4 * (624 + 1)
"""What its MT19937 holds: the numbers, and at which it is."""


def positions() -> tuple[object, ...]:
    """Return what is another once Python's or NumPy's own generator has drawn.

    In a hundredth of what ``getstate`` takes: it is asked for around each layer that is run again.
    """
    python: Any = random.__dict__["_inst"]
    numpy: Any = sys.modules.get("numpy.random.mtrand")
    numpys: Any = None
    if numpy is not None:
        generator = numpy._rand._bit_generator
        address = generator.ctypes.state_address if type(generator).__name__ == "MT19937" else 0
        numpys = ctypes.string_at(address, _NUMPYS_BYTES) if address else str(generator.state)
    return ctypes.string_at(id(python) + _HEADER_BYTES, _PYTHONS_BYTES), numpys


def kernels() -> tuple[bool, bool, bool, bool, str]:
    """Return which attention kernels torch may take, and how precise products of float32 are."""
    cuda = torch.backends.cuda
    allowed = (
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
        cuda.math_sdp_enabled(),
        cuda.cudnn_sdp_enabled(),
    )
    return (*allowed, torch.get_float32_matmul_precision())


def settings() -> tuple[object, ...]:
    """Return torch's settings that the whole process shares, by which the same call may compute another result."""
    cudnn = torch.backends.cudnn
    return (
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.is_anomaly_enabled(),
        torch.is_anomaly_check_nan_enabled(),
        cudnn.enabled,
        cudnn.benchmark,
        cudnn.deterministic,
        *kernels(),
    )


@contextlib.contextmanager
def settings_kept() -> Iterator[None]:
    """Leave what of torch's settings a forward may change, and the environment, as they were."""
    environment = dict(os.environ)
    dtype, precision = torch.get_default_dtype(), torch.get_float32_matmul_precision()
    strict, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    cudnn: Any = torch.backends.cudnn
    flags = {name: getattr(cudnn, name) for name in ("enabled", "benchmark", "deterministic")}
    try:
        yield
    finally:
        if os.environ != environment:
            os.environ.clear()
            os.environ.update(environment)
        if torch.get_default_dtype() != dtype:
            torch.set_default_dtype(dtype)
        if torch.get_float32_matmul_precision() != precision:
            torch.set_float32_matmul_precision(precision)
        if (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()) != (
            strict, warns,
        ):  # fmt: skip
            torch.use_deterministic_algorithms(strict, warn_only=warns)
        for name, value in flags.items():
            if getattr(cudnn, name) != value:
                setattr(cudnn, name, value)
