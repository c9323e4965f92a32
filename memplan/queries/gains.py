"""What a little more would bring: of vram, of RAM, of the link, or the loss in chunks of tokens."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from msgspec.structs import replace

from memplan.case import case_of_plan
from memplan.cost.chunked import CHUNK_TOKENS, chunked_loss
from memplan.cost.table import CostTable
from memplan.program.schema import Budgets, Changed, Gain, Plan
from memplan.units import GIB

_WORTH = 2e-3
"""A change that makes a pass shorter by less than this share is not told."""


def with_gains(plan: Plan) -> Plan:
    """Return the plan with the changes that would make its pass shorter, each alone, as the solver has it.

    The blocks are those of the plan, what was asked of it holds, and what it offloads is offloaded; what is recomputed
    is chosen anew.
    """
    case, below_s = case_of_plan(plan), plan.prediction.pass_s * (1 - _WORTH)
    offloaded = {module: policy for module, policy in plan.policies().items() if policy == "offload"}
    case = dataclasses.replace(case, activations={**case.activations, **offloaded})
    gains: list[Gain] = []
    for of, more, table, budgets in _changes(plan):
        pass_s = dataclasses.replace(case, table=table, budgets=budgets).pass_below_s(below_s)
        if pass_s is not None:
            gains.append(Gain(of=of, more=more, pass_s=pass_s))
    return replace(plan, gains=tuple(gains))


def _changes(plan: Plan) -> Iterator[tuple[Changed, int, CostTable, Budgets]]:
    """Yield what is changed, by how much, and the rows and budgets then."""
    table, budgets = plan.table, plan.budgets
    yield "vram", GIB, table, replace(budgets, vram_bytes=budgets.vram_bytes + GIB)
    if any(item.home == "disk" for item in plan.items):
        yield "ram", GIB, table, replace(budgets, ram_bytes=budgets.ram_bytes + GIB)
    if any(stay.channel == "h2d" for stay in plan.residences):
        faster = table.host_to_device_bytes_per_s + GIB
        yield "link", GIB, replace(table, host_to_device_bytes_per_s=faster), budgets
    chunked = chunked_loss(table, plan.workload.tokens) if plan.workload.loss == "full" else None
    if chunked is not None:
        yield "loss", CHUNK_TOKENS, chunked, budgets
