"""The simulated device as torch's backend ``sim``: ``torch.sim`` and what tests ask of it.

Importing this builds and registers it, which must be before the first backward of the process. It is seen only within
:func:`present` (``torch.accelerator.is_available()``), so that other tests of the process run as without it.
"""

from __future__ import annotations

import contextlib
import ctypes
import types
from collections.abc import Iterator
from typing import Literal

import torch
import torch._meta_registrations  # the shape functions that are written in Python

from memplan import device_kinds
from tests.device.build import library

Policy = Literal["copies first", "compute first", "lazy"]
POLICIES: tuple[Policy, ...] = ("copies first", "compute first", "lazy")
EXTREMES: tuple[Policy, ...] = POLICIES[:2]
WAITS = ("stream", "event", "device", "copy", "value")
LIMIT_BYTES = 8 * 2**30
_memory = {"total": LIMIT_BYTES, "fraction": 1.0}

_PATH = library()
torch.ops.load_library(_PATH)
_sim = ctypes.CDLL(str(_PATH))
_sim.sim_pending.restype = _sim.sim_allocated.restype = _sim.sim_waits.restype = ctypes.c_int64
_sim.sim_waited.restype = _sim.sim_error.restype = ctypes.c_char_p
_sim.sim_limit.argtypes = [ctypes.c_int64]
_sim.sim_register.argtypes = [ctypes.c_void_p, ctypes.c_int64]
_sim.sim_unregister.argtypes = [ctypes.c_void_p]


class Sim(types.ModuleType):
    """``torch.sim``: what ``torch.cuda`` is for a GPU, as far as generic code asks for it."""

    Stream = torch.Stream
    Event = torch.Event

    @staticmethod
    def is_available() -> bool:
        return torch._C._accelerator_hooks_device_count() > 0

    @staticmethod
    def is_initialized() -> bool:
        return True

    @staticmethod
    def _is_in_bad_fork() -> bool:
        return False

    @staticmethod
    def device_count() -> int:
        return torch._C._accelerator_hooks_device_count()

    @staticmethod
    def current_device() -> int:
        return 0

    @staticmethod
    def set_device(device: object) -> None:
        pass

    @staticmethod
    def device(device: object) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @staticmethod
    def current_stream(device: object = None) -> torch.Stream:
        return torch.accelerator.current_stream("sim")

    @staticmethod
    def stream(stream: torch.Stream) -> torch.Stream:
        return stream  # a stream is its own context

    @staticmethod
    def synchronize(device: object = None) -> None:
        torch.accelerator.synchronize("sim")

    @staticmethod
    def manual_seed(seed: int) -> None:
        torch.ops.sim.seed(seed % 2**63)

    manual_seed_all = manual_seed

    @staticmethod
    def get_rng_state(device: object = None) -> torch.Tensor:
        return torch.ops.sim.rng_state()

    @staticmethod
    def set_rng_state(state: torch.Tensor, device: object = None) -> None:
        torch.ops.sim.set_rng_state(state)

    @staticmethod
    def get_rng_state_all() -> list[torch.Tensor]:
        return [torch.ops.sim.rng_state()]

    @staticmethod
    def set_rng_state_all(states: list[torch.Tensor]) -> None:
        torch.ops.sim.set_rng_state(states[0])

    @staticmethod
    def host_register(address: int, size_bytes: int) -> None:
        """Pin memory of the host, as ``cudaHostRegister``. Raises RuntimeError."""
        if _sim.sim_register(address, size_bytes):
            raise RuntimeError(_sim.sim_error().decode())

    @staticmethod
    def host_unregister(address: int) -> None:
        """Give pinned memory back. Raises RuntimeError, also where a copy of it was still under way."""
        if _sim.sim_unregister(address):
            raise RuntimeError(_sim.sim_error().decode())

    @staticmethod
    def is_current_stream_capturing() -> bool:
        return False  # it has no graphs

    @staticmethod
    def host_device_pointer(address: int) -> int | None:
        """Return the address by which the device has pinned memory of the host: the host's own."""
        return address

    @staticmethod
    def mapped(host: torch.Tensor) -> torch.Tensor:
        """Return pinned memory of the host as a tensor of the device, without a copy."""
        return torch.ops.sim.mapped(host)

    @staticmethod
    def get_amp_supported_dtype() -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    @staticmethod
    def empty_cache() -> None:
        torch.accelerator.empty_cache()

    @staticmethod
    def memory_allocated(device: object = None) -> int:
        return torch.accelerator.memory_allocated()

    @staticmethod
    def max_memory_allocated(device: object = None) -> int:
        return torch.accelerator.max_memory_allocated()

    @staticmethod
    def memory_reserved(device: object = None) -> int:
        return torch.accelerator.memory_reserved()

    @staticmethod
    def max_memory_reserved(device: object = None) -> int:
        return torch.accelerator.max_memory_reserved()

    @staticmethod
    def reset_peak_memory_stats(device: object = None) -> None:
        torch.accelerator.reset_peak_memory_stats()

    @staticmethod
    def mem_get_info(device: object = None) -> tuple[int, int]:
        total = _memory["total"]
        return max(0, total - torch.accelerator.memory_reserved()), total

    @staticmethod
    def set_per_process_memory_fraction(fraction: float, device: object = None) -> None:
        _memory["fraction"] = fraction
        _sim.sim_limit(int(fraction * _memory["total"]))

    @staticmethod
    def get_per_process_memory_fraction(device: object = None) -> float:
        return _memory["fraction"]


if torch._C._get_privateuse1_backend_name() != "sim":
    torch.utils.rename_privateuse1_backend("sim")
    torch._register_device_module("sim", Sim("torch.sim"))
    torch.utils.generate_methods_for_privateuse1_backend()

device_kinds.add("sim")

SIM = torch.device("sim", 0)


@contextlib.contextmanager
def present(policy: Policy = "copies first", *, limit_bytes: int = LIMIT_BYTES) -> Iterator[None]:
    """Have the device be there, its work in the order of ``policy``, with ``limit_bytes`` of memory beside what is
    allocated already.
    """
    _sim.sim_enable(1)
    _sim.sim_policy(POLICIES.index(policy))
    torch.sim.manual_seed(0)
    forget_waits()
    try:
        with limited(limit_bytes):
            yield
            torch.sim.synchronize()  # what failed late is heard
    finally:
        torch.sim.empty_cache()
        _sim.sim_enable(0)


@contextlib.contextmanager
def limited(limit_bytes: int) -> Iterator[None]:
    """Have the device have that much memory beside what is allocated already."""
    _memory["total"] = _sim.sim_allocated() + limit_bytes
    torch.sim.set_per_process_memory_fraction(1.0)
    try:
        yield
    finally:
        _memory["total"] = LIMIT_BYTES
        torch.sim.set_per_process_memory_fraction(1.0)


def waits() -> dict[str, int]:
    """How often the host waited for the device, by what for, since the last :func:`forget_waits`."""
    return {name: _sim.sim_waits(kind) for kind, name in enumerate(WAITS)}


def operators_waited() -> dict[str, int]:
    """Operators that waited for their result's shape or value, and how often."""
    lines = _sim.sim_waited().decode().splitlines()
    return {name: int(count) for name, count in (line.rsplit(" ", 1) for line in lines)}


def forget_waits() -> None:
    """Count from now on."""
    _sim.sim_forget_waits()


def pending() -> int:
    """Pieces of work that have not run."""
    return _sim.sim_pending()


def peek(tensor: torch.Tensor) -> torch.Tensor:
    """What lies in a tensor's memory now, whatever is still to run."""
    return torch.ops.sim.peek(tensor)
