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
