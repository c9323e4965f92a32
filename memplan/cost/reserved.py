"""What a CUDA device reserves beyond what is alive: lines of their own, each with the source of its constants.

Budgets and peaks are of live bytes and the context; these are what the driver's own tools, and torch's *reserved*
figure, show besides. On a CPU there are none.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from memplan.analyze.graph import LayerGraph
from memplan.cost.table import Reserved
from memplan.model.caching_allocator import CachingAllocator
from memplan.units import MIB

if TYPE_CHECKING:
    from memplan.hardware.profile import HardwareProfile

WORKSPACE_BYTES = 4096 * 1024 * 2 + 16 * 1024 * 8
"""Of cuBLAS by handle and stream, unless ``CUBLAS_WORKSPACE_CONFIG`` says otherwise: ``:4096:2:16:8`` (torch's notes on
CUDA semantics; ``aten/src/ATen/cuda/CublasHandlePool.cpp``)."""

HOPPER_WORKSPACE_BYTES = 32 * MIB
"""The same from compute capability 9.0 on: ``:4096:8``."""

HANDLES = 2
"""The thread of the forward has one, the thread of autograd's backward another."""

_HOPPER_ON = ("h100", "h200", "b200", "b300", "gh200")
"""Beginnings of the names of profiles of such cards."""


def reserved(graph: LayerGraph, hardware: HardwareProfile) -> tuple[Reserved, ...]:
    """Return the lines of a pass on a device; none where it is no CUDA device. Frozen weights are taken to lie in one
    arena: loaded one by one they have a line of :func:`rounding_bytes` besides.
    """
    if hardware.device != "cuda":
        return ()
    each = HOPPER_WORKSPACE_BYTES if hardware.name.startswith(_HOPPER_ON) else WORKSPACE_BYTES
    return (
        Reserved(
            what="fragmentation",
            size_bytes=graph.fragmentation_bytes,
            source="the traced pass replayed on torch's caching allocator",
        ),
        Reserved(
            what="workspaces",
            size_bytes=HANDLES * each,
            source="torch's default of CUBLAS_WORKSPACE_CONFIG, for forward and backward",
        ),
    )


def rounding_bytes(sizes: Iterable[int]) -> int:
    """Return what torch reserves for tensors of these sizes, made one by one, beyond their bytes."""
    device = CachingAllocator()
    total = 0
    for number, size_bytes in enumerate(sizes):
        device.allocate(number, size_bytes)
        total += size_bytes
    return device.reserved_bytes - total
