"""What a report says, as numbers: all of them derived from a Plan and a RunRecord, none made up. No rich here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from memplan.errors import DoesNotFitError, PlanMismatchError
from memplan.program.memory_timeline import timeline
from memplan.program.page_lock import page_locked_bytes, pageable_items
from memplan.program.whole import Whole, checkpointing_only, everything_kept

if TYPE_CHECKING:
    from memplan.program.memory_timeline import Moment
    from memplan.program.record import RunRecord
    from memplan.program.schema import Plan, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFact:
    """One block as the report names it."""

    name: str
    home: Tier
    size_bytes: int
    stack: str
    activations: str
    """``keep``, ``recompute`` or ``offload``."""
    is_pageable: bool = False
    """Whether its home is RAM that is not page-locked for the device."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What the plan says. Fractions are of 1; a fraction is None where its divisor is 0."""

    blocks: tuple[BlockFact, ...]
    recompute_s: float
    """Part of ``compute_s`` that is spent on recomputing."""
    held_s: float
    """A pass that holds every weight and every activation."""
    slowdown: float | None
    """``pass_s / held_s - 1``, not below 0."""
    kept: Whole
    """All weights on the device, and all activations."""
    checkpointed: Whole | None
    """All weights on the device, each layer recomputed; None where memplan cannot set what layers do."""
    baseline: str
    """What people compare with: ``everything kept`` where that fits the budget, else ``checkpointing only``, as people
    train where memory is short."""
    step_ratio: float | None
    """A step over one of the baseline."""
    recompute_slowdown: float | None
    """The part of it that recomputing takes."""
    stall_slowdown: float | None
    """The part of it that waiting takes."""
    bound_gap: float | None
    """``pass_s / bound_s - 1``, not below 0."""
    tokens_per_s: float | None
    """Over whole steps: the optimizer's time included."""
    run_s: float | None
    """Of the whole run, where its steps are known."""
    weight_copy_bytes: int
    """Of the activations at the vram peak, copies of weights: casts, weights merged with an adapter."""
    page_locked_bytes: int
    """Of the ram peak; the rest of it is pageable."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What the run says, beside the plan. None where nobody measured it. An error is predicted / measured - 1."""

    pass_s: float | None
    stall_s: float | None
    tokens_per_s: float | None
    """Tokens of a micro-batch over the median pass."""
    loads_per_pass: float | None
    loaded_bytes_per_pass: int | None
    vram_bytes: int | None
    """With the context that the plan counts, which torch does not; so is what was reserved."""
    vram_reserved_bytes: int | None
    ram_bytes: int | None
    unaccounted_vram_bytes: int | None
    """Measured less predicted."""
    unaccounted_ram_bytes: int | None
    errors: Mapping[str, float]
    """Of ``pass_s``, ``tokens_per_s``, ``loads_per_pass``, ``loaded_bytes_per_pass``, ``vram_bytes`` and
    ``ram_bytes``; what was not measured, or measured as 0, is not in it."""


def home_of(block: BlockFact) -> str:
    """Return a block's home in words."""
    return f"{block.home}, pageable" if block.is_pageable else block.home


def facts(plan: Plan) -> Facts:
    """Return what the plan says."""
    policies = plan.policies()
    slow = {plan.items[item].block for item in pageable_items(plan) if plan.items[item].kind == "weights"}
    again = [row.recompute_s for row in plan.table.accesses if policies.get(row.module) == "recompute"]
    recompute_s = plan.group * sum(again, 0.0)
    prediction = plan.prediction
    held_s = prediction.compute_s - recompute_s
    kept, checkpointed = everything_kept(plan), checkpointing_only(plan)
    is_kept = checkpointed is None or kept.vram_bytes <= plan.budgets.vram_bytes
    baseline = kept if checkpointed is None or is_kept else checkpointed
    return Facts(
        blocks=tuple(
            BlockFact(
                name=block.name,
                home=plan.home_of(block.id),
                size_bytes=block.size_bytes,
                stack=block.stack,
                activations=_policy_of(block.name, policies),
                is_pageable=block.id in slow and plan.home_of(block.id) == "host",
            )
            for block in plan.table.blocks
        ),
        recompute_s=recompute_s,
        held_s=held_s,
        slowdown=_excess(prediction.pass_s, held_s),
        kept=kept,
        checkpointed=checkpointed,
        baseline="everything kept" if is_kept else "checkpointing only",
        step_ratio=_ratio(prediction.step_s, baseline.step_s),
        recompute_slowdown=_ratio(recompute_s, held_s),
        stall_slowdown=_ratio(prediction.stall_s, held_s),
        bound_gap=_excess(prediction.pass_s, prediction.bound_s),
        tokens_per_s=_ratio(plan.workload.tokens * plan.workload.accumulation, prediction.step_s),
        run_s=None if plan.workload.steps is None else plan.workload.steps * prediction.step_s,
        weight_copy_bytes=min(_derived_at(plan, prediction.vram_peak_at), prediction.vram_parts.get("activations", 0)),
        page_locked_bytes=page_locked_bytes(plan),
    )


