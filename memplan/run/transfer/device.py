"""What memplan asks of a device with streams and memory of its own: the one file of ``run`` that knows a vendor.

The rest goes by ``torch.Stream``, ``torch.Event`` and the device's own module, which CUDA, ROCm (as ``cuda``) and XPU
share. They differ in how memory of the host is pinned where it lies, and read by kernels where it lies. CUDA is what
memplan is made for; the others are untested. In tests a simulated device stands for it (``tests/device``).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from memplan import device_kinds

_MAPPED = 2
"""``cudaHostRegisterMapped``, which is without effect where a device cannot have it."""
_DRIVER = "libcuda.so.1"


def is_apart(device: torch.device) -> bool:
    """Whether a device has memory and streams of its own; else it is the CPU, whose memory is the host's."""
    return device_kinds.is_apart(device.type)


def chosen(kind: str) -> torch.device | None:
    """Return the current device of a kind that plans are made for, or None where torch sees none of it."""
    if not device_kinds.is_apart(kind):
        return torch.device(kind)
    try:
        module: Any = torch.get_device_module(kind)
    except RuntimeError:  # of a package that is not imported
        return None
    return torch.device(kind, module.current_device()) if module.is_available() else None


def current_stream(device: torch.device) -> torch.Stream:
    """Return the stream to which this thread's kernels go. Asked in every access: what torch.accelerator asks."""
    stream: torch.Stream = torch._C._accelerator_getStream(device.index)
    return stream


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Have ``device`` be this thread's own, which is the first of its kind otherwise."""
    context: AbstractContextManager[Any] = _module(device).device(device)
    return context


def synchronize(device: torch.device) -> None:
    """Return when all that was enqueued on a device is done. Nothing is to be waited for on the CPU."""
    if is_apart(device):
        _module(device).synchronize(device)


def reset_peaks(device: torch.device) -> None:
    """Have :func:`peak_bytes` count from now on."""
    if is_apart(device):
        _module(device).reset_peak_memory_stats(device)


def capture_check(device: torch.device) -> Callable[[], bool] | None:
    """Return what says whether this thread's kernels are captured for a graph; None where a device has no graphs."""
    found: Callable[[], bool] | None = getattr(_module(device), "is_current_stream_capturing", None)
    return found if is_apart(device) else None


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """Return the most bytes that torch has had allocated on a device, and in reserve for it, since the last reset."""
    module = _module(device)
    return int(module.max_memory_allocated(device)), int(module.max_memory_reserved(device))


def reserved_bytes(device: torch.device) -> int:
    """Return what torch has of a device now, allocated or cached."""
    return int(_module(device).memory_reserved(device))


def total_bytes(device: torch.device) -> int:
    """Return the memory of a device."""
    return int(_module(device).mem_get_info(device)[1])


def memory_share(device: torch.device) -> float | None:
    """Return the share of a device's memory that torch may have in reserve; None where that cannot be limited."""
    read = getattr(_module(device), "get_per_process_memory_fraction", None)
    return None if read is None else float(read(device))


def limit_memory(device: torch.device, share: float) -> None:
    """Have torch reserve no more than that share: beyond it gives back what it caches, then raises out of memory."""
    _module(device).set_per_process_memory_fraction(share, device)


def empty_cache(device: torch.device) -> None:
    """Have torch give back what it has in reserve on a device."""
    if is_apart(device):
        _module(device).empty_cache()


def pinning() -> torch.device:
    """Return the device for which memory of the host is pinned. Raises RuntimeError where there is none."""
    if not torch.accelerator.is_available():
        raise RuntimeError("torch sees no GPU")
    found = torch.accelerator.current_accelerator()
    assert found is not None
    return torch.device(found.type, torch.accelerator.current_device_index())


def pins_pages(device: torch.device) -> bool:
    """Whether pages of memplan's own can be pinned for a device; else torch allocates what is pinned."""
    return device.type == "cuda" or hasattr(_module(device), "host_register")


def pin_pages(device: torch.device, address: int, size_bytes: int) -> None:
    """Pin pages. Raises RuntimeError where the driver refuses."""
    with made_current(device):
        if device.type == "cuda":
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size_bytes, _MAPPED))
        else:
            _module(device).host_register(address, size_bytes)


def unpin_pages(device: torch.device, address: int) -> None:
    """Let pages go, once no copy is under way: one of an optimizer's state may be, though transfers are closed before
    arenas go.
    """
    with made_current(device):
        synchronize(device)
        if device.type == "cuda":
            torch.cuda.check_error(torch.cuda.cudart().cudaHostUnregister(address))
        else:
            _module(device).host_unregister(address)


def reads(device: torch.device, part: torch.Tensor) -> bool:
    """Whether kernels of a device are known to read ``part``, memory of the host, where it lies."""
    return not is_apart(device) or (part.is_pinned() and _address_on(device, part) is not None)


def mapped(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    """Return memory of the host that a device reads (uint8, one dimension) as a tensor of the device, without a
    copy.
    """
    with torch.inference_mode(False), torch.no_grad():
        if device.type == "cuda":
            return torch.as_tensor(_Pinned(part, _address_on(device, part)), device=device)
        tensor: torch.Tensor = _module(device).mapped(part)
        return tensor


def _address_on(device: torch.device, part: torch.Tensor) -> int | None:
    """Return the address by which a device has pinned memory of the host, which need not be the host's; None where the
    driver names none, or there is none to ask.
    """
    begin = part.untyped_storage().data_ptr()  # of the pages that were registered
    with made_current(device):
        if device.type == "cuda":
            found = _named_by_driver(begin)
        else:
            ask = getattr(_module(device), "host_device_pointer", None)
            found = None if ask is None else ask(begin)
    return None if found is None else found + part.data_ptr() - begin


def _named_by_driver(address: int) -> int | None:
    """Ask CUDA's driver, since torch's ``cudart`` has no ``cudaHostGetDevicePointer``. ROCm has no such library."""
    try:
        ask = ctypes.CDLL(_DRIVER).cuMemHostGetDevicePointer_v2
    except (OSError, AttributeError):
        return None
    found = ctypes.c_uint64()
    failed = ask(ctypes.byref(found), ctypes.c_void_p(address), ctypes.c_uint(0))
    return None if failed or not found.value else found.value


class _Pinned:
    """Pinned memory as CUDA's array interface has it, by its address on the device."""

    def __init__(self, part: torch.Tensor, address: int | None) -> None:
        if address is None:
            raise RuntimeError("the device does not read this memory of the host where it lies")
        self._part = part  # the tensor that is made of this holds it
        self.__cuda_array_interface__ = {
            "shape": (part.numel(),),
            "typestr": "|u1",
            "data": (address, False),
            "strides": None,
            "version": 3,
        }


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
