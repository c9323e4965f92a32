"""What is said where no plan keeps the budgets: which tier is short, and the cheapest change that makes it fit first.

Each change is looked at with the rest as asked, and told only where something fits with it. What is cheap: a GiB of
disk, of RAM and of vram are taken to cost as 1 to 20 to 200, a loss in chunks (a line of the training script) as half a
GiB of RAM.

[Note: what scripts read] ``vram (N bytes)`` is the least vram with all else as asked, and stands nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from msgspec.structs import replace

from memplan.cost.chunked import CHUNK_TOKENS, chunked_loss
from memplan.cost.group import grouped, sizes
from memplan.device_kinds import is_apart
from memplan.errors import DoesNotFitError
from memplan.place.alternatives import Task
from memplan.place.min_vram import Least, fitting, least_disk_bytes, least_ram_bytes
from memplan.program.schema import RING_BYTES, Budgets, Workload
from memplan.units import GIB, format_bytes

_MOST_TIPS = 4
"""That a refusal gives."""
_PRICES: dict[str, float] = {"disk": 0.05, "ram": 1.0, "vram": 10.0}
"""Of a GiB more, in GiB of RAM."""
_LOSS_PRICE = 0.5
_WORTH = 0.02
"""A loss in chunks that spares less of the vram is not told."""


class _Change(NamedTuple):
    """One that makes it fit."""

    price: float
    text: str


def does_not_fit(task: Task, workload: Workload) -> DoesNotFitError:
    """Return what to raise where no plan keeps the budgets: what would do of each tier, what is short, what helps."""
    budgets, problems = task.budgets, _least_of(task)
    of = min(problems, key=lambda least: least.vram_bytes)
    least_vram = None if of.smallest is None else int(of.vram_bytes)
    least_ram = least_ram_bytes(problems, budgets)
    least_disk = least_disk_bytes(problems, budgets)
    changes = sorted(_changes(task, workload, problems, least_vram, least_ram, least_disk))
    tips = [change.text for change in changes]
    asked, vram = f"a micro-batch of {workload.size}", format_bytes(budgets.vram_bytes)
    if least_ram is not None:  # with that much of it the vram that was asked for would do
        asked += (
            f" in {vram} of vram needs at least {_more(least_ram, budgets.ram_bytes)} of ram; the budget is "
            f"{format_bytes(budgets.ram_bytes)}"
        )
        limited = _ram_limit(task, of)
    elif of.smallest is None:
        asked += f" does not fit in {vram} of vram, and there is no room for the blocks that would leave it"
        limited = _ram_limit(task, of)
    else:
        asked += f" needs at least {_more(int(of.vram_bytes), budgets.vram_bytes)} of vram; the budget is {vram}"
        limited = _vram_limit(of)
    more = _more_tips(task, workload, of, bool(changes), is_ram=least_ram is not None)
    tips += (tip for tip in more if tip not in tips)
    return DoesNotFitError(
        asked,
        least_vram_bytes=least_vram,
        least_ram_bytes=least_ram,
        least_disk_bytes=least_disk,
        limited_by=limited,
        suggestions=tuple(tips[:_MOST_TIPS]),
    )


def _least_of(task: Task) -> list[Least]:
    """Return the problems that were solved, each with its least vram."""
    return [Least(problem) for problem in task.problems()]


def _changes(
    task: Task,
    workload: Workload,
    problems: list[Least],
    least_vram: int | None,
    least_ram: int | None,
    least_disk: int | None,
) -> Iterator[_Change]:
    """Yield what makes it fit alone."""
    budgets = task.budgets
    if least_vram is not None:
        price = _PRICES["vram"] * (least_vram - budgets.vram_bytes) / GIB
        yield _Change(price, f"give at least {format_bytes(least_vram)} of vram ({least_vram} bytes)")
        trained = sum(row.size_bytes for row in task.table.fixed)
        if least_ram is None and trained > max(least_vram - budgets.vram_bytes, least_vram // 2):
            # Nothing else is as much, and it costs no hardware: experts have most of a model's modules.
            yield _Change(0.0, _fewer_targets(trained))
    if least_ram is None and (both := _vram_and_ram(problems, budgets)) is not None:
        vram, ram = both
        price = _PRICES["vram"] * (vram - budgets.vram_bytes) / GIB + _PRICES["ram"] * (ram - budgets.ram_bytes) / GIB
        if ram > budgets.ram_bytes:
            yield _Change(
                price,
                f"give at least {format_bytes(vram)} of vram and {format_bytes(ram)} of ram ({vram} and {ram} bytes)",
            )
    if least_ram is not None:
        price = _PRICES["ram"] * (least_ram - budgets.ram_bytes) / GIB
        why = ", so that blocks may be read from the disk" if _lacks_staging(task) else ""
        yield _Change(price, f"give at least {format_bytes(least_ram)} of ram ({least_ram} bytes){why}")
    if least_disk is not None and any(fitting(least, replace(budgets, disk_bytes=least_disk)) for least in problems):
        price = _PRICES["disk"] * (least_disk - (budgets.disk_bytes or 0)) / GIB
        yield _Change(
            price,
            f"give a disk budget of at least {format_bytes(least_disk)} ({least_disk} bytes), or the folder of a "
            "checkpoint that blocks may be read from",
        )
    for group in reversed(sizes(task.table.group)[:-1]):
        fewer = _least_of(task._replace(table=grouped(task.table, group, workload.accumulation)))
        if any(fitting(least, budgets) for least in fewer):
            yield _Change(0.0, f"let {group} of the step's micro-batches share a load, not {task.table.group} (group)")
            break
    chunked = chunked_loss(task.table, workload.tokens) if workload.loss == "full" else None
    if chunked is not None:
        needed = min(least.vram_bytes for least in _least_of(task._replace(table=chunked)))
        short = least_ram is None and least_vram is not None and needed < (1 - _WORTH) * least_vram
        if needed <= budgets.vram_bytes or short:
            more = max(0, int(needed) - budgets.vram_bytes)
            how = "and give" if more else "which needs"
            yield _Change(
                _LOSS_PRICE + _PRICES["vram"] * more / GIB,
                f"compute the loss in chunks of {CHUNK_TOKENS} tokens (loss='chunked', in fewer), {how} at least about "
                f"{format_bytes(int(needed))} of vram",
            )


def _vram_and_ram(problems: list[Least], budgets: Budgets) -> tuple[int, int] | None:
    """Return the least vram with RAM without end, and the least RAM with that, in bytes; None where there is none."""
    endless = replace(budgets, ram_bytes=1 << 60)
    vram = min((Least(least.within(endless)).vram_bytes for least in problems), default=float("inf"))
    if vram == float("inf"):
        return None
    ram = least_ram_bytes(problems, replace(budgets, vram_bytes=int(vram)))
    return None if ram is None else (int(vram), ram)


def _ram_limit(task: Task, of: Least) -> str:
    """Return what of RAM stands in the way."""
    budgets, problem = task.budgets, of.problem
    frozen = sum(block.size_bytes for block in problem.table.blocks)
    if _lacks_staging(task):
        staging = format_bytes(problem.staging_bytes)
        limited = f"the disk is read through {staging} of ram, and there are {format_bytes(budgets.ram_bytes)}"
    else:
        disk = "no room on disk" if budgets.disk_bytes == 0 else "too little room on disk"
        limited = f"ram of {format_bytes(budgets.ram_bytes)} and {disk} for the streamed blocks"
    if problem.is_pageable(frozen, reads_disk=False):
        lock = format_bytes(problem.page_lock_bytes or 0)
        limited += (
            f"; {lock} of ram may be pinned, and the rest is copied through another {format_bytes(RING_BYTES)} of ram"
        )
    if problem.saves.host_bytes:
        limited += f", beside {format_bytes(problem.saves.host_bytes)} of ram for offloaded activations"
    return limited


def _vram_limit(of: Least) -> str:
    """Return what of vram stands in the way."""
    assert of.smallest is not None
    problem, level, (room, smallest) = of.problem, of.level, of.smallest
    access = problem.table.accesses[int(of.nonweight.argmax())]
    where = f"the {access.kind}" + (f" of {access.module}" if access.module else "")
    again, all_of_them = len(problem.recomputed_at(level)), len(problem.table.recomputable)
    how = f", {again} of {all_of_them} modules recomputed" if level else ""
    return (
        f"{format_bytes(int(of.nonweight.max()))} of activations, adapters and optimizer state at {where}{how}, "
        f"beside weights of {format_bytes(room)} ({format_bytes(smallest.slots_bytes)} of it the streaming buffer)"
    )


def _more_tips(task: Task, workload: Workload, of: Least, is_found: bool, *, is_ram: bool) -> Iterator[str]:
    """Yield what helps besides: by how much was not looked at."""
    problem, table = of.problem, of.problem.table
    if problem.is_pageable(sum(block.size_bytes for block in table.blocks), reads_disk=False):
        yield "raise the limit on pinned ram, if the machine allows it"
    if of.smallest is None or is_ram:
        if not is_found and not is_ram:
            yield "give more ram and a disk budget"
        if not any(tensor.dtype in ("uint8", "int8", "int32") for block in table.blocks for tensor in block.tensors):
            yield "quantize the base (such as --quantization nf4): its weights take about a quarter of the room"
        return
    least, peak, smallest = int(of.vram_bytes), int(of.nonweight.max()), of.smallest[1]
    fixed = sum(row.size_bytes for row in table.fixed)
    if fixed > min(least // 4, peak // 2):
        yield _fewer_targets(fixed)
    if smallest.device_bytes > 4 * smallest.slots_bytes and len(smallest.homes) < len(problem.movable):
        yield "give more ram or a disk budget, so that more blocks may leave the device"
    state = sum(row.size_bytes for row in table.fixed if row.kind == "optimizer")
    is_choice = len(task.tables()) > 1  # then it was tried
    if state > least // 8 and not is_choice and not workload.optimizer.startswith("paged_"):
        yield 'let the optimizer\'s state wait in ram between steps (optimizer_state "host")'
    if fixed <= least // 4 or peak - fixed > smallest.device_bytes // 4:
        yield "use a smaller micro-batch with more accumulation, or shorter sequences: activations shrink with them"
    looked = any(row.offload_bytes for row in table.accesses)
    if of.level and not looked and is_apart(table.device):
        yield 'let activations wait in ram too (activations "any"), which may need less vram'


def _fewer_targets(size_bytes: int) -> str:
    return (
        "use a smaller adapter rank, fewer of its targets (such as the attention's alone), or an optimizer with less "
        f"state: these take {format_bytes(size_bytes)}, gradients not counted"
    )


def _lacks_staging(task: Task) -> bool:
    return task.budgets.disk_bytes != 0 and task.budgets.ram_bytes < task.table.ranks.node_bytes(0, task.staging_bytes)


def _more(least_bytes: int, budget_bytes: int) -> str:
    """Return bytes for people, as what is more than the budget where the two look alike."""
    shown = format_bytes(least_bytes)
    return f"{least_bytes - budget_bytes} bytes more" if shown == format_bytes(budget_bytes) else shown
