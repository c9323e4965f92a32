"""Putting a plan to work on a model, and taking it away again. All or nothing, in both directions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import nn

from memplan.errors import InputError, ModelError, PlanMismatchError
from memplan.hooks.compiled import forget_compiled
from memplan.model.weights import mark_adapters
from memplan.program.check.judge import require
from memplan.program.schema import Plan
from memplan.program.support import require_supported
from memplan.ranks.data_parallel import leave_alone
from memplan.ranks.session import Session, announce, session, stage
from memplan.ranks.world import unknown_ranks, world
from memplan.run.agreement import require_same
from memplan.run.handle import Handle, handle_of
from memplan.run.memory.home import Checkpoint
from memplan.run.memory.limit import limit, others_bytes
from memplan.run.memory.storage_aliases import Watched, refuse_gaps, refuse_shared
from memplan.run.modules.guard import managed
from memplan.run.modules.install import install
from memplan.run.modules.match_model import match_weights, stored_tensors, trigger_modules
from memplan.run.tiers import Files, Tiers
from memplan.run.transfer.device import chosen, reset_peaks
from memplan.run.transfer.interrupts import Undo, defer_sigint


def attach(
    model: nn.Module,
    plan: Plan,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    checked: bool = False,
    traced: bool = False,
    cache: str | Path | None = None,
    verify: bool = False,
    progress: Callable[[int], None] | None = None,
    replan: Callable[[Plan, int], Plan] | None = None,
) -> Handle:
    """Put every frozen block of ``model`` in its home and stream it as ``plan`` says.

    ``model``: whole, on any device.
    ``plan``: made for such a model.
    ``checkpoint``: folder of safetensors that blocks homed on disk are read from where it holds the very bytes of the
    model (default: where the model says it came from), or its tensors by name; else they are packed into files, once,
    which needs ``disk`` in the plan's budgets.
    ``checked``: fill each streaming buffer with NaN before it is loaded, check every saved weight at its use in
    backward, and the order of every load and read by vector clocks; slower, for tests and new kinds of models.
    ``traced``: note when each access and load of a micro-batch takes place, for the record's ``spans``, and name
    accesses in torch's profiler.
    ``cache``: folder for packed files, in place of the user's.
    ``verify``: compare each packed file's checksum when it is first read (a checkpoint's own files have none: of those
    size and date are watched, always).
    ``progress``: called with each block's size once placed.
    ``replan``: gives the same plan for less vram, in bytes (see ``Handle.micro_batch``).

    Raises InputError, PlanCheckError, PlanMismatchError, ModelError, CheckpointError; the model then is as it was.
    """
    announce(world())
    given: tuple[object, object] = (model, plan)
    if not isinstance(given[0], nn.Module) or not isinstance(given[1], Plan):
        raise InputError(
            f"attach(model, plan) was given a {type(model).__name__} and a {type(plan).__name__}: give the model "
            "first, then the plan that memplan.plan or Plan.load returned"
        )
    require(plan)
    return attach_on(
        model,
        plan,
        device_of_rank(model, device_of(plan)),
        checkpoint=checkpoint,
        checked=checked,
        traced=traced,
        cache=cache,
        verify=verify,
        progress=progress,
        replan=replan,
    )


def device_of_rank(model: nn.Module, device: torch.device) -> torch.device:
    """Return where a model is trained: ``device``, or of several ranks where this one has what it trains, which may
    never have made its device the current one.
    """
    if world() is None:
        return device
    trained = (parameter.device for parameter in model.parameters() if parameter.requires_grad)
    return next((found for found in trained if found.type == device.type), device)


def device_of(plan: Plan) -> torch.device:
    """Return the device of the kind that a plan was made for. Raises PlanMismatchError where torch sees none."""
    device = chosen(plan.table.device)
    if device is None:
        raise PlanMismatchError(
            f"the plan was made for the {plan.table.device} device of {plan.hardware!r}, and torch sees none here: "
            "make a plan with hardware='auto'"
        )
    return device


def attach_on(
    model: nn.Module,
    plan: Plan,
    device: torch.device,
    *,
    checkpoint: str | Path | Checkpoint | None = None,
    checked: bool = False,
    traced: bool = False,
    cache: str | Path | None = None,
    verify: bool = False,
    progress: Callable[[int], None] | None = None,
    replan: Callable[[Plan, int], Plan] | None = None,
) -> Handle:
    """As :func:`attach`, on ``device``: a plan that was made for a GPU runs on the CPU too, where nothing is pinned."""
    unknown = unknown_ranks()
    if unknown is not None:
        raise InputError(f"attach was called, but {unknown}")
    leave_alone(managed)
    ranks = session("put a plan to work")
    with contextlib.nullcontext() if ranks is None else ranks.telling("putting the plan to work"):
        return _attached(
            model,
            plan,
            device,
            ranks,
            checkpoint=checkpoint,
            checked=checked,
            traced=traced,
            cache=cache,
            verify=verify,
            progress=progress,
            replan=replan,
        )


def _attached(
    model: nn.Module,
    plan: Plan,
    device: torch.device,
    ranks: Session | None,
    *,
    checkpoint: str | Path | Checkpoint | None,
    checked: bool,
    traced: bool,
    cache: str | Path | None,
    verify: bool,
    progress: Callable[[int], None] | None,
    replan: Callable[[Plan, int], Plan] | None,
) -> Handle:
    require_supported(plan)
    if plan.workload.loss == "fused":
        raise InputError(
            "the plan was made for a fused loss (loss='fused'), to look at: what has one patches the model itself, so "
            "plan for the trainer that does (memplan.wrap, memplan run), or give loss='chunked'"
        )
    if handle_of(model) is not None:
        raise ModelError("the model is under a plan already: detach() that one first")
    mark_adapters(model)
    weights = match_weights(model, plan)
    triggers = trigger_modules(model, plan)
    refuse_gaps(weights)
    refuse_shared(model, weights)
    watched = Watched(weights)
    files = Files(stored=stored_tensors(model, checkpoint), cache=_cache(cache), verify=verify)
    if ranks is not None:
        require_same(ranks, plan, weights, files.stored)
    with Undo() as modes, Undo() as undo:
        # A Ctrl-C on the way in or out of a no_grad leaves it on.
        modes.callback(torch.set_grad_enabled, torch.is_grad_enabled())
        with stage(ranks, "filling the homes of blocks"):
            others = others_bytes(model, device)
            tiers = Tiers(model, plan, device, weights, files, undo, poisoned=checked, progress=progress, ranks=ranks)
        with defer_sigint():
            undo.callback(forget_compiled)
            forget_compiled()
            runs = partial(install, model, tiers, triggers, checked=checked, traced=traced)
            limit(model, plan, device, others, undo)
            reset_peaks(device)
            handle = Handle(model, runs, undo, replan)
    try:
        with stage(ranks, "attaching"):
            watched.tell(model)
    except BaseException:
        handle.detach()
        raise
    return handle


def _cache(cache: str | Path | None) -> Path:
    if cache is not None:
        return Path(cache)
    from memplan.hardware.machine import cache_folder

    return cache_folder()
