"""Plans for the contenders that run under one, made in a process of its own, before any of them begins."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import replace as replace_case
from typing import Any

from msgspec.structs import replace

from benchmarks.versus.models import batch_of, loss_of
from benchmarks.versus.training import Setting
from memplan.case import Case, case_of
from memplan.errors import InputError, MemplanError, type_and_line
from memplan.hardware.calibrate import current
from memplan.plan_options import PlanOptions
from memplan.program.schema import Plan
from memplan.request import Request
from memplan.units import format_bytes

ROOM_BYTES = 4 << 40


def make_plans(setting: Setting, names: Sequence[str], whole_s: float | None) -> dict[str, Any]:
    """Write the plans of those names to their folder; return the frozen bytes, the link's rate, and the errors of those
    without one.
    """
    case, found = priced(setting, whole_s)
    frozen = found["frozen_bytes"]
    beside = case.whole_vram_bytes() - frozen
    errors: dict[str, str] = {}
    for name in names:
        try:
            _plan(case, name, beside, frozen, setting.card_bytes).save(setting.plans / f"{name}.json")
        except MemplanError as error:
            errors[name] = type_and_line(error)
    return {**found, "plan_errors": errors}


def priced(setting: Setting, whole_s: float | None = None) -> tuple[Case, dict[str, Any]]:
    """Return the case of a setting with as much vram as it wants, and the figures that its plans rest on.

    Accesses are timed on this machine; where the whole model's step is known, ``whole_s``, they are scaled to it, so
    that a plan's bound is of the compute that the contenders did beside it. On the CPU, which has no link, one is
    made up: all frozen bytes cross it in the time of half a step of the whole model, about what an 8B in bfloat16 with
    4,096 tokens takes on a card.
    """
    case, profile = _case(setting), current.current()
    table = case.table
    scale = 1.0 if whole_s is None else whole_s / sum(row.time_s for row in table.accesses)
    rows = tuple(
        replace(row, time_s=row.time_s * scale, recompute_s=row.recompute_s * scale, offload_s=row.offload_s * scale)
        for row in table.accesses
    )
    frozen = sum(block.size_bytes for block in table.blocks)
    table = replace(table, accesses=rows)
    if profile.device == "cpu":
        half_s = sum(row.time_s for row in rows) / 2
        table = replace(table, host_to_device_bytes_per_s=frozen / half_s, device_to_host_bytes_per_s=frozen / half_s)
    return replace_case(case, table=table), {
        "frozen_bytes": frozen,
        "link_bytes_per_s": table.host_to_device_bytes_per_s,
        "whole_s_planned_with": whole_s,
        "compute_scale": scale,
    }


def _case(setting: Setting) -> Case:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        machine = current.current()
        options: PlanOptions = {
            "vram": int(machine.device_bytes.value),
            "ram": ROOM_BYTES,
            "disk": 0,
            "adapter": setting.model.adapter,
            "dtype": None if setting.model.nf4 else setting.model.dtype,
            "hardware": machine,
            "measure": True,
            "loss": loss_of if setting.model.is_flux else None,
        }
        case = case_of(Request.of(setting.checkpoint, batch_of(setting.model, setting.shape), options))
    return replace_case(case, budgets=replace(case.budgets, vram_bytes=ROOM_BYTES))


def _plan(case: Case, name: str, beside: int, frozen: int, card_bytes: int | None) -> Plan:
    """Return a contender's plan; ``beside``: device bytes of all but frozen weights, all activations kept."""
    way, _, share = name.partition("-")
    if share == "least":
        return case.place(vram_bytes=case.least_vram_bytes() or 1)  # with 1 it says what stands in the way
    if share == "card":
        assert card_bytes is not None
        vram_bytes = card_bytes
    else:
        vram_bytes = beside + int(frozen * float(share) / 100)
    if way == "memplan":
        return case.place(vram_bytes=vram_bytes)
    recomputed: dict[str, Any] = dict.fromkeys(case.table.recomputable, "recompute")
    budgets = replace(case.budgets, vram_bytes=vram_bytes)
    plan = replace_case(case, budgets=budgets, activations=recomputed).place_as("spread in equal slots")
    if plan is None:
        raise InputError(f"two slots of the greatest block do not fit in {format_bytes(vram_bytes)} beside all else")
    return plan
