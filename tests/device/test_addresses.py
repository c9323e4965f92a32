"""Whether a device reads memory of the host where it lies: only where somebody names its address there."""

from __future__ import annotations

import ctypes
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from memplan.run.memory.page_lock import page_locked
from memplan.run.transfer import device as devices
from tests.device.backend import SIM


class Driver:
    """CUDA's driver, as far as it is asked. ``offset``: of its addresses from the host's; None: it names none."""

    def __init__(self, offset: int | None) -> None:
        self.asked: list[int] = []
        self._offset = offset

    def cuMemHostGetDevicePointer_v2(self, found, address, flags):
        self.asked.append(address.value)
        if self._offset is None:
            return 1
        found._obj.value = address.value + self._offset
        return 0


@pytest.mark.parametrize(("offset", "expected"), [(0, 0), (2**40, 2**40), (None, None)])
def test_cudas_driver_is_asked(offset, expected, policy, monkeypatch):
    """For the pages that were registered, of which a part is asked for. The call stands in for the driver's own."""
    driver = Driver(offset)
    monkeypatch.setattr(ctypes, "CDLL", {devices._DRIVER: driver}.__getitem__)
    monkeypatch.setattr(devices, "made_current", lambda device: nullcontext())
    held = page_locked(8192)
    part = held[512:1024]
    cuda = torch.device("cuda", 0)
    assert devices.reads(cuda, part) == (expected is not None)
    assert driver.asked == [held.data_ptr()]
    if expected is None:
        with pytest.raises(RuntimeError, match="does not read"):
            devices.mapped(cuda, part)
    else:
        view = devices._Pinned(part, devices._address_on(cuda, part))
        assert view.__cuda_array_interface__["data"] == (part.data_ptr() + expected, False)
    assert not devices.reads(cuda, torch.empty(4096, dtype=torch.uint8))


@pytest.mark.parametrize("library", [OSError("no such file"), SimpleNamespace()], ids=["no driver", "another"])
def test_without_a_driver_nothing_is_known_to_be_read(library, policy, monkeypatch):
    def load(name):
        if isinstance(library, Exception):
            raise library
        return library

    monkeypatch.setattr(ctypes, "CDLL", load)
    assert devices._named_by_driver(page_locked(4096).data_ptr()) is None


def test_another_kind_of_device_is_asked_too(policy, monkeypatch):
    part = page_locked(4096)
    assert devices.reads(SIM, part)
    monkeypatch.delattr(type(torch.sim), "host_device_pointer")
    assert not devices.reads(SIM, part)
