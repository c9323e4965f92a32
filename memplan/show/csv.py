"""A plan as a table: a row a block, for spreadsheets."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from memplan.atomic_write import write
from memplan.program.page_lock import pageable_items
from memplan.program.schema import Plan

COLUMNS = (
    "block", "name", "kind", "bytes", "home", "pageable", "activations", "loads_per_pass", "first_access", "accesses",
)  # fmt: skip


def write_csv(plan: Plan, path: Path) -> None:
    """Write a row for each block: home, whether that is RAM that is not page-locked for the device, what becomes of its
    module's activations, loads of a pass, and its accesses.

    Raises InputError where the file cannot be written.
    """
    homes = {item.block: item.home for item in plan.items if item.kind == "weights"}
    policies, slow = plan.policies(), pageable_items(plan)
    pageable = {item.block for item in plan.items if item.kind == "weights" and item.home == "host" and item.id in slow}
    loads = dict.fromkeys(homes, 0)
    for stay in plan.residences:
        item = plan.items[stay.item]
        if stay.begins == "load" and item.kind == "weights":
            loads[item.block] += 1
    reads: dict[int, list[int]] = {block: [] for block in homes}
    modules: dict[int, str] = {}
    for access in plan.table.accesses:
        for read in access.blocks:
            reads[read].append(access.index)
            modules.setdefault(read, access.module)
    file = io.StringIO(newline="")
    out = csv.writer(file)
    out.writerow(COLUMNS)
    for block in plan.table.blocks:
        mine = reads[block.id]
        policy = policies.get(modules.get(block.id, ""), "")
        row = (
            block.id,
            _harmless(block.name),
            block.kind,
            block.size_bytes,
            homes[block.id],
            int(block.id in pageable),
            policy,
            loads[block.id],
        )
        out.writerow((*row, mine[0] if mine else "", len(mine)))
    write(path, file.getvalue().encode())


def _harmless(name: str) -> str:
    """Return a name that no spreadsheet takes for a formula."""
    return f"'{name}" if name[:1] in ("=", "+", "-", "@") else name
