"""What a plan of several ranks says where another arrangement than data parallel would be much faster."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from memplan.program.schema import Plan

_MUCH = 1.5
"""Times as long as its compute a micro-batch is, from where on it is worth a word."""

_BEGINS = "Every rank loads all that streams: "


def with_arrangement(plan: Plan) -> Plan:
    """Return the plan with what would help its ranks, where they wait much for what each of them loads."""
    said, ranks = plan.prediction, plan.ranks
    if ranks.count == 1:
        return plan
    notes = []
    if said.binds != "compute" and said.pass_s > _MUCH * said.compute_s:
        times = said.pass_s / said.compute_s
        enough = f"{_round(plan.workload.tokens * times):,} {plan.workload.unit}"
        notes.append(
            f"{_BEGINS}a micro-batch takes {times:.1f} times its compute. About {enough} a micro-batch would hide the "
            "loads; else a pipeline, where each card keeps its own layers, or FSDP over NVLink, where each loads a "
            "part, is faster."
        )
    elif said.reduce_s > (_MUCH - 1) * (said.step_s - said.reduce_s):
        notes.append(
            f"The all-reduce outlasts the last backward of a step by {said.reduce_s / said.step_s:.0%} of it: more "
            "accumulation, a smaller adapter or a faster network would help."
        )
    return replace(plan, notes=(*without_arrangement(plan.notes), *notes)) if notes else plan


def without_arrangement(notes: Sequence[str]) -> tuple[str, ...]:
    """Return notes without those that are of one plan's times."""
    return tuple(note for note in notes if not note.startswith((_BEGINS, "The all-reduce outlasts ")))


def _round(number: float) -> int:
    """Return two digits of a number, up."""
    size: int = 10 ** max(0, len(str(int(number))) - 2)
    return -(-int(number) // size) * size
