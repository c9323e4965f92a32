"""What is refused before anything is placed: rows, rates and budgets that no plan could be made from."""

from __future__ import annotations

import math
from collections.abc import Iterator

from memplan import device_kinds
from memplan.cost.table import AccessRow, CostTable
from memplan.device_kinds import is_apart
from memplan.errors import InputError, SizeError
from memplan.program.schema import Budgets


def require_input(table: CostTable, budgets: Budgets, staging_bytes: int) -> None:
    """Raise SizeError for a budget that is no count of bytes, InputError for a table that cannot be of a pass."""
    given = {"vram": budgets.vram_bytes, "ram": budgets.ram_bytes, "disk": budgets.disk_bytes, "staging": staging_bytes}
    given["page lock"] = budgets.page_lock_bytes
    for what, size in given.items():
        if not _is_size(size) and not (what in ("disk", "page lock") and size is None):
            raise SizeError(what, size)
    faults = [*_machine(table), *_rows(table), *_bytes(table)]
    if is_apart(table.device) and budgets.page_lock_bytes is not None and table.pageable_bytes_per_s is None:
        faults.append("not all of RAM may be pinned, and there is no rate for the rest, which is pageable")
    if faults:
        more = f"; and {len(faults) - 3} more" if len(faults) > 3 else ""
        raise InputError(
            f"the cost table is not of a micro-batch: {'; '.join(faults[:3])}{more}. Re-create it from the model "
            "and a profile"
        )


def _is_size(size: object) -> bool:
    return isinstance(size, int) and not isinstance(size, bool) and size >= 0


def _is_time(time_s: float) -> bool:
    return math.isfinite(time_s) and time_s >= 0


def _machine(table: CostTable) -> Iterator[str]:
    if fault := device_kinds.fault(table.device):
        yield fault
    for what, rate in (
        ("host to device", table.host_to_device_bytes_per_s),
        ("device to host", table.device_to_host_bytes_per_s),
        ("disk", table.disk_bytes_per_s),
        ("pageable RAM", table.pageable_bytes_per_s),
    ):
        if rate is not None and not (math.isfinite(rate) and rate > 0):
            yield f"the rate of {what} is {rate} bytes/s"
    if not 0 < table.duplex_factor <= 1:
        yield f"a direction of the link reaches {table.duplex_factor} of its rate while the other is busy"
    if not _is_time(table.load_latency_s):
        yield f"the latency of a load is {table.load_latency_s} s"


def _rows(table: CostTable) -> Iterator[str]:
    if not table.accesses:
        yield "it has no accesses"
    for what, ids in (("blocks", [b.id for b in table.blocks]), ("accesses", [a.index for a in table.accesses])):
        yield from (f"{what}[{number}] has id {said}" for number, said in enumerate(ids) if said != number)
    for number, row in enumerate(table.accesses):
        strange = [block for block in row.blocks if not 0 <= block < len(table.blocks)]
        if strange:
            yield f"access {number} reads block {strange[0]}, which is not there"
        if not {rows.block for rows in row.rows} <= set(row.blocks):
            yield f"access {number} reads rows of a block that it does not read"
        if not all(_is_time(time_s) for time_s in (row.time_s, row.recompute_s, row.offload_s)):
            yield (
                f"access {number} takes {row.time_s} s, {row.recompute_s} s to recompute, {row.offload_s} s to offload"
            )
        if row.kind in ("forward", "backward") and not _has_forward(table, number, row):
            yield f"access {number}, a {row.kind}, belongs to access {row.forward}, which is no forward at or before it"
    kinds = {(row.kind, row.module) for row in table.accesses}
    for module in table.recomputable:
        if not {("forward", module), ("backward", module)} <= kinds:
            yield f"{module} is to be recomputable, but does not run both ways"
    for life in table.lifetimes:
        if not 0 <= life.born <= life.last < len(table.accesses):
            yield f"a lifetime runs from access {life.born} to {life.last}"


def _has_forward(table: CostTable, number: int, row: AccessRow) -> bool:
    if row.kind == "forward":
        return row.forward == number
    return 0 <= row.forward < min(number, len(table.accesses)) and table.accesses[row.forward].kind == "forward"


def _bytes(table: CostTable) -> Iterator[str]:
    """Yield what is no count of bytes. Transients may be negative: what is born and dies in an access need not meet."""
    sizes = [(block.name, block.size_bytes) for block in table.blocks]
    sizes += [(f"what lives from access {life.born}", life.size_bytes) for life in table.lifetimes]
    sizes += [(f"the {fixed.kind}", fixed.size_bytes) for fixed in table.fixed]
    for row in table.accesses:
        sizes += [(f"the rows of access {row.index}", rows.size_bytes) for rows in row.rows]
        sizes.append((f"what access {row.index} offloads", row.offload_bytes))
    yield from (f"the bytes of {what} are {size}" for what, size in sizes if not _is_size(size))
    for row in table.accesses:
        if not all(isinstance(row.transient(policy), int) for policy in ("keep", "recompute", "offload")):
            yield f"the transient bytes of access {row.index} are no count of bytes"
