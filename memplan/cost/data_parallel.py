"""What several ranks change in the rows of one: rates while all load at once, DDP's and NCCL's memory, sums."""

from __future__ import annotations

from typing import TYPE_CHECKING

from msgspec.structs import replace

from memplan.analyze.graph import Fixed
from memplan.cost.ranks import Ranks, Reduce
from memplan.cost.table import CostTable
from memplan.device_kinds import is_apart
from memplan.units import align_up, format_bytes

if TYPE_CHECKING:
    from memplan.hardware.profile import HardwareProfile

FIRST_BUCKET_BYTES, BUCKET_BYTES = 1 << 20, 25 << 20
"""DDP's defaults: ``torch.distributed._DEFAULT_FIRST_BUCKET_BYTES`` and ``bucket_cap_mb``. A bucket is closed by the
gradient with which it has so much."""

NCCL_CONNECTION_BYTES = (4 << 20) + 4_915_200 + (512 << 10)
"""Of one connection and channel, a buffer for each protocol: Simple (``NCCL_BUFFSIZE``, NCCL's user guide), LL128
(120 numbers × 640 threads × 8 steps × 8 bytes) and LL (8 lines × 512 threads × 8 steps × 16 bytes; NCCL's comm.h)."""

NCCL_CHANNELS = 8
"""Assumed: NCCL has 2 to 32, as its search of the topology finds them. A ring has two connections a channel, however
many ranks there are (NVIDIA/nccl issue 986)."""

HOST_MEMORY_BYTES_PER_S = 40e9
"""Assumed where a profile has none: 80% of two channels of DDR4-3200."""

NETWORK_BYTES_PER_S = 10e9 / 8
"""Assumed where nobody says: 10 Gbit/s between nodes."""

HOP_S = 30e-6
"""Assumed for one of the turns of an all-reduce, whatever its size; a tree has as many as the ranks have doublings."""


def with_ranks(
    table: CostTable, hardware: HardwareProfile, ranks: Ranks, network_bytes_per_s: float | None = None
) -> tuple[CostTable, tuple[str, ...]]:
    """Return the rows of one rank of several, and what a reader should know of them.

    ``network_bytes_per_s``: between two nodes, in one direction.
    """
    if ranks.count == 1:
        return table, ()
    to_device, from_device, told = _rates(table, hardware, ranks.per_node)
    network = NETWORK_BYTES_PER_S if network_bytes_per_s is None else network_bytes_per_s
    within = min(to_device, from_device)
    slowest = within if ranks.nodes == 1 else network if ranks.per_node == 1 else min(within, network)
    gradients = _gradients(table)
    communication = sum(map(align_up, gradients.values()))  # DDP's copy of them: gradient_as_bucket_view is off
    if is_apart(table.device):
        communication += 2 * NCCL_CHANNELS * NCCL_CONNECTION_BYTES
    share = 2 * (ranks.count - 1) / ranks.count / slowest
    latency_s = 2 * HOP_S * (ranks.count - 1).bit_length()
    reduces = tuple(
        Reduce(after=after, size_bytes=size_bytes, time_s=latency_s + size_bytes * share)
        for after, size_bytes in _buckets(gradients)
    )
    pageable = table.pageable_bytes_per_s
    if pageable is not None and ranks.per_node > 1:  # read, written to the staging ring, and read there
        pageable = min(pageable, to_device, _memory(hardware) / 3 / ranks.per_node)
    fixed = (*table.fixed, Fixed(kind="communication", size_bytes=communication))
    rows = replace(
        table,
        ranks=replace(ranks, reduces=reduces),
        fixed=fixed,
        host_to_device_bytes_per_s=to_device,
        device_to_host_bytes_per_s=from_device,
        pageable_bytes_per_s=pageable,
    )
    if ranks.nodes > 1:
        how = "assumed" if network_bytes_per_s is None else "as given"
        told += (f"Between nodes {network * 8 / 1e9:.3g} Gbit/s, {how}.",)
    return rows, told


def _memory(hardware: HardwareProfile) -> float:
    """Return the bytes a second that the RAM of a node reads and writes."""
    if not is_apart(hardware.device):
        return hardware.memory_bytes_per_s.value
    figure = hardware.host_memory_bytes_per_s
    return HOST_MEMORY_BYTES_PER_S if figure is None else figure.value


def _rates(table: CostTable, hardware: HardwareProfile, per_node: int) -> tuple[float, float, tuple[str, ...]]:
    """Return the rates of a rank's link, to the device and back, with all ranks of a node loading, and what is said."""
    to_device, from_device = table.host_to_device_bytes_per_s, table.device_to_host_bytes_per_s
    if per_node == 1:
        return to_device, from_device, ()
    measured = hardware.host_to_device_of_ranks.get(str(per_node))
    if measured is not None:
        share = min(1.0, measured.value / to_device)
        return to_device * share, from_device * share, ()
    touched = 1 if is_apart(hardware.device) else 2  # a copy from RAM to RAM reads and writes
    most = _memory(hardware) / touched / per_node
    is_assumed = is_apart(hardware.device) and hardware.host_memory_bytes_per_s is None
    memory = f"{format_bytes(int(_memory(hardware)))}/s{' (assumed)' if is_assumed else ''}"
    told = (
        f"Rates with {per_node} ranks of a node loading at once were not measured: each has the link of one, or its "
        f"part of the node's RAM at {memory}. Cards that share lanes or a root are slower.",
    )
    return min(to_device, most), min(from_device, most), told


def _gradients(table: CostTable) -> dict[int, int]:
    """Return the bytes of adapters' gradients by the access that makes them."""
    lives = [life for life in table.lifetimes if life.kind == "gradients" and life.policy in ("any", "keep")]
    total = sum(life.size_bytes for life in lives)
    made = {row.index: row.gradient_bytes for row in table.accesses if row.gradient_bytes}
    if not made:
        for life in lives:
            made[life.born] = made.get(life.born, 0) + life.size_bytes
    last = max((row.index for row in table.accesses if row.kind == "backward"), default=len(table.accesses) - 1)
    if (rest := total - sum(made.values())) > 0:
        made[last] = made.get(last, 0) + rest
    return dict(sorted(made.items()))


def _buckets(gradients: dict[int, int]) -> list[tuple[int, int]]:
    """Return buckets in the order in which they are full: the access that fills each, and its bytes."""
    found: list[tuple[int, int]] = []
    gathered, after = 0, 0
    for after, size_bytes in gradients.items():
        gathered += size_bytes
        if gathered >= (BUCKET_BYTES if found else FIRST_BUCKET_BYTES):
            found.append((after, gathered))
            gathered = 0
    return [*found, (after, gathered)] if gathered else found
