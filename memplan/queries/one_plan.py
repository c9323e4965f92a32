"""One plan for all ranks, made by one of them, and one decision whether there is to be one."""

from __future__ import annotations

import hashlib
import mmap
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
import torch
from torch import nn

from memplan.case import profile_of, ram_of, vram_of
from memplan.device_kinds import is_apart
from memplan.errors import InputError
from memplan.hardware.machine import cache_path
from memplan.hooks.nested import tensors_in
from memplan.model.calls import Call, Step
from memplan.program import codec
from memplan.program.schema import Plan
from memplan.ranks.restart import left_vram
from memplan.ranks.session import RankError, Session, session
from memplan.ranks.shared_memory import shared_memory
from memplan.ranks.world import unknown_ranks
from memplan.request import Sizes


class _Own(msgspec.Struct, frozen=True):
    """What one rank has."""

    model: str
    vram_bytes: int
    ram_bytes: int
    numbers: int
    """Of its largest micro-batch."""


def agreed(why: str | None) -> str | None:
    """Return why no rank's model is placed: ``why`` on one process; on several, what one of them has said, or None."""
    ranks = session("decide whether a model is placed")
    if ranks is None:
        return why
    records = ranks.gather("deciding whether the model is placed", msgspec.msgpack.encode(why))
    said: list[str | None] = [msgspec.msgpack.decode(record, type=str | None) for record in records]
    return next((one for one in said if one is not None), None)


def planning() -> Session | None:
    """Return a session for :func:`one_plan`, in which a rank may fail before it comes to that; None on one process."""
    return session("plan for a model")


def one_plan(
    model: nn.Module,
    planned: Callable[[dict[str, Any]], Plan],
    options: Mapping[str, Any],
    call: object,
    ranks: Session | None = None,
) -> Plan:
    """Return the plan that is ``planned`` with options; on several ranks, that of the one whose micro-batch is largest.

    ``call``: what the model is called with. ``ranks``: a session that has begun with it. ``planned`` is asked on one
    rank alone, with the least vram that a rank has, and the RAM of the smallest node, in which weights on the host lie
    once where its ranks can share memory. Raises what ``planned`` raises, on every rank; RankError.
    """
    unknown = unknown_ranks()
    if unknown is not None:
        raise InputError(f"a model was to be planned for, but {unknown}")
    ranks = ranks or planning()
    if ranks is None:
        return planned(dict(options))
    hardware = options.get("hardware", "auto")
    with ranks.first_of_node("measuring the machine") as is_first:
        if is_first:
            profile_of(hardware)  # from here on it is known
    with ranks.telling("looking at the budgets"):
        profile, sizes, left = profile_of(hardware), Sizes.of(options), left_vram(cache_path())
        own = _Own(
            model=_signature(model),
            vram_bytes=min(vram_of(sizes, profile), left if left is not None else sys.maxsize),
            ram_bytes=ram_of(sizes, profile),
            numbers=sum(tensor.numel() for tensor in _tensors(call)),
        )
    records = ranks.gather("looking at the budgets", msgspec.msgpack.encode(own))
    found = [msgspec.msgpack.decode(record, type=_Own) for record in records]
    for rank, record in enumerate(found):
        if record.model != found[0].model:
            raise RankError(
                f"rank {rank} has another model than rank 0 (other parameters, or others that are trained): all ranks "
                "train one model"
            )
    count = ranks.most_per_node
    shares = count > 1 and _can_share(ranks)
    vram_bytes = min(record.vram_bytes for record in found)
    if sizes.vram_bytes is None and not is_apart(profile.device):
        vram_bytes //= count * ranks.machine_share  # what is free is there once
    ram_bytes = min(record.ram_bytes for record in found)
    if sizes.ram_bytes is None:
        ram_bytes //= ranks.machine_share
    # The margin is taken off once more. Micro-batches of ranks share no loads: DDP sums gradients in the last one's.
    given = {**options, "vram": vram_bytes + sizes.margin_bytes, "group": 1, "ram": ram_bytes}
    given |= {"gpus": count, "nodes": -(-ranks.size // count)}
    if count > 1 and not shares:  # each rank is as a node of its own then
        given |= {"gpus": 1, "nodes": ranks.size, "ram": ram_bytes // count}
    most = max(record.numbers for record in found)
    planner = next(rank for rank, record in enumerate(found) if record.numbers == most)

    made = ranks.from_one("planning", planner, lambda: codec.encode(planned(given)))
    with ranks.stage("reading the plan"):
        return codec.decode(made, Plan, f"rank {planner}").judged()


def _can_share(ranks: Session) -> bool:
    """Whether the ranks of every node can share memory."""
    can = shared_memory(ranks, mmap.PAGESIZE) is not None or len(ranks.node) == 1
    return all(ranks.gather("looking whether memory can be shared", b"1" if can else b""))


def _signature(model: nn.Module) -> str:
    """Return what two models have in common that a plan can serve both of."""
    found = hashlib.sha256()
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.update(f"{name} {tuple(parameter.shape)} {parameter.dtype} {parameter.requires_grad}\n".encode())
    return found.hexdigest()


def _tensors(call: object) -> Iterator[torch.Tensor]:
    calls = call.calls if isinstance(call, Step) else (call,)
    for one in calls:
        yield from tensors_in((one.args, one.kwargs) if isinstance(one, Call) else one)
