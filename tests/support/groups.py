"""Training in groups of micro-batches that take turns at each block, and what it is compared with."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from msgspec.structs import replace
from torch import nn

from memplan import Handle
from memplan.cost.group import grouped
from memplan.program.page_lock import pageable_items
from memplan.program.schema import Plan
from memplan.program.timeline import replay
from tests.support.training import LENGTH, Run, batch_of, loss_of


def uneven(kind: str, seed: int = 3) -> dict[str, torch.Tensor]:
    """A micro-batch, of another length for each seed."""
    return batch_of(kind, seed=seed, length=LENGTH - seed % 4)


def train_in_groups(
    model: nn.Module,
    kind: str,
    handle: Handle,
    *,
    steps: int = 3,
    accumulation: int = 8,
    around_forward=nullcontext,
    batches=batch_of,
    loads: list[int] | None = None,
) -> Run:
    """Train as ``tests.support.training.train`` does, each step's micro-batches at once. ``loads`` is given those of
    each step.
    """
    run = Run()
    trainables = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainables.values(), lr=1e-2)
    torch.manual_seed(11)

    def one(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        with around_forward():
            loss = loss_of(model(**batch)) / accumulation
        loss.backward()
        return loss.detach().clone()

    for step in range(steps):
        before = handle.record.loads
        seeds = range(100 + step * accumulation, 100 + (step + 1) * accumulation)
        run.losses += handle.accumulate(one, (batches(kind, seed=seed) for seed in seeds))
        run.gradients.append({n: p.grad.clone() for n, p in trainables.items() if p.grad is not None})
        optimizer.step()
        optimizer.zero_grad()
        if loads is not None:
            loads.append(handle.record.loads - before)
    run.adapters = {name: p.detach().clone() for name, p in trainables.items()}
    return run


def in_groups(plan: Plan, group: int, accumulation: int | None = None) -> Plan:
    """Return the plan with the same residences for groups of micro-batches, as many a step at least, and all the vram
    that they need.
    """
    if group < 1:
        return replace(plan, group=group)
    work = replace(plan.workload, accumulation=max(accumulation or plan.workload.accumulation, group))
    table = grouped(plan.table, group, work.accumulation)
    first, last = table.turn_around or (0, 0)

    def there(absent: tuple[tuple[int, int], ...]) -> tuple[tuple[int, int], ...]:
        """Bytes stay for all of a visit, or go for all of it."""
        whole = [span for span in absent if span[0] <= first and last <= span[1]]
        cut = [(span[0], min(span[1], first - 1)) for span in absent if span not in whole and span[0] < first]
        cut += [(max(span[0], last + 1), span[1]) for span in absent if span not in whole and span[1] > last]
        return tuple(sorted({*whole, *(span for span in cut if span[0] <= span[1])}))

    arenas = tuple(
        replace(arena, segments=tuple(replace(segment, absent=there(segment.absent)) for segment in arena.segments))
        for arena in plan.arenas
    )
    policies, slow = plan.policies(), pageable_items(plan)
    steady = replay(table, plan.items, plan.residences, policies, slow)
    full, rest = divmod(work.accumulation, group)
    fewer = replace(table, group=rest or group)
    last_s = replay(fewer, plan.items, plan.residences, policies, slow).pass_s if rest else 0.0
    optimizer_s = sum(row.time_s for row in table.accesses if row.kind == "optimizer")
    held = [arena for arena in arenas if arena.tier == "device"]
    beside = table.device_bytes(policies)
    vram = [size + sum(arena.size_bytes_at(at) for arena in held) for at, size in enumerate(beside)]
    said = replace(
        plan.prediction,
        compute_s=steady.compute_s,
        pass_s=steady.pass_s,
        last_pass_s=last_s,
        step_s=full * steady.pass_s + last_s + optimizer_s,
        stall_s=max(steady.pass_s - steady.compute_s, 0.0),
        rows_bytes_per_pass=group * plan.prediction.rows_bytes_per_pass // plan.group,
        peaks=replace(plan.prediction.peaks, vram_bytes=max(vram)),
        vram_peak_at=vram.index(max(vram)),
        vram_parts={"activations": max(vram)},
    )
    room = max(max(vram), plan.budgets.vram_bytes)
    return replace(
        plan,
        group=group,
        workload=work,
        table=table,
        arenas=arenas,
        prediction=said,
        budgets=replace(plan.budgets, vram_bytes=room),
    )
