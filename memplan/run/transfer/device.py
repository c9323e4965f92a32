"""What memplan asks of a device with streams and memory of its own: the one file of ``run`` that knows a vendor.

The rest goes by ``torch.Stream``, ``torch.Event`` and the device's own module, which CUDA, ROCm (as ``cuda``) and XPU
share. They differ in how memory of the host is pinned where it lies, and read by kernels where it lies. CUDA is what
memplan is made for; the others are untested. In tests a simulated device stands for it (``tests/device``).
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from memplan import device_kinds


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
    """Return the stream to which this thread's kernels go."""
    stream: torch.Stream = _module(device).current_stream(device)
    return stream


def made_current(device: torch.device) -> AbstractContextManager[Any]:
    """Have ``device`` be this thread's own, which is the first of its kind otherwise."""
    context: AbstractContextManager[Any] = _module(device).device(device)
    return context


def synchronize(device: torch.device) -> None:
    """Return when all that was enqueued on a device is done. Nothing is to be waited for on the CPU."""
    if is_apart(device):
        _module(device).synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Return the most bytes that torch has had allocated on a device so far."""
    return int(_module(device).max_memory_allocated(device))


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
            torch.cuda.check_error(torch.cuda.cudart().cudaHostRegister(address, size_bytes, 0))
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
    """Whether kernels of a device read ``part``, memory of the host, where it lies."""
    if not is_apart(device):
        return True
    return part.is_pinned() and (device.type == "cuda" or hasattr(_module(device), "mapped"))


def mapped(device: torch.device, part: torch.Tensor) -> torch.Tensor:
    """Return pinned memory of the host (uint8, one dimension) as a tensor of the device, without a copy."""
    with torch.inference_mode(False), torch.no_grad():
        if device.type == "cuda":
            return torch.as_tensor(_Pinned(part), device=device)
        tensor: torch.Tensor = _module(device).mapped(part)
        return tensor


class _Pinned:
    """Pinned memory as CUDA's array interface has it: with unified addresses a device reads it where it lies."""

    def __init__(self, part: torch.Tensor) -> None:
        self._part = part  # the tensor that is made of this holds it
        self.__cuda_array_interface__ = {
            "shape": (part.numel(),),
            "typestr": "|u1",
            "data": (part.data_ptr(), False),
            "strides": None,
            "version": 3,
        }


def _module(device: torch.device) -> Any:
    return torch.get_device_module(device)
