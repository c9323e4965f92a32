"""Which memory is near a device, on machines whose processors have memory of their own (NUMA nodes).

Copies to a card cross the processors' link where the RAM is another node's, at a fraction of the rate; a measured rate
is that of the node where it was measured. Pages are where the processor is that touches them first. memplan binds
nothing: ``numactl`` does, of the whole process. Unproven: no machine with two has run it.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

NODES = Path("/sys/devices/system/node")
DEVICES = Path("/sys/bus/pci/devices")


def nodes(folder: Path = NODES) -> dict[int, frozenset[int]]:
    """Return the CPUs of each node that has some; empty where the system does not tell."""
    found = {}
    for node in sorted(folder.glob("node[0-9]*")):
        try:
            cpus = frozenset(_numbers((node / "cpulist").read_text()))
        except (OSError, ValueError):
            continue
        if cpus:
            found[int(node.name.removeprefix("node"))] = cpus
    return found


def node_of(address: str, folder: Path = DEVICES) -> int | None:
    """Return the node of a device by its PCI address (0000:17:00.0); None where the system does not tell."""
    try:
        node = int((folder / address.lower() / "numa_node").read_text())
    except (OSError, ValueError):
        return None
    return None if node < 0 else node


def advice(
    address: str, *, allowed: Collection[int] | None = None, folder: Path = NODES, devices: Path = DEVICES
) -> tuple[str, str]:
    """Return, of a machine with several nodes, where a device is and what to do about it; both empty where there is
    nothing to say. ``allowed``: the CPUs that the process may use.
    """
    found, near = nodes(folder), node_of(address, devices)
    if len(found) < 2 or near not in found:
        return "", ""
    cpus = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
    said = f"near node {near} of {len(found)}"
    if cpus <= found[near]:
        return said, ""
    return (
        said,
        f"start with `numactl --cpunodebind={near} --membind={near}`, and calibrate so: RAM of other nodes is slower",
    )


def _numbers(text: str) -> list[int]:
    """Return the numbers of a list such as ``0-3,8``."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