def _derived_at(plan: Plan, index: int) -> int:
    """Return the bytes of copies of weights that are alive in an access: each from its forward to its backward, for
    each micro-batch of a group.
    """
    policies, rows = plan.policies(), plan.table.accesses
    last = {row.forward: row.index for row in rows if row.kind == "backward"}
    return plan.group * sum(
        row.weight_copy_bytes
        for row in rows
        if row.index <= index <= last.get(row.index, row.index) and policies.get(row.module, "keep") == "keep"
    )


def measured(plan: Plan, record: RunRecord) -> Measured:
    """Return what the run says beside the plan. Raises PlanMismatchError where it is the run of another plan."""
    check_pair(plan, record)
    prediction = plan.prediction
    context = prediction.vram_parts.get("context", 0)
    vram, reserved = (size + context if size else None for size in (record.vram_peak_bytes, record.vram_reserved_bytes))
    # A record is of micro-batches, what is said of groups of them.
    each_s = record.pass_s if record.pass_s > 0 else None
    pass_s = None if each_s is None else plan.group * each_s
    full, rest = plan.groups
    mean_group = plan.workload.accumulation / (full + bool(rest))
    ram = record.ram_peak_bytes or None
    seen: dict[str, float | None] = {
        "pass_s": pass_s,
        "stall_s": None if each_s is None else plan.group * record.stall_s,
        "tokens_per_s": None if each_s is None else plan.workload.tokens / each_s,
        "loads_per_pass": _ratio(mean_group * record.loads, record.passes),
        "loaded_bytes_per_pass": _ratio(mean_group * record.loaded_bytes, record.passes),
        "vram_bytes": vram,
        "ram_bytes": ram,
    }
    said = {
        "pass_s": prediction.pass_s,
        "tokens_per_s": facts(plan).tokens_per_s,
        "loads_per_pass": prediction.loads_per_pass,
        "loaded_bytes_per_pass": prediction.loaded_bytes_per_pass,
        "vram_bytes": prediction.peaks.vram_bytes,
        "ram_bytes": prediction.peaks.ram_bytes,
    }
    errors = {key: _less_one(_ratio(value, seen[key])) for key, value in said.items() if value is not None}
    loaded = seen["loaded_bytes_per_pass"]
    return Measured(
        pass_s=pass_s,
        stall_s=seen["stall_s"],
        tokens_per_s=seen["tokens_per_s"],
        loads_per_pass=seen["loads_per_pass"],
        loaded_bytes_per_pass=None if loaded is None else round(loaded),
        vram_bytes=vram,
        vram_reserved_bytes=reserved,
        ram_bytes=ram,
        unaccounted_vram_bytes=None if vram is None else vram - prediction.peaks.vram_bytes,
        unaccounted_ram_bytes=None if ram is None else ram - prediction.peaks.ram_bytes,
        errors={key: error for key, error in errors.items() if error is not None},
    )


def check_pair(plan: Plan, record: RunRecord) -> None:
    """Raise PlanMismatchError where ``record`` is not of a run under ``plan``, as far as the two can tell."""
    if plan.fingerprint != record.fingerprint:
        raise PlanMismatchError(
            f"the record is of a run of another model: its weights have the fingerprint {record.fingerprint[:12]}, "
            f"those of the plan for {plan.model} {plan.fingerprint[:12]}. Give the record of a run under this plan"
        )
    last = max((row.block for row in record.blocks), default=-1)
    if last >= len(plan.table.blocks):
        raise PlanMismatchError(
            f"the record names block {last} and the plan for {plan.model} ends at block {len(plan.table.blocks) - 1}: "
            "it was written under another plan of this model. Give the record of a run under this plan"
        )


def as_dict(plan: Plan, record: RunRecord | None = None) -> dict[str, object]:
    """Return the report as the one object that ``--json`` prints. Bytes are whole, times are seconds.

    Raises PlanMismatchError where ``record`` is of another plan.
    """
    known, prediction, budgets, workload = facts(plan), plan.prediction, plan.budgets, plan.workload
    result: dict[str, object] = {
        "fits": True,
        "model": plan.model,
        "hardware": plan.hardware,
        "device": plan.table.device,
        "adapter": workload.adapter,
        "optimizer": workload.optimizer,
        "optimizer_state": plan.optimizer_state,
        "batch": {name: list(shape) for name, shape in workload.batch.items()},
        "tokens": workload.tokens,
        "accumulation": workload.accumulation,
        "group": plan.group,
        "steps": workload.steps,
        "examples": workload.examples,
        "epochs": workload.epochs,
        "pass_s": prediction.pass_s,
        "step_s": prediction.step_s,
        "run_s": known.run_s,
        "bound_s": prediction.bound_s,
        "compute_s": prediction.compute_s,
        "recompute_s": known.recompute_s,
        "stall_s": prediction.stall_s,
        "slowdown": known.slowdown,
        "bound_gap": known.bound_gap,
        "tokens_per_s": known.tokens_per_s,
        "binds": prediction.binds,
        "loads_per_pass": prediction.loads_per_pass,
        "loaded_bytes_per_pass": prediction.loaded_bytes_per_pass,
        "offloaded_bytes_per_pass": prediction.offloaded_bytes_per_pass,
        "rows_bytes_per_pass": prediction.rows_bytes_per_pass,
        "budgets": {
            "vram_bytes": budgets.vram_bytes,
            "ram_bytes": budgets.ram_bytes,
            "disk_bytes": budgets.disk_bytes,
            "page_lock_bytes": budgets.page_lock_bytes,
        },
        "peaks": {
            "vram_bytes": prediction.peaks.vram_bytes,
            "ram_bytes": prediction.peaks.ram_bytes,
            "disk_bytes": prediction.peaks.disk_bytes,
        },
        "vram_parts": dict(prediction.vram_parts),
        "weight_copy_bytes": known.weight_copy_bytes,
        "ram_parts": dict(prediction.ram_parts),
        "page_locked_bytes": known.page_locked_bytes,
        "pageable_bytes": prediction.peaks.ram_bytes - known.page_locked_bytes,
        "blocks": [
            {
                "name": block.name,
                "home": block.home,
                "pageable": block.is_pageable,
                "bytes": block.size_bytes,
                "activations": block.activations,
            }
            for block in known.blocks
        ],
        "gains": [{"of": gain.of, "more": gain.more, "pass_s": gain.pass_s} for gain in plan.gains],
        "notes": list(plan.notes),
        "memory": [_moment_dict(moment) for moment in timeline(plan)],
    }
    if record is not None:
        result["measured"] = _measured_dict(plan, record)
    return result


def failure_dict(error: DoesNotFitError) -> dict[str, object]:
    """Return what ``--json`` prints where no plan keeps the budgets."""
    return {
        "fits": False,
        "message": str(error),
        "least_vram_bytes": error.least_vram_bytes,
        "least_ram_bytes": error.least_ram_bytes,
        "least_disk_bytes": error.least_disk_bytes,
        "limited_by": error.limited_by,
        "suggestions": list(error.suggestions),
    }


def _moment_dict(moment: Moment) -> dict[str, object]:
    """Return one access's bytes; kinds of which there are none are left out."""
    return {
        "index": moment.index,
        "kind": moment.kind,
        "module": moment.module,
        "vram_bytes": moment.vram_bytes,
        "vram_parts": {kind: size for kind, size in moment.vram.items() if size},
        "ram_bytes": moment.ram_bytes,
        "ram_parts": {kind: size for kind, size in moment.ram.items() if size},
        "disk_bytes": moment.disk_bytes,
    }


def _measured_dict(plan: Plan, record: RunRecord) -> dict[str, object]:
    seen = measured(plan, record)
    return {
        "device": record.device,
        "passes": record.passes,
        "wall_s": record.wall_s,
        "pass_s": seen.pass_s,
        "stall_s": seen.stall_s,
        "tokens_per_s": seen.tokens_per_s,
        "loads": record.loads,
        "loads_per_pass": seen.loads_per_pass,
        "loaded_bytes": record.loaded_bytes,
        "loaded_bytes_per_pass": seen.loaded_bytes_per_pass,
        "misses": record.misses,
        "out_of_order": record.out_of_order,
        "learned": record.learned,
        "direct_reads": record.direct_reads,
        "direct_read_bytes": record.direct_read_bytes,
        "direct_writes": record.direct_writes,
        "offloaded_bytes": record.offloaded_bytes,
        "offload_skipped": record.offload_skipped,
        "recoveries": record.recoveries,
        "weight_copy_bytes": record.weight_copy_bytes,
        "peaks": {
            "vram_bytes": seen.vram_bytes,
            "vram_reserved_bytes": seen.vram_reserved_bytes,
            "ram_bytes": seen.ram_bytes,
        },
        "unaccounted": {"vram_bytes": seen.unaccounted_vram_bytes, "ram_bytes": seen.unaccounted_ram_bytes},
        "errors": dict(seen.errors),
        "blocks": [
            {
                "name": plan.table.blocks[row.block].name,
                "loads": row.loads,
                "loaded_bytes": row.loaded_bytes,
                "stall_s": row.stall_s,
                "misses": row.misses,
            }
            for row in record.blocks
        ],
    }


def _policy_of(name: str, policies: Mapping[str, str]) -> str:
    """Return the policy of the nearest module around the block: a part of a layer goes with its layer."""
    while name:
        if name in policies:
            return policies[name]
        name = name.rpartition(".")[0]
    return "keep"


def _ratio(over: float, under: float | None) -> float | None:
    return over / under if under is not None and under > 0 else None


def _less_one(value: float | None) -> float | None:
    return None if value is None else value - 1


def _excess(over: float, under: float) -> float | None:
    """Return by what fraction ``over`` is above ``under``; what is below is rounding."""
    ratio = _ratio(over, under)
    return None if ratio is None else max(0.0, ratio - 1)
